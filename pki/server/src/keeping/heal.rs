//! A database that is damaged is put aside, and the newest good backup takes its place. No host notices: what hosts
//! hold goes on, and what was lost of the authorities is in the mirror. The operator gets an alarm.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rusqlite::{ErrorCode, ffi};

use super::backups::{Backup, Backups, Partial, beside, stamp};
use super::restored::Restored;
use super::roster;
use crate::state_dir::StateError;
use crate::store::{Database, DbError, settings, tokens};
use crate::times::unix;

/// Called before a server opens its database, which nobody else serves then.
pub(crate) fn heal(dir: &Path, now: SystemTime) -> Result<Option<Restored>, StateError> {
    let backups = Backups::new(dir).by_age(last_written(dir, now))?;
    let damage = match check_file(&dir.join("pki.db")).and_then(|()| refuse_if_older(dir, &backups)) {
        // Without a backup it was never started: `init` is what is missing.
        Err(DbError::Missing { .. } | DbError::Empty { .. }) if backups.is_empty() => return Ok(None),
        Err(error) if is_damage(&error) => error,
        // What cannot be judged now is not replaced; opening it says what is wrong.
        _ => return Ok(None),
    };
    for backup in backups.iter().filter(|backup| is_usable(&backup.path)) {
        match fetch(dir, &backup.path) {
            Ok(good) => return put_in_place(dir, &good, damage.to_string(), now).map(Some),
            // One of an earlier version is judged only where it is converted.
            Err(StateError::Db(error)) if is_damage(&error) => {
                tracing::warn!(backup = %backup.path.display(), %error, "a backup is of no use; trying the one before");
            }
            Err(error) => return Err(error),
        }
    }
    Err(damage.into())
}

/// A database that lost its log of changes is whole, and what it was long ago.
fn refuse_if_older(dir: &Path, backups: &[Backup]) -> Result<(), DbError> {
    let path = dir.join("pki.db");
    let known = Database::open_file(&path)?.read(settings::backed_up)?;
    let name_in = |backup: &Backup| Database::open_copy(&backup.path)?.read(settings::backed_up);
    match backups.iter().find_map(|backup| name_in(backup).ok()?) {
        Some(newest) if known.as_ref() < Some(&newest) => {
            let detail = format!("it is from before the backup {newest}; its log of changes was lost");
            Err(DbError::Damaged { path, detail })
        }
        _ => Ok(()),
    }
}

/// Not before the database was written to last: a clock that is behind would take good backups for some of the future.
pub(crate) fn last_written(dir: &Path, now: SystemTime) -> SystemTime {
    let written = ["pki.db", "pki.db-wal"].iter().filter_map(|name| dir.join(name).metadata().ok()?.modified().ok());
    written.fold(now, SystemTime::max)
}

/// As `check_file`, for a copy, of which nothing is changed.
pub(crate) fn check_copy(path: &Path) -> Result<(), DbError> {
    Database::open_copy(path)?.check()
}

/// Whether a copy is whole, or of an earlier version, which is converted where it is put in place.
pub(crate) fn is_usable(path: &Path) -> bool {
    matches!(check_copy(path), Ok(()) | Err(DbError::OldCopy { .. }))
}

/// A backup in the state directory, whole and ready to be put in place.
pub(crate) struct Fetched {
    pub(crate) from: PathBuf,
    partial: Partial,
}

impl Fetched {
    pub(crate) fn path(&self) -> &Path {
        self.partial.path()
    }
}

/// Copies a backup from wherever it lies: it is judged, and converted if it is of an earlier version, only here.
pub(crate) fn fetch(dir: &Path, from: &Path) -> Result<Fetched, StateError> {
    let partial = Partial::new(dir.join("pki.partial"));
    let copied = copy_private(from, partial.path()).and_then(|()| {
        // Of a database that was put aside by hand.
        let log = beside(from, "-wal");
        if log.exists() { copy_private(&log, &beside(partial.path(), "-wal")) } else { Ok(()) }
    });
    copied.map_err(|source| StateError::Io { action: "copy", path: from.to_owned(), source })?;
    check_file(partial.path())?;
    Ok(Fetched { from: from.to_owned(), partial })
}

fn copy_private(from: &Path, to: &Path) -> io::Result<()> {
    fs::copy(from, to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o600))
}

