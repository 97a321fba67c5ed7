//! Keeps mirror and backups up to date, and uses them when the database has gone back in time.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;

use super::backups::{Backups, stamp};
use super::heal::heal;
use super::mirror::{Mirror, MirrorFile};
use super::restored::Restored;
use super::roster::{self, Roster};
use crate::audit::Event;
use crate::metrics::Metrics;
use crate::pki::{Pki, PkiError};
use crate::rotation::step::Rotator;
use crate::state_dir::{StateDir, StateError};
use crate::store::etcd::config::EtcdConfig;
use crate::store::hosts::HostState;
use crate::store::{deny, trust};
use crate::times::{from_unix, rfc3339, seconds, unix, unix_ms};

const BACKUP_EVERY: Duration = Duration::from_secs(3600);
/// What failed for want of space, or for a damaged record, fails again for a while.
const TRY_AGAIN: Duration = Duration::from_secs(300);

pub(crate) struct Keeper {
    backups: Backups,
    mirror: MirrorFile,
    /// A backup is due, whatever the hour.
    owed: AtomicBool,
    last: Mutex<Last>,
    shut_out: Mutex<Option<ShutOut>>,
    restored: Mutex<Option<Restored>>,
    /// The highest sequence of a host that was told of.
    told_of: AtomicU64,
    /// What is forgotten because it ended so long ago is not missed.
    hold_s: i64,
}

/// When backups were made and tried, by time since boot: the clock may be put right in between.
#[derive(Debug, Default, Clone, Copy)]
struct Last {
    made: Option<Duration>,
    failed: Option<Duration>,
}

/// A backup from before somebody was shut out would let them in again.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ShutOut {
    /// The sequence of the deny set.
    deny: u64,
    hosts: Vec<(String, HostState)>,
}

/// When it is: by the clock, and since boot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) now: SystemTime,
    pub(crate) boot: Duration,
    pub(crate) clock_is_right: bool,
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
        let keeper = Keeper {
            backups: Backups::new(dir),
            mirror: MirrorFile::new(dir),
            owed: AtomicBool::default(),
            last: Mutex::default(),
            shut_out: Mutex::default(),
            told_of: AtomicU64::default(),
            restored: Mutex::new(Restored::read(dir)),
            hold_s: seconds(rotator.lifetimes.hold),
        };
        if let Some(mirror) = keeper.mirror.read() {
            keeper.remind(state, &mirror, rotator.now)?;
        }
        keeper.publish_anew(state, rotator)?;
        Ok(keeper)
    }

    /// Once after a restore; the server that leads does it, which may be this one only later.
    fn publish_anew(&self, state: &StateDir, rotator: &Rotator<'_>) -> Result<(), PkiError> {
        let mut restored = self.lock_restored();
        if let Some(restored) = restored.as_mut().filter(|restored| !restored.published)
            && let floor = self.mirror.read().map_or(0, |mirror| mirror.sequence())
            && republish(state, rotator, floor)?
        {
            restored.published = true;
            let path = state.dir().to_owned();
            restored.write(&path).map_err(|source| StateError::Io { action: "write", path, source })?;
        }
        Ok(())
    }

    fn lock_restored(&self) -> MutexGuard<'_, Option<Restored>> {
        self.restored.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub(crate) fn keep(&self, state: &StateDir, rotator: &Rotator<'_>, metrics: &Metrics, moment: Moment) {
        if let Err(error) = self.publish_anew(state, rotator) {
            tracing::error!(%error, "the bundle could not be published anew after a restore");
        }
        if let Err(error) = self.try_keep(state, metrics, moment) {
            self.owed.store(true, Ordering::Relaxed);
            self.lock_last().failed = Some(moment.boot);
            metrics.backup_failures.inc();
            tracing::error!(error = format!("{error:#}"), "backup, list of hosts or authorities cannot be kept");
        }
        metrics.restored.set(self.lock_restored().as_ref().map_or(0, |restored| restored.at));
    }

    fn try_keep(&self, state: &StateDir, metrics: &Metrics, moment: Moment) -> anyhow::Result<()> {
        let now = moment.now;
        let current = state.database.read(Mirror::of)?;
        if let Some(known) = self.mirror.read().filter(|known| known.sequence() > current.sequence()) {
            // etcd went back in time under a running server.
            return Ok(self.remind(state, &known, now)?);
        }
        let cannot_write = |path: &Path| format!("cannot write {}; is there room?", path.display());
        let stepped = self.mirror.write(&current).with_context(|| cannot_write(self.mirror.path()))?;
        let roster = state.database.read(|view| Roster::of(view, &state.trust_domain))?;
        roster.write(state.dir(), now).with_context(|| cannot_write(&state.dir().join(roster::FILE)))?;
        let shut_out = ShutOut { deny: state.database.read(deny::deny)?.sequence, hosts: roster.shut_out() };
        let known = self.shut_out.lock().unwrap_or_else(PoisonError::into_inner).replace(shut_out.clone());
        if stepped || known.is_some_and(|known| known != shut_out) {
            self.owed.store(true, Ordering::Relaxed);
        }
        // What is in memory may be a backup of long ago: a copy of it is no newer.
        if state.database.engine().is_current() && self.is_due(moment)? {
            self.backups.create(&state.database, now, moment.clock_is_right)?;
            *self.lock_last() = Last { made: Some(moment.boot), failed: None };
            self.owed.store(false, Ordering::Relaxed);
            metrics.backup.set(unix(now));
        }
        Ok(())
    }

    fn lock_last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_due(&self, moment: Moment) -> anyhow::Result<bool> {
        let Moment { now, boot, .. } = moment;
        let last = *self.lock_last();
        if last.failed.is_some_and(|at| boot < at + TRY_AGAIN) {
            return Ok(false);
        }
        if self.owed.load(Ordering::Relaxed) {
            return Ok(true);
        }
        if let Some(made) = last.made {
            return Ok(boot >= made + BACKUP_EVERY);
        }
        let newest = self.backups.by_age(now)?.into_iter().next().map(|backup| backup.name());
        let is_recent = |name: String| (stamp(now - BACKUP_EVERY)..=stamp(now)).contains(&name);
        Ok(!newest.is_some_and(is_recent))
    }

    fn recently_restored_at(&self, now: SystemTime) -> Option<i64> {
        self.lock_restored().as_ref().filter(|restored| restored.is_recent(unix(now))).map(|restored| restored.at)
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
        // A sequence is a time: one from the future is a lie, or a clock to look after first. So is one from after a
        // restore that this PKI did not publish.
        let restored_at = self.keeper.recently_restored_at(self.now());
        let latest = unix_ms(restored_at.map_or(self.now(), from_unix) + self.lifetimes.skew);
        if sequence <= known || sequence > latest {
            return;
        }
        let told = || {
            self.keeper.told_of.store(sequence, Ordering::Relaxed);
            self.metrics.hosts_ahead.inc();
        };
        if restored_at.is_none() {
            told();
            tracing::error!(
                host,
                sequence,
                known,
                "a host has a newer bundle than the PKI; if a backup was put in \
                 place by hand, do it with `meshd-pki restore`"
            );
            return;
        }
        match republish(&self.state, &self.rotator(), sequence) {
            Ok(true) => {
                told();
                tracing::warn!(host, sequence, known, "a host had a newer bundle than the backup");
            }
            // Another leads: a host tells that one, or this one again.
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "the bundle could not be published above what hosts have"),
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
