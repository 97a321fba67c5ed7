//! Copies of the database beside it. The wrapping key is not in them: without it they open no private key, and with it
//! they are the PKI. So the two are to be kept apart.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::keeping::heal;
use crate::store::{Database, DbError, settings};
use crate::times::{rfc3339, unix, unix_ms};

/// Two days of hourly ones; steps of authorities are rare.
const KEPT: usize = 48;
const SUFFIX: &str = ".db";
/// A clock that is right was once ahead of now by no more than this.
const SKEW: Duration = Duration::from_secs(300);
/// Below the directory of backups; one name, so that what a crash left is found again.
const PARTIAL: &str = "partial";

#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the backup was not made: {0}")]
    Db(#[from] DbError),
}

pub(crate) struct Backups {
    dir: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    pub path: PathBuf,
    pub bytes: u64,
}

impl Backup {
    /// When it was made, as its name says.
    pub fn name(&self) -> String {
        self.path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl Backups {
    pub(crate) fn new(state: &Path) -> Backups {
        Backups { dir: state.join("backups") }
    }

    /// Makes one, reads all of it, and only then calls it a backup; the oldest beyond those kept go. By a clock that is
    /// right those from the future go first.
    pub(crate) fn create(
        &self,
        database: &Database,
        now: SystemTime,
        clock_is_right: bool,
    ) -> Result<Backup, BackupError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| BackupError::Io { action, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(io("create", &self.dir))?;
        // The command line makes backups beside a server.
        let dir = File::open(&self.dir).map_err(io("open", &self.dir))?;
        dir.lock().map_err(io("lock", &self.dir))?;
        let path = self.dir.join(format!("{}{SUFFIX}", stamp(now)));
        let partial = Partial::new(self.dir.join(PARTIAL));
        let marked = database.transaction(|records| settings::set_backed_up(records, &stamp(now)));
        if let Err::<(), DbError>(error) = marked {
            // A backup all the same; only whether the database is older than it will not be known.
            tracing::debug!(%error, "the database does not know of its backup");
        }
        database.copy_to(&partial.0)?;
        heal::check_copy(&partial.0)?;
        let file = File::open(&partial.0).map_err(io("open", &partial.0))?;
        file.sync_all().map_err(io("sync", &partial.0))?;
        let bytes = file.metadata().map_err(io("read", &partial.0))?.len();
        fs::rename(&partial.0, &path).map_err(io("rename", &partial.0))?;
        dir.sync_all().map_err(io("sync", &self.dir))?;
        self.prune(&path, clock_is_right.then_some(now))?;
        Ok(Backup { path, bytes })
    }

    /// Newest first, by their names. What else lies there is not ours.
    pub(crate) fn list(&self) -> Result<Vec<Backup>, BackupError> {
        let failed = |source| BackupError::Io { action: "read", path: self.dir.clone(), source };
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_str().and_then(|name| name.strip_suffix(SUFFIX)).is_some_and(is_stamp) {
                found.push(Backup { path: entry.path(), bytes: entry.metadata().map_err(failed)?.len() });
            }
        }
        found.sort_by(|a, b| b.path.cmp(&a.path));
        Ok(found)
    }

    /// As `list`, with those at the end that a clock made which was ahead: they are the older ones.
    pub(crate) fn by_age(&self, now: SystemTime) -> Result<Vec<Backup>, BackupError> {
        let latest = stamp(now + SKEW);
        let (ahead, mut sorted): (Vec<_>, Vec<_>) = self.list()?.into_iter().partition(|one| one.name() > latest);
        sorted.extend(ahead);
        Ok(sorted)
    }

    /// What a state is marked with that counts now, whatever newer backups there are.
    pub(crate) fn mark(&self, now: SystemTime) -> Result<String, BackupError> {
        Ok(self.list()?.first().map(Backup::name).unwrap_or_default().max(stamp(now)))
    }

    pub(crate) fn newest_whole(&self, now: SystemTime) -> Option<Backup> {
        // An unreadable directory has none.
        self.by_age(now).unwrap_or_default().into_iter().find(|backup| heal::check_copy(&backup.path).is_ok())
    }

    /// Never what was made just now, whose name a clock that is behind makes an old one.
    fn prune(&self, made: &Path, now: Option<SystemTime>) -> Result<(), BackupError> {
        let known = now.map_or_else(|| self.list(), |now| self.by_age(now))?;
        for old in known.into_iter().filter(|one| one.path != made).skip(KEPT - 1) {
            fs::remove_file(&old.path).map_err(|source| BackupError::Io {
                action: "remove",
                path: old.path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

/// A file that is removed again, with what SQLite makes beside it, unless it became something else.
pub(crate) struct Partial(PathBuf);

impl Partial {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn new(path: PathBuf) -> Partial {
        let partial = Partial(path);
        // What a crash left would be added to.
        partial.remove();
        partial
    }

    fn remove(&self) {
        for side in ["", "-wal", "-shm", "-journal"] {
            // It is not there, most times.
            _ = fs::remove_file(beside(&self.0, side));
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.remove();
    }
}

/// What SQLite makes beside a file.
pub(crate) fn beside(path: &Path, side: &str) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(side);
    path.into()
}

/// Sorts as the time does, and is a file name everywhere: 20261121T152536.123Z
pub(crate) fn stamp(now: SystemTime) -> String {
    let seconds = rfc3339(unix(now)).replace(['-', ':'], "");
    format!("{}.{:03}Z", seconds.trim_end_matches('Z'), unix_ms(now) % 1000)
}

/// Whether it has the form of `stamp`.
fn is_stamp(name: &str) -> bool {
    let form = b"00000000T000000.000Z";
    let fits = |(found, form): (u8, &u8)| if *form == b'0' { found.is_ascii_digit() } else { found == *form };
    name.len() == form.len() && name.bytes().zip(form).all(fits)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::state_dir::{StateDir, init};
    use crate::times::from_unix;

    #[test]
    fn names_sort_as_times_do() {
        assert_eq!(stamp(from_unix(1_790_000_000) + Duration::from_millis(7)), "20260921T141320.007Z");
    }

    #[test]
    fn the_newest_are_kept_and_nobody_else_can_read_them() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &"prod.example.org".parse().unwrap(), None, SystemTime::now()).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let backups = Backups::new(dir.path());
        assert_eq!(backups.list().unwrap(), []);
        for second in 0..50 {
            backups.create(&state.database, from_unix(1_790_000_000 + second), true).unwrap();
        }
        let listed = backups.list().unwrap();
        assert_eq!(listed.len(), 48);
        assert_eq!(listed[0].name(), "20260921T141409.000Z");
        assert_eq!(listed[47].name(), "20260921T141322.000Z");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir.path().join("backups")), mode(&listed[0].path)), (0o700, 0o600));
    }

    #[test]
    fn a_backup_that_fails_leaves_nothing_and_what_a_crash_left_goes() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &"prod.example.org".parse().unwrap(), None, SystemTime::now()).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let backups = Backups::new(dir.path());
        let made = backups.create(&state.database, from_unix(1_790_000_000), true).unwrap();
        let damage = rusqlite::Connection::open(dir.path().join("pki.db")).unwrap();
        damage.execute("UPDATE record SET value = '{}' WHERE key = 'trust'", []).unwrap();
        fs::write(dir.path().join("backups/partial-journal"), "x").unwrap();
        backups.create(&state.database, from_unix(1_790_000_010), true).unwrap_err();
        let left = fs::read_dir(dir.path().join("backups")).unwrap();
        assert_eq!(left.map(|entry| entry.unwrap().path()).collect::<Vec<_>>(), [made.path]);
    }

    #[test]
    fn what_a_clock_made_that_was_ahead_is_older_than_what_one_made_that_was_right() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &"prod.example.org".parse().unwrap(), None, SystemTime::now()).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let backups = Backups::new(dir.path());
        let now = from_unix(1_790_000_000);
        let make = |seconds, clock_is_right| {
            backups.create(&state.database, now + Duration::from_secs(seconds), clock_is_right).unwrap()
        };
        let ahead = make(400 * 86_400, false);
        fs::copy(&ahead.path, dir.path().join("backups/pre-upgrade.db")).unwrap();
        let right = make(0, false);
        assert_eq!(backups.newest_whole(now), Some(right.clone()));
        assert_eq!(backups.list().unwrap(), [ahead.clone(), right.clone()]);
        (1..=47).for_each(|second| drop(make(second, false)));
        assert!(ahead.path.exists() && !right.path.exists(), "a clock that may be wrong judges none");
        make(48, true);
        assert!(!ahead.path.exists());
        assert_eq!(backups.list().unwrap().len(), 48);
        let behind = from_unix(1_600_000_000);
        let made = backups.create(&state.database, behind, false).unwrap();
        assert!(made.path.exists(), "what was made just now stays");
    }
}
