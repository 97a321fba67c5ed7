//! The thread that keeps the kernel equal to what is wanted: applies changes, follows units that restart and what
//! operators decide (`state`), and puts back what other tools remove. A thread of its own because it runs programs
//! and waits for them.

mod handle;
mod tell;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::backend::{Backend, PassedOver, can_enforce};
use super::ledger::Ledger;
use super::pace::Pace;
use super::plan::resolve;
use super::state::{Applied, CaptureState};
use super::state_file::{Locked, Stamp, StateFile};
use super::timer::{BootClock, Timer};
use super::tool::CaptureError;
use super::wanted::{Facts, Wanted};
use meshd_sys::kernel_events::KernelEvents;

pub use handle::{KeeperHandle, KeeperView};

use handle::{Command, Shared};
use tell::audit;

/// How soon a removed rule is noticed; healing must take less than two seconds.
const TICK: Duration = Duration::from_millis(500);
/// A revert timer that has not fired by then was killed: the daemon does its work.
const TIMER_GRACE: Duration = Duration::from_secs(5);

pub struct Keeper {
    backend: Box<dyn Backend>,
    file: StateFile,
    /// The version of the state that was followed.
    stamp: Option<Stamp>,
    /// What the configuration says.
    intent: Option<Wanted>,
    /// What is in the kernel; None when nothing is.
    in_force: Option<(Wanted, Facts)>,
    raw_addresses: Arc<BTreeSet<SocketAddr>>,
    ledger: Ledger,
    events: KernelEvents,
    /// Rules or routes may have changed since they were looked at.
    suspicious: bool,
    /// Who changed netfilter rules last.
    suspect: Option<String>,
    pace: Pace,
    /// The last failure told, and when anything was told or reminded of.
    told: Option<(String, Instant)>,
    reminded: Instant,
    shared: Arc<Shared>,
}