/// Whether the file holds a whole PKI.
pub(crate) fn check_file(path: &Path) -> Result<(), DbError> {
    match Database::open_file(path) {
        Ok(database) => database.check(),
        Err(DbError::Missing { .. }) if path.exists() => Err(DbError::Empty { path: path.to_owned() }),
        Err(error) => Err(error),
    }
}

/// Damage, and nothing that passes or that an older backup would not help against.
fn is_damage(error: &DbError) -> bool {
    match error {
        DbError::Damaged { .. } | DbError::Record { .. } | DbError::Missing { .. } | DbError::Empty { .. } => true,
        // A file shorter than it says it is, which is nothing that passes.
        DbError::Sqlite(error)
            if error.sqlite_error().is_some_and(|error| error.extended_code == ffi::SQLITE_IOERR_SHORT_READ) =>
        {
            true
        }
        DbError::Sqlite(error) => !matches!(
            error.sqlite_error_code(),
            Some(
                ErrorCode::DatabaseBusy
                    | ErrorCode::DatabaseLocked
                    | ErrorCode::DiskFull
                    | ErrorCode::OutOfMemory
                    | ErrorCode::PermissionDenied
                    | ErrorCode::SystemIoFailure
            )
        ),
        _ => false,
    }
}

/// Puts the database aside and a backup in its place.
pub(crate) fn put_in_place(
    dir: &Path,
    fetched: &Fetched,
    reason: String,
    now: SystemTime,
) -> Result<Restored, StateError> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| StateError::Io { action, path, source }
    };
    let partial = fetched.path();
    let newest = Backups::new(dir).mark(now)?;
    Database::open_file(partial)?.transaction(|records| -> Result<(), DbError> {
        settings::set_backed_up(records, &newest)?;
        let mut found = records.list("token/")?;
        tokens::end_all(&mut found, unix(now))?;
        found.iter().try_for_each(|(key, value)| records.put(key, value))
    })?;
    File::open(partial).and_then(|file| file.sync_all()).map_err(io("sync", partial))?;
    let restored = Restored {
        at: unix(now),
        backup: fetched.from.clone(),
        reason,
        put_aside: put_aside(dir, "damaged", now)?,
        published: false,
        seen: false,
    };
    // Said before it is done: a crash in between restores once more.
    restored.write(dir).map_err(io("write", dir))?;
    let path = dir.join("pki.db");
    fs::rename(partial, &path).map_err(io("rename", partial))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))?;
    Ok(restored)
}

/// Also the side files: a log of changes would be applied to the backup. And the list of hosts.
pub(crate) fn put_aside(dir: &Path, why: &str, now: SystemTime) -> Result<PathBuf, StateError> {
    let aside = dir.join(format!("{why}-{}", stamp(now)));
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&aside);
    made.map_err(|source| StateError::Io { action: "create", path: aside.clone(), source })?;
    for name in ["pki.db", "pki.db-wal", "pki.db-shm"] {
        let path = dir.join(name);
        if path.exists() {
            fs::rename(&path, aside.join(name)).map_err(|source| StateError::Io { action: "move", path, source })?;
        }
    }
    keep_list(dir, &aside)?;
    Ok(aside)
}

