//! Keeps mirror and backups up to date, and uses them when the database has gone back in time.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::backups::{Backups, stamp};
use super::heal::heal;
use super::mirror::{Mirror, MirrorFile};
use super::restored::Restored;
use super::roster::Roster;
use crate::audit::Event;
use crate::metrics::Metrics;
use crate::pki::{Pki, PkiError};
use crate::rotation::step::Rotator;
use crate::state_dir::{StateDir, StateError};
use crate::store::etcd::config::EtcdConfig;
use crate::store::trust;
use crate::times::{rfc3339, seconds, unix};

const BACKUP_EVERY: Duration = Duration::from_secs(3600);

pub(crate) struct Keeper {
    backups: Backups,
    mirror: MirrorFile,
    /// A backup failed; it is tried again.
    owed: AtomicBool,
    restored: Mutex<Option<Restored>>,
    /// The highest sequence of a host that was told of.
    told_of: AtomicU64,
    /// What is forgotten because it ended so long ago is not missed.
    hold_s: i64,
}

/// Before the database is opened: replaces a damaged one.
pub(crate) fn heal_state(dir: &Path, now: SystemTime) -> Result<Option<Event>, StateError> {
    if EtcdConfig::read(dir)?.is_some() {
        return Ok(None);
    }
    let Some(restored) = heal(dir, now)? else { return Ok(None) };
    let detail = restored.problem();
    tracing::error!(alarm = detail, "the database was damaged; the newest good backup took its place");
    Ok(Some(Event { event: "restore", result: "alarm", detail: Some(detail), ..Event::default() }))
}

impl Keeper {
    /// Gives a database that went back in time what it has forgotten, and hosts a bundle newer than any they have.
    pub(crate) fn open(state: &StateDir, rotator: &Rotator<'_>) -> Result<Keeper, PkiError> {
        let dir = state.dir();
        let mut restored = Restored::read(dir);
        let keeper = Keeper {
            backups: Backups::new(dir),
            mirror: MirrorFile::new(dir),
            owed: AtomicBool::default(),
            told_of: AtomicU64::default(),
            restored: Mutex::default(),
            hold_s: seconds(rotator.lifetimes.hold),
        };
        if let Some(mirror) = keeper.mirror.read() {
            keeper.remind(state, &mirror, rotator.now)?;
        }
        if let Some(restored) = restored.as_mut().filter(|restored| !restored.published)
            && let floor = keeper.mirror.read().map_or(0, |mirror| mirror.sequence())
            && republish(state, rotator, floor)?
        {
            restored.published = true;
            restored.write(dir).map_err(|source| StateError::Io { action: "write", path: dir.to_owned(), source })?;
        }
        *keeper.restored.lock().unwrap_or_else(PoisonError::into_inner) = restored;
        Ok(keeper)
    }

    fn remind(&self, state: &StateDir, mirror: &Mirror, now: SystemTime) -> Result<(), PkiError> {
        let keep_after = unix(now) - self.hold_s;
        let missing = |view: &mut dyn crate::store::View| mirror.is_remembered(view, keep_after);
        if state.database.read(missing).map_err(StateError::from)? {
            return Ok(());
        }
        let remind = |records: &mut dyn crate::store::Records| mirror.remind(records, keep_after);
        if state.database.lead(remind).map_err(StateError::from)?.is_none() {
            return Ok(());
        }
        let detail =
            format!("the database was older than {}; authorities were taken from there", self.mirror.path().display());
        tracing::error!(alarm = detail, "the database went back in time");
        state.record(
            now,
            &[Event { event: "authority_recall", result: "alarm", detail: Some(detail), ..Event::default() }],
        )?;
        Ok(())
    }

    /// Called every few seconds. A failure is an alarm and stops nothing.
    pub(crate) fn keep(&self, state: &StateDir, metrics: &Metrics, now: SystemTime) {
        if let Err(error) = self.try_keep(state, metrics, now) {
            self.owed.store(true, Ordering::Relaxed);
            metrics.backup_failures.inc();
            tracing::error!(%error, "no backup could be made");
        }
        let restored = self.restored.lock().unwrap_or_else(PoisonError::into_inner);
        metrics.restored.set(restored.as_ref().map_or(0, |restored| restored.at));
    }

    fn try_keep(&self, state: &StateDir, metrics: &Metrics, now: SystemTime) -> anyhow::Result<()> {
        let current = state.database.read(Mirror::of)?;
        if let Some(known) = self.mirror.read().filter(|known| known.sequence() > current.sequence()) {
            // etcd went back in time under a running server.
            return Ok(self.remind(state, &known, now)?);
        }
        let stepped = self.mirror.write(&current)?;
        state.database.read(|view| Roster::of(view, &state.trust_domain))?.write(state.dir())?;
        let newest = self.backups.list()?.into_iter().next().map(|backup| backup.name());
        let is_recent = |name: String| (stamp(now - BACKUP_EVERY)..=stamp(now)).contains(&name);
        if stepped || self.owed.load(Ordering::Relaxed) || !newest.is_some_and(is_recent) {
            self.backups.create(&state.database, now)?;
            self.owed.store(false, Ordering::Relaxed);
            metrics.backup.set(unix(now));
        }
        Ok(())
    }

    fn is_recently_restored(&self, now: SystemTime) -> bool {
        let restored = self.restored.lock().unwrap_or_else(PoisonError::into_inner);
        restored.as_ref().is_some_and(|restored| restored.is_recent(unix(now)))
    }
}

impl Pki {
    /// A host told which bundle it has. A newer one than the PKI's means that the database is from before it: then hosts
    /// would refuse what the PKI publishes, so it publishes above what they have.
    pub(crate) fn heard_of_bundle(&self, host: &str, sequence: u64) {
        if sequence <= self.signer().bundle.sequence || sequence <= self.keeper.told_of.load(Ordering::Relaxed) {
            return;
        }
        // Another replica may have published it a moment ago.
        let known = self.state.database.read(trust::trust).map_or(u64::MAX, |trust| trust.sequence);
        // A sequence is a time: one from the future is a lie, or a clock to look after first.
        let latest = self.now_ms() + u64::try_from(self.lifetimes.skew.as_millis()).unwrap_or(u64::MAX);
        if sequence <= known || sequence > latest {
            return;
        }
        self.keeper.told_of.store(sequence, Ordering::Relaxed);
        self.metrics.hosts_ahead.inc();
        if !self.keeper.is_recently_restored(self.now()) {
            tracing::error!(
                host,
                sequence,
                known,
                "a host has a newer bundle than the PKI; if a backup was put in \
                 place by hand, do it with `meshd-pki restore`"
            );
            return;
        }
        tracing::warn!(host, sequence, known, "a host has a newer bundle than the backup; publishing above it");
        let rotator = self.rotator();
        if let Err(error) = republish(&self.state, &rotator, sequence) {
            tracing::error!(%error, "the bundle could not be published above what hosts have");
        }
    }
}

/// The same bundle under a higher sequence. The leader does it; whether this is the leader.
fn republish(state: &StateDir, rotator: &Rotator<'_>, above: u64) -> Result<bool, PkiError> {
    let Some(event) = state.database.lead(|records| rotator.republish(records, above))? else { return Ok(false) };
    tracing::warn!(detail = event.detail, at = rfc3339(unix(rotator.now)), "the bundle was published anew");
    if let Err(error) = state.record(rotator.now, &[event]) {
        tracing::error!(%error, "a bundle was published anew but this is not in the audit log");
    }
    Ok(true)
}