impl Keeper {
    /// Starts the thread; nothing is applied before the first `want`.
    pub fn start(
        backend: Box<dyn Backend>,
        passed_over: Vec<PassedOver>,
        file: StateFile,
    ) -> Result<KeeperHandle, CaptureError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| CaptureError::State { what, source }
        };
        begin(&file)?;
        let events = KernelEvents::open().map_err(failed("cannot follow changes of rules and routes"))?;
        let shared = Arc::new(Shared::default());
        let (commands, inbox) = channel();
        let (living, alive) = tokio::sync::watch::channel(());
        let ledger = Ledger::open(file.path())?;
        let handle = KeeperHandle {
            commands,
            backend: backend.kind(),
            passed_over: passed_over.into(),
            shared: shared.clone(),
            ledger: ledger.published(),
            alive,
        };
        let keeper = Keeper {
            backend,
            file,
            stamp: None,
            intent: None,
            in_force: None,
            raw_addresses: Arc::default(),
            ledger,
            events,
            suspicious: false,
            suspect: None,
            pace: Pace::default(),
            told: None,
            reminded: Instant::now(),
            shared,
        };
        std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || {
                // Dropped by a panic, too.
                let _living = living;
                keeper.run(&inbox);
            })
            .map_err(failed("cannot start the capture thread"))?;
        Ok(handle)
    }

    fn run(mut self, inbox: &Receiver<Command>) {
        loop {
            // Whoever asked may have given up; the rules are in force all the same.
            match inbox.recv_timeout(TICK) {
                Ok(Command::Want(wanted, answer)) => drop(answer.send(self.want(*wanted, |_| {}))),
                Ok(Command::Apply(wanted, answer)) => {
                    let hash = wanted.hash();
                    let lift = |state: &mut CaptureState| {
                        state.reverted = None;
                        state.held.take_if(|held| held.hash == hash);
                    };
                    drop(answer.send(self.want(*wanted, lift)));
                }
                Ok(Command::Follow(answer)) => drop(answer.send(self.follow())),
                Ok(Command::RawAddresses(addresses, answer)) => {
                    self.raw_addresses = addresses.into();
                    self.tick(Instant::now());
                    let _ = answer.send(());
                }
                Ok(Command::Count(answer)) => {
                    self.count();
                    let _ = answer.send(());
                }
                Ok(Command::Stop(answer)) => {
                    self.count();
                    drop(self);
                    let _ = answer.send(());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => self.tick(Instant::now()),
                // Rules stay on purpose: see the head of this module.
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn count(&mut self) {
        self.ledger.harvest(self.backend.as_ref());
        self.ledger.save();
    }

    fn facts_for(&self, wanted: &Wanted) -> Facts {
        Facts { raw_addresses: self.raw_addresses.clone(), ..Facts::find(wanted, self.file.port_memory()) }
    }

    /// `lift`: what of the operators' decisions is over.
    fn want(&mut self, mut intent: Wanted, lift: impl FnOnce(&mut CaptureState)) -> Result<(), CaptureError> {
        if !self.backend.records_enrolled() {
            intent.enrolled.clear();
        }
        can_enforce(self.backend.kind(), &intent)?;
        let mut locked = self.file.lock()?;
        let before = locked.state.clone();
        lift(&mut locked.state);
        if let Some(timer) = &mut locked.state.timer {
            timer.hash = intent.hash();
        }
        locked.state.intent = Some(intent.clone());
        if let Err(error) = self.settle(&mut locked, &intent, Look::NotAtAll) {
            locked.state = before;
            locked.save()?;
            return Err(error);
        }
        locked.save()?;
        self.tell_start(&locked.state, &intent);
        self.intent = Some(intent);
        self.remember(&locked);
        Ok(())
    }

    /// Does what somebody else wrote into the state.
    fn follow(&mut self) -> Result<(), CaptureError> {
        let Some(intent) = self.intent.clone() else { return Ok(()) };
        let mut locked = self.file.lock()?;
        self.settle(&mut locked, &intent, Look::NotAtAll)?;
        locked.save()?;
        self.remember(&locked);
        Ok(())
    }

    fn remember(&mut self, locked: &Locked) {
        self.stamp = self.file.stamp();
        let now = (self.intent.as_ref().map(Wanted::hash), locked.state.clone());
        let (plan, before) =
            std::mem::replace(&mut *self.shared.known.lock().unwrap_or_else(PoisonError::into_inner), now);
        if plan.is_some() {
            audit(&before, &locked.state);
        }
    }

    /// Makes the kernel equal to what the configuration and operators say. All writing goes through here, under
    /// the lock: what an operator has just taken away is never put back.
    fn settle(&mut self, locked: &mut Locked, intent: &Wanted, look: Look) -> Result<Settled, CaptureError> {
        let Some(target) = resolve(intent, &locked.state) else { return self.remove(locked) };
        let mut facts = self.facts_for(&target);
        let unchanged = self.in_force.as_ref().is_some_and(|(wanted, known)| *wanted == target && *known == facts);
        // Rules about units that have ended read differently, so only of those that should be as they were is it known.
        let removed = look == Look::InTheKernel && unchanged && !self.backend.intact(&target)?;
        if unchanged && !removed && locked.state.applied.is_some() {
            return Ok(Settled::WasInForce);
        }
        // What was changed since the last tick: below, it would pass for our own.
        self.hear();
        let replaced = self.forget_what_another_configuration_left(locked, &target)?;
        // Written first: a crash between the two must leave a record of what may be there.
        let record = Applied { backend: self.backend.kind(), wanted: target.clone() };
        let known = locked.state.applied.as_ref() == Some(&record);
        let before = locked.state.applied.replace(record);
        if !known {
            // Not for what is on record: rules must come back also when the disk is full.
            locked.save()?;
        }
        // Replacing rules resets what they counted.
        self.ledger.harvest(self.backend.as_ref());
        let mut applied = self.backend.apply(&target, &facts);
        let later = self.facts_for(&target);
        if applied.is_err() && later != facts {
            // A unit ended in between, and its cgroup with it.
            facts = later;
            applied = self.backend.apply(&target, &facts);
        }
        if let Err(error) = applied {
            locked.state.applied = before;
            self.restore(locked, replaced);
            return Err(error);
        }
        self.ledger.expect_new_rules();
        // Our own changes are no news, but somebody else's may hide among them.
        self.events.drain();
        self.suspicious = true;
        self.in_force = Some((target, facts));
        Ok(if removed { Settled::PutBack } else { Settled::PutInForce })
    }

    /// Another run, or another plan, may have used another backend, table or range: nobody else would remove its
    /// rules. What was removed is returned, to be put back if nothing can take its place.
    fn forget_what_another_configuration_left(
        &mut self,
        locked: &mut Locked,
        target: &Wanted,
    ) -> Result<Option<Applied>, CaptureError> {
        let Some(applied) = &locked.state.applied else { return Ok(None) };
        if applied.is_replaced_by(self.backend.kind(), target) {
            return Ok(None);
        }
        tracing::info!(backend = applied.backend.label(), "removing what an earlier configuration had installed");
        self.revert(&applied.clone())?;
        let replaced = locked.state.applied.take();
        self.in_force = None;
        locked.save()?;
        Ok(replaced)
    }

    /// Strict ports must not be left open because the new rules were refused.
    fn restore(&mut self, locked: &mut Locked, replaced: Option<Applied>) {
        let Some(applied) = replaced else { return };
        let facts = self.facts_for(&applied.wanted);
        let restored = match applied.backend == self.backend.kind() {
            true => self.backend.apply(&applied.wanted, &facts),
            false => applied.backend.open().apply(&applied.wanted, &facts),
        };
        match restored {
            Ok(()) => locked.state.applied = Some(applied),
            Err(error) => tracing::error!(%error, "the rules of the earlier configuration cannot be put back"),
        }
    }

    /// Our own backend may hold what it made; another one's rules are a stranger's.
    fn revert(&mut self, applied: &Applied) -> Result<(), CaptureError> {
        match applied.backend == self.backend.kind() {
            true => self.backend.revert(&applied.wanted),
            false => applied.backend.open().revert(&applied.wanted),
        }
    }

    fn remove(&mut self, locked: &mut Locked) -> Result<Settled, CaptureError> {
        let ours = self.in_force.take().map(|(wanted, _)| Applied { backend: self.backend.kind(), wanted });
        let recorded = locked.state.applied.take();
        let Some(applied) = ours.or(recorded) else { return Ok(Settled::WasInForce) };
        self.revert(&applied)?;
        Ok(Settled::Removed)
    }

    fn tick(&mut self, now: Instant) {
        let Some(intent) = self.intent.clone() else { return };
        if self.stamp != self.file.stamp()
            && self.pace.due_for_news(now)
            && let Err(error) = self.follow()
        {
            self.pace.looked(now, true);
            self.tell_failure(now, "what operators decided is not in force", &error);
        }
        self.hear();
        self.suspicious |= !self.backend.notified();
        let moved = self.in_force.as_ref().is_some_and(|(wanted, facts)| *facts != self.facts_for(wanted));
        if moved && self.pace.due_for_news(now) || self.suspicious && self.pace.due(now) {
            self.look(now, &intent);
        }
        if let Some((wanted, _)) = &self.in_force {
            self.ledger.tick(self.backend.as_ref(), wanted);
        }
        self.stand_in_for_the_timer(now);
        self.remind(now);
    }

    fn hear(&mut self) {
        let news = self.events.drain();
        self.suspicious |= news.any;
        self.suspect = news.by.or(self.suspect.take());
    }

    fn look(&mut self, now: Instant, intent: &Wanted) {
        let settled = self.file.lock().and_then(|mut locked| {
            let settled = self.settle(&mut locked, intent, Look::InTheKernel)?;
            if settled != Settled::WasInForce {
                locked.save()?;
                self.remember(&locked);
            }
            Ok(settled)
        });
        self.pace.looked(now, settled.is_err());
        match settled {
            Ok(Settled::WasInForce | Settled::Removed) => (self.suspicious, self.told) = (false, None),
            Ok(Settled::PutInForce) => {}
            Ok(Settled::PutBack) => self.count_heal(now),
            // Suspicious still: tried again at the next look.
            Err(error) => {
                self.suspicious = true;
                self.shared.heal_failed.fetch_add(1, Ordering::Relaxed);
                self.tell_failure(now, "rules or routes are not what they should be; trying again", &error);
            }
        }
        self.shared.fighting.store(self.pace.fighting(now), Ordering::Relaxed);
    }

    fn count_heal(&mut self, now: Instant) {
        const NAMELESS: &str = "somebody the kernel does not name";
        let by = self.suspect.take();
        self.shared.healed.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            by = by.as_deref().unwrap_or(NAMELESS),
            "another tool had removed or changed meshd's rules or routes; they are back"
        );
        self.pace.healed(now, by);
        if self.pace.fighting(now) {
            let by = self.pace.opponent(now).unwrap_or(NAMELESS);
            tracing::error!(
                by,
                "meshd's rules or routes are removed again and again; putting them back every 30 s only. Look for \
                 what reloads a whole ruleset (nftables.service, firewalld, ufw, a timer or playbook running \
                 `nft flush ruleset`) or routes (networkd with ManageForeignRoutingPolicyRules=yes), and have it \
                 leave `table inet meshd` and its routing table alone"
            );
        }
    }

    /// Its process may have been killed; an unconfirmed plan must not stay for that.
    fn stand_in_for_the_timer(&mut self, now: Instant) {
        let overdue = |timer: &Timer| timer.overdue(&BootClock::now()).is_some_and(|late| late > TIMER_GRACE);
        let known = self.shared.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.1.timer.as_ref().is_some_and(overdue) {
            return;
        }
        drop(known);
        let expired = self.file.lock().and_then(|mut locked| {
            locked.state.give_up_unconfirmed(&BootClock::now());
            locked.save()
        });
        if let Err(error) = expired.and_then(|()| self.follow()) {
            self.tell_failure(now, "an unconfirmed plan cannot be taken back", &error);
        }
    }
}

/// Whether the kernel is asked if what was put in force still is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    NotAtAll,
    InTheKernel,
}

/// What was done to the kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settled {
    WasInForce,
    PutInForce,
    /// Somebody else had removed it.
    PutBack,
    Removed,
}

/// A start ends a revert, and gives up what a reboot kept from being confirmed.
fn begin(file: &StateFile) -> Result<(), CaptureError> {
    let mut locked = file.lock()?;
    let clock = BootClock::now();
    locked.state.give_up_unconfirmed(&clock);
    locked.state.reverted = None;
    locked.save()
}
