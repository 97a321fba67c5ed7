//! Copies of the database beside it. The wrapping key is not in them: without it they open no private key, and with it
//! they are the PKI. So the two are to be kept apart.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::keeping::heal;
use crate::store::{Database, DbError, settings};
use crate::times::{rfc3339, unix, unix_ms};

/// Two days of hourly ones; steps of authorities are rare.
const KEPT: usize = 48;
const SUFFIX: &str = ".db";

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

    /// Makes one, reads all of it, and only then calls it a backup; the oldest beyond those kept go.
    pub(crate) fn create(&self, database: &Database, now: SystemTime) -> Result<Backup, BackupError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| BackupError::Io { action, path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(io("create", &self.dir))?;
        let path = self.dir.join(format!("{}{SUFFIX}", stamp(now)));
        let partial = path.with_extension("partial");
        // What a crash left would be added to.
        _ = fs::remove_file(&partial);
        let marked = database.transaction(|records| settings::set_backed_up(records, &stamp(now)));
        if let Err::<(), DbError>(error) = marked {
            // A backup all the same; only whether the database is older than it will not be known.
            tracing::debug!(%error, "the database does not know of its backup");
        }
        database.copy_to(&partial)?;
        heal::check_file(&partial)?;
        let file = File::open(&partial).map_err(io("open", &partial))?;
        file.sync_all().map_err(io("sync", &partial))?;
        let bytes = file.metadata().map_err(io("read", &partial))?.len();
        fs::rename(&partial, &path).map_err(io("rename", &partial))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(io("sync", &self.dir))?;
        self.prune()?;
        Ok(Backup { path, bytes })
    }

    /// Newest first.
    pub(crate) fn list(&self) -> Result<Vec<Backup>, BackupError> {
        let failed = |source| BackupError::Io { action: "read", path: self.dir.clone(), source };
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().ends_with(SUFFIX) {
                found.push(Backup { path: entry.path(), bytes: entry.metadata().map_err(failed)?.len() });
            }
        }
        found.sort_by(|a, b| b.path.cmp(&a.path));
        Ok(found)
    }

    pub(crate) fn newest_whole(&self) -> Option<Backup> {
        // An unreadable directory has none.
        self.list().unwrap_or_default().into_iter().find(|backup| heal::check_file(&backup.path).is_ok())
    }

    fn prune(&self) -> Result<(), BackupError> {
        for old in self.list()?.into_iter().skip(KEPT) {
            fs::remove_file(&old.path).map_err(|source| BackupError::Io {
                action: "remove",
                path: old.path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

/// Sorts as the time does, and is a file name everywhere: 20261121T152536.123Z
pub(crate) fn stamp(now: SystemTime) -> String {
    let seconds = rfc3339(unix(now)).replace(['-', ':'], "");
    format!("{}.{:03}Z", seconds.trim_end_matches('Z'), unix_ms(now) % 1000)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

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
            backups.create(&state.database, from_unix(1_790_000_000 + second)).unwrap();
        }
        let listed = backups.list().unwrap();
        assert_eq!(listed.len(), 48);
        assert_eq!(listed[0].name(), "20260921T141409.000Z");
        assert_eq!(listed[47].name(), "20260921T141322.000Z");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir.path().join("backups")), mode(&listed[0].path)), (0o700, 0o600));
    }
}
