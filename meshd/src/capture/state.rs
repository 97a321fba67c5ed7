//! What was done to this host's kernel, and what operators decided about it, on disk.
//!
//! The daemon and the command line both write it, so every change happens under a lock, and whoever touches the
//! kernel holds that lock too: the file says what may be in force, and nobody puts back what another has taken away.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::backend::BackendKind;
use super::timer::{BootClock, Timer};
use super::tool::CaptureError;
use super::wanted::{Caller, Wanted};
use crate::enrol::PortMemory;

/// Thousands of strict ports; more is none of ours.
const MAX_SIZE: u64 = 16 << 20;
const SCHEMA: u32 = 1;
/// Plans that do not arm a revert timer again: enough for going back and forth during a rollout.
const CONFIRMED_MAX: usize = 16;
/// Applying rules takes a tenth of a second; whoever holds the lock this long hangs.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// `capture/state.json` in the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CaptureState {
    pub(super) schema: u32,
    /// In the kernel now, unless somebody else removed it: what a revert must undo.
    pub applied: Option<Applied>,
    /// What the configuration asked for when the daemon last put it in force.
    pub intent: Option<Wanted>,
    /// Hashes of confirmed plans, newest last.
    pub confirmed: Vec<String>,
    /// What is gone back to when a plan is not confirmed in time.
    pub last_confirmed: Option<Wanted>,
    pub timer: Option<Timer>,
    pub held: Option<Held>,
    pub reverted: Option<Reverted>,
    pub bypass: Bypass,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub backend: BackendKind,
    pub wanted: Wanted,
}

impl Applied {
    /// Whether applying `target` leaves nothing of it behind; otherwise it must be reverted first.
    pub(super) fn is_replaced_by(&self, backend: BackendKind, target: &Wanted) -> bool {
        let routes = |wanted: &Wanted| (wanted.vip4, wanted.vip6, wanted.table, wanted.mark, wanted.mark_mask);
        self.backend == backend && routes(&self.wanted) == routes(target)
    }
}

/// A plan that was not confirmed in time: not put in force again until an operator says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub hash: String,
    /// Unix time.
    pub since: u64,
    pub why: String,
}

/// All rules were removed on purpose: nobody heals that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reverted {
    /// Unix time.
    pub since: u64,
    pub by_uid: u32,
    pub why: String,
}

/// Whom meshd gets out of the way of, and since when (Unix time).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bypass {
    pub everybody: Option<u64>,
    /// By label: `payments.service`, `uid:1001`.
    pub units: BTreeMap<String, u64>,
}

impl Bypass {
    pub fn is_on(&self) -> bool {
        self.everybody.is_some() || !self.units.is_empty()
    }

    pub fn covers(&self, caller: &Caller) -> bool {
        self.everybody.is_some() || self.units.contains_key(&caller.label())
    }

    /// Everybody is `*`.
    pub fn labels(&self) -> Vec<&str> {
        let everybody = self.everybody.map(|_| "*");
        everybody.into_iter().chain(self.units.keys().map(String::as_str)).collect()
    }

    /// `unit` None: for everybody; switching that off switches it off for each unit, too.
    pub fn switch(&mut self, unit: Option<&str>, on: bool, now: u64) {
        match (unit, on) {
            (None, true) => self.everybody = Some(self.everybody.unwrap_or(now)),
            (None, false) => *self = Bypass::default(),
            (Some(unit), true) => drop(self.units.entry(unit.to_owned()).or_insert(now)),
            (Some(unit), false) => drop(self.units.remove(unit)),
        }
    }
}

impl Default for CaptureState {
    fn default() -> CaptureState {
        CaptureState {
            schema: SCHEMA,
            applied: None,
            intent: None,
            confirmed: Vec::new(),
            last_confirmed: None,
            timer: None,
            held: None,
            reverted: None,
            bypass: Bypass::default(),
        }
    }
}

impl CaptureState {
    /// From now on nobody puts rules in force.
    pub(super) fn forbid(&mut self, why: &str) {
        let known = self.reverted.as_ref().is_some_and(|reverted| reverted.why == why);
        if !known {
            self.reverted = Some(Reverted { since: unix_now(), by_uid: own_uid(), why: why.to_owned() });
        }
        self.timer = None;
    }

    pub fn is_confirmed(&self, hash: &str) -> bool {
        self.confirmed.iter().any(|confirmed| confirmed == hash)
    }

    /// Whether this plan was given up because nobody confirmed it.
    pub fn holds(&self, hash: &str) -> bool {
        self.held.as_ref().is_some_and(|held| held.hash == hash)
    }