/// It may know hosts that the backup does not, and is written anew soon.
pub(crate) fn keep_list(dir: &Path, aside: &Path) -> Result<(), StateError> {
    let list = dir.join(roster::FILE);
    if list.exists() {
        let copied = fs::copy(&list, aside.join(roster::FILE));
        copied.map_err(|source| StateError::Io { action: "copy", path: list, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::state_dir::{StateDir, init};
    use crate::store::hosts;
    use crate::times::from_unix;

    const PAGE: u64 = 4096;

    fn now() -> SystemTime {
        from_unix(1_790_000_000)
    }

    type All = Vec<(String, Vec<u8>)>;

    fn records(dir: &Path) -> All {
        let database = Database::open(dir).unwrap();
        let mut records = database.read(|view| -> Result<All, DbError> { view.list("") }).unwrap();
        // A restore counts as newer than every backup.
        records.retain(|(key, _)| key != "setting/backed_up");
        records
    }

    /// A PKI of some pages with one backup, and its records.
    fn backed_up() -> (TempDir, All) {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &"prod.example.org".parse().unwrap(), None, now()).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let permit = |n: i64| {
            state.database.transaction(|records| -> Result<(), DbError> {
                for m in 0..100 {
                    hosts::permit(records, &format!("host-{n}"), &format!("spiffe://a/ns/a/sa/{m}"), n)?;
                }
                Ok(())
            })
        };
        (0..4).for_each(|n| permit(n).unwrap());
        Backups::new(dir.path()).create(&state.database, now(), true).unwrap();
        drop(state);
        let records = records(dir.path());
        (dir, records)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn overwritten_pages_are_noticed_and_the_backup_takes_their_place(
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<[u8; 32]>()), 1..4),
            whole in any::<bool>(),
        ) {
            thread_local!(static PKI: (TempDir, All) = backed_up());
            PKI.with(|(dir, before)| {
                let path = dir.path().join("pki.db");
                let length = fs::metadata(&path).unwrap().len();
                let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                for (place, bytes) in &damage {
                    if whole {
                        let page = place.index(usize::try_from(length / PAGE).unwrap()) as u64;
                        file.write_all_at(&bytes.repeat(128), page * PAGE).unwrap();
                    } else {
                        let at = place.index(usize::try_from(length - 32).unwrap()) as u64;
                        file.write_all_at(bytes, at).unwrap();
                    }
                }
                drop(file);
                heal(dir.path(), now()).unwrap();
                assert_eq!(&records(dir.path()), before);
            });
        }
    }

    #[test]
    fn a_damaged_key_that_hides_what_sorts_behind_it_is_noticed() {
        let (dir, before) = backed_up();
        let path = dir.path().join("pki.db");
        let mut bytes = fs::read(&path).unwrap();
        let key = b"entry/host-2/spiffe://a/ns/a/sa/50";
        let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
        bytes[at] = 0x7f;
        fs::write(&path, bytes).unwrap();
        heal(dir.path(), now()).unwrap().unwrap();
        assert_eq!(records(dir.path()), before);
    }

    #[test]
    fn a_damaged_backup_is_passed_over_and_without_a_good_one_nothing_is_touched() {
        let (dir, before) = backed_up();
        let state = StateDir::open(dir.path()).unwrap();
        let newest =
            Backups::new(dir.path()).create(&state.database, now() + std::time::Duration::from_secs(5), true).unwrap();
        drop(state);
        let spoil = |path: &Path| {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&[0xa5; 5000], PAGE / 2).unwrap();
        };
        spoil(&newest.path);
        spoil(&dir.path().join("pki.db"));
        let restored = heal(dir.path(), now()).unwrap().unwrap();
        assert_ne!(restored.backup, newest.path);
        assert_eq!(records(dir.path()), before);
        assert!(restored.put_aside.join("pki.db").exists());
        assert!(heal(dir.path(), now()).unwrap().is_none(), "what was restored is whole");

        spoil(&restored.backup);
        spoil(&dir.path().join("pki.db"));
        let damaged = fs::read(dir.path().join("pki.db")).unwrap();
        heal(dir.path(), now()).unwrap_err();
        assert_eq!(fs::read(dir.path().join("pki.db")).unwrap(), damaged);
    }

    #[test]
    fn a_damaged_backup_of_an_earlier_version_is_passed_over_where_it_is_converted() {
        let (dir, before) = backed_up();
        let state = StateDir::open(dir.path()).unwrap();
        let newest =
            Backups::new(dir.path()).create(&state.database, now() + std::time::Duration::from_secs(5), true).unwrap();
        drop(state);
        fs::remove_file(&newest.path).unwrap();
        rusqlite::Connection::open(&newest.path).unwrap().execute_batch("PRAGMA user_version = 2").unwrap();
        assert!(is_usable(&newest.path), "nothing of it was read yet");
        fs::remove_file(dir.path().join("pki.db")).unwrap();
        let restored = heal(dir.path(), now()).unwrap().unwrap();
        assert_ne!(restored.backup, newest.path);
        assert_eq!(records(dir.path()), before);
    }

    #[test]
    fn a_database_that_is_gone_or_emptied_comes_back_from_its_backup() {
        let (dir, before) = backed_up();
        fs::remove_file(dir.path().join("pki.db")).unwrap();
        heal(dir.path(), now()).unwrap().unwrap();
        assert_eq!(records(dir.path()), before);
        File::create(dir.path().join("pki.db")).unwrap();
        heal(dir.path(), now()).unwrap().unwrap();
        assert_eq!(records(dir.path()), before);
    }
}
