//! The capture state on disk.
//!
//! The daemon and the command line both write it, so every change happens under a lock, and whoever touches the
//! kernel holds that lock too: the file says what may be in force, and nobody puts back what another has taken away.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, lchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::state::{CaptureState, SCHEMA, own_uid};
use super::tool::CaptureError;
use crate::durable;
use crate::enrol::PortMemory;

/// Thousands of strict ports; more is none of ours.
const MAX_SIZE: u64 = 16 << 20;
/// Applying rules takes a tenth of a second; whoever holds the lock this long hangs.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Where it is.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
    /// Whose the enrolled ports are is kept beside.
    port_memory: PortMemory,
}

/// Tells one version of the file from another, at the price of a stat.
pub(super) type Stamp = (u64, i64, i64);

impl StateFile {
    pub fn new(state_dir: &Path) -> StateFile {
        StateFile { path: state_dir.join("capture/state.json"), port_memory: PortMemory::new(state_dir) }
    }

    pub(super) fn port_memory(&self) -> &PortMemory {
        &self.port_memory
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Absent is empty. What cannot be understood is an error: it is the only record of what to undo.
    pub fn read(&self) -> Result<CaptureState, CaptureError> {
        let text = match self.read_text() {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(CaptureState::default()),
            Err(error) => return Err(self.failed("cannot read")(error)),
        };
        let remedy = "`meshd intercept revert` removes every rule and starts the file anew";
        let broken = |what: String| self.failed("cannot understand")(io::Error::other(format!("{what}; {remedy}")));
        let state: CaptureState = serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?;
        if state.schema > SCHEMA {
            return Err(broken(format!("schema {} was written by a newer meshd: use that one", state.schema)));
        }
        Ok(state)
    }

    /// Its directory belongs to a user that is not root: neither a link nor a pipe there may stop the way out.
    fn read_text(&self) -> io::Result<Vec<u8>> {
        let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("this is no regular file; remove it"));
        }
        let mut text = Vec::new();
        file.take(MAX_SIZE).read_to_end(&mut text)?;
        Ok(text)
    }

    pub(super) fn stamp(&self) -> Option<Stamp> {
        // Every version is a new file, so its inode and time tell.
        std::fs::metadata(&self.path).ok().map(|found| (found.ino(), found.mtime(), found.mtime_nsec()))
    }

    /// The only way to change it. Waits for others, but not for one that hangs.
    pub fn lock(&self) -> Result<Locked, CaptureError> {
        let lock = self.take_lock()?;
        Ok(Locked { state: self.read()?, file: self.clone(), _lock: Some(lock) })
    }

    /// For the way out, which must work when all else is broken: with the lock and the record if they can be had.
    pub fn lock_at_any_price(&self) -> Locked {
        let lock = match self.take_lock() {
            Ok(lock) => Some(lock),
            Err(error) => {
                tracing::warn!(%error, "going on without the lock");
                None
            }
        };
        let state = self.read().unwrap_or_else(|error| {
            tracing::warn!(%error, "removing what any backend may have left");
            CaptureState::default()
        });
        Locked { state, file: self.clone(), _lock: lock }
    }

    fn take_lock(&self) -> Result<Flock<File>, CaptureError> {
        self.make_directory().map_err(self.failed("cannot make the directory of"))?;
        let path = self.path.with_extension("lock");
        // Anybody who may read it may lock it. Never through a link: root follows nobody's.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .mode(0o644)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .or_else(|_| OpenOptions::new().read(true).custom_flags(nix::libc::O_NOFOLLOW).open(&path));
        let mut file = file.map_err(self.failed("cannot open the lock of"))?;
        let patience = Instant::now() + LOCK_PATIENCE;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((file, nix::Error::EAGAIN)) if Instant::now() < patience => file,
                Err((_, error)) => return Err(self.failed("another meshd process keeps the lock of")(error.into())),
            };
            std::thread::park_timeout(LOCK_RETRY);
        }
    }

    /// The daemon's own, also when root comes first: both replace files in it by renaming.
    fn make_directory(&self) -> io::Result<()> {
        let Some(directory) = self.path.parent() else { return Ok(()) };
        match std::fs::symlink_metadata(directory) {
            Ok(found) if found.is_dir() => return Ok(()),
            Ok(_) => return Err(io::Error::other("its directory is no directory; remove what is there")),
            Err(_) => {}
        }
        // Not the state directory itself: whose that is to be, only its maker knows.
        std::fs::create_dir(directory)?;
        let Some(owner) = directory.parent().and_then(|state_dir| std::fs::metadata(state_dir).ok()) else {
            return Ok(());
        };
        if owner.uid() == own_uid() {
            return Ok(());
        }
        // Not through a link that was put there meanwhile: it would give away what it leads to.
        lchown(directory, Some(owner.uid()), Some(owner.gid()))
    }

    fn write(&self, state: &CaptureState) -> Result<(), CaptureError> {
        durable::replace(&self.path, serde_json::to_vec_pretty(state).unwrap_or_default())
            .map_err(self.failed("cannot write"))
    }

    fn failed(&self, what: &str) -> impl FnOnce(io::Error) -> CaptureError {
        let what = format!("{what} {}", self.path.display());
        |source| CaptureError::State { what, source }
    }
}

/// The state, and nobody else changes it or the kernel meanwhile.
pub struct Locked {
    pub state: CaptureState,
    file: StateFile,
    _lock: Option<Flock<File>>,
}

impl Locked {
    pub(super) fn port_memory(&self) -> &PortMemory {
        self.file.port_memory()
    }

    pub fn save(&self) -> Result<(), CaptureError> {
        if self._lock.is_none() && !self.file.path.parent().is_some_and(Path::is_dir) {
            // No daemon has run here yet, so there is nobody to tell.
            return Ok(());
        }
        self.file.write(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wanted::tests::wanted;
    use super::*;

    fn state_file() -> (tempfile::TempDir, StateFile) {
        let directory = tempfile::tempdir().unwrap();
        let file = StateFile::new(directory.path());
        (directory, file)
    }

    #[test]
    fn what_is_saved_is_read_again_and_has_another_stamp() {
        let (_directory, file) = state_file();
        assert_eq!(file.read().unwrap(), CaptureState::default());
        let mut locked = file.lock().unwrap();
        locked.state.confirm(wanted());
        locked.save().unwrap();
        let first = file.stamp();
        assert!(file.read().unwrap().is_confirmed(&wanted().hash()));
        locked.state.bypass.switch(None, true, 7);
        locked.save().unwrap();
        assert_ne!(file.stamp(), first);
        assert_eq!(file.read().unwrap().bypass.everybody, Some(7));
    }

    #[test]
    fn the_way_out_needs_no_readable_record() {
        let (_directory, file) = state_file();
        file.lock().unwrap().save().unwrap();
        std::fs::write(&file.path, "{ broken").unwrap();
        let message = file.read().unwrap_err().to_string();
        assert!(message.contains("intercept revert"), "{message}");
        file.lock_at_any_price().save().unwrap();
        assert_eq!(file.read().unwrap(), CaptureState::default());
    }
}