    /// Remembers a plan as one that locks nobody out.
    pub fn confirm(&mut self, plan: Wanted) {
        let hash = plan.hash();
        self.confirmed.retain(|confirmed| *confirmed != hash);
        self.confirmed.push(hash);
        let superfluous = self.confirmed.len().saturating_sub(CONFIRMED_MAX);
        self.confirmed.drain(..superfluous);
        self.last_confirmed = Some(plan);
        self.timer = None;
    }

    /// Nobody confirmed the plan in time: back to the last confirmed one, or to no rules at all.
    pub(super) fn hold(&mut self, hash: String, now: u64) {
        let why = format!("plan {hash} was not confirmed in time");
        if self.last_confirmed.is_none() {
            self.reverted = Some(Reverted { since: now, by_uid: own_uid(), why: why.clone() });
        }
        self.held = Some(Held { hash, since: now, why });
        self.timer = None;
    }

    /// Whether the timer has run out on what is in force.
    pub(super) fn give_up_unconfirmed(&mut self, clock: &BootClock) -> bool {
        let Some(timer) = self.timer.take_if(|timer| timer.left(clock).is_none()) else { return false };
        // What is in force now decides, also if it came by a reload while the timer ran.
        let hash = self.intent.as_ref().map_or(timer.hash, Wanted::hash);
        if self.is_confirmed(&hash) {
            return false;
        }
        self.hold(hash, unix_now());
        true
    }
}

pub(super) fn own_uid() -> u32 {
    nix::unistd::getuid().as_raw()
}

pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The state on disk.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
}

/// Tells one version of the file from another, at the price of a stat.
pub(super) type Stamp = (u64, i64, i64);

impl StateFile {
    pub fn new(state_dir: &Path) -> StateFile {
        StateFile { path: state_dir.join("capture/state.json") }
    }

    /// Whose the enrolled ports are is kept beside.
    pub(super) fn port_memory(&self) -> PortMemory {
        PortMemory::new(self.path.parent().and_then(Path::parent).unwrap_or(Path::new(".")))
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
        self.replace(&serde_json::to_vec_pretty(state).unwrap_or_default()).map_err(self.failed("cannot write"))
    }

    /// By rename: a crash leaves the old one or the new one, never half, and who may rename need not own it.
    fn replace(&self, text: &[u8]) -> io::Result<()> {
        let temporary = self.path.with_extension("tmp");
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
        // Whatever the umask says: the other of root and daemon must be able to read it.
        file.set_permissions(Permissions::from_mode(0o644))?;
        file.write_all(text)?;
        file.sync_data()?;
        std::fs::rename(&temporary, &self.path)
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
    pub(super) fn port_memory(&self) -> PortMemory {
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
    fn a_leftover_of_another_users_crash_does_not_stop_a_save() {
        let (_directory, file) = state_file();
        file.lock().unwrap().save().unwrap();
        let temporary = file.path.with_extension("tmp");
        std::fs::write(&temporary, "half").unwrap();
        std::fs::set_permissions(&temporary, Permissions::from_mode(0o400)).unwrap();
        file.lock().unwrap().save().unwrap();
        assert!(!temporary.exists());
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

    #[test]
    fn the_oldest_confirmations_are_forgotten() {
        let mut state = CaptureState::default();
        let plan = |table| Wanted { table, ..wanted() };
        for table in 1..=20 {
            state.confirm(plan(table));
        }
        assert_eq!(state.confirmed.len(), CONFIRMED_MAX);
        assert!(!state.is_confirmed(&plan(4).hash()) && state.is_confirmed(&plan(5).hash()));
        state.confirm(plan(5));
        assert_eq!(state.confirmed.last(), Some(&plan(5).hash()));
    }

    #[test]
    fn time_runs_out_on_what_is_in_force_unless_that_is_confirmed() {
        let over = || Some(Timer::armed("applied".into(), Duration::ZERO, &BootClock::now()));
        let mut state = CaptureState { intent: Some(wanted()), timer: over(), ..CaptureState::default() };
        assert!(state.give_up_unconfirmed(&BootClock::now()));
        assert!(state.holds(&wanted().hash()) && state.reverted.is_some() && state.timer.is_none());
        let mut state = CaptureState { intent: Some(wanted()), ..CaptureState::default() };
        state.confirm(wanted());
        state.timer = over();
        assert!(!state.give_up_unconfirmed(&BootClock::now()) && state.held.is_none());
    }

    #[test]
    fn a_bypass_of_everybody_ends_with_those_of_units() {
        let mut bypass = Bypass::default();
        bypass.switch(Some("payments.service"), true, 1);
        assert!(bypass.covers(&Caller::Unit("payments.service".into())) && !bypass.covers(&Caller::Uid(1001)));
        bypass.switch(None, true, 2);
        assert!(bypass.covers(&Caller::Uid(1001)));
        assert_eq!(bypass.labels(), ["*", "payments.service"]);
        bypass.switch(None, false, 3);
        assert!(!bypass.is_on());
    }
}
