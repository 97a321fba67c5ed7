//! The thread that keeps the kernel equal to what is wanted: applies changes, follows units that restart and what
//! operators decide (`state`), and puts back what other tools remove. A thread of its own because it runs programs
//! and waits for them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use meshd_sys::kernel_events::KernelEvents;
use tokio::sync::oneshot;

use super::backend::{Backend, BackendKind, PassedOver, can_enforce};
use super::ledger::{Ledger, PublishedBook};
use super::pace::Pace;
use super::plan::resolve;
use super::state::{Applied, CaptureState};
use super::state_file::{Locked, Stamp, StateFile};
use super::timer::BootClock;
use super::tool::CaptureError;
use super::wanted::{Facts, Wanted};

/// How soon a removed rule is noticed; healing must take less than two seconds.
const TICK: Duration = Duration::from_millis(500);
/// A revert timer that has not fired by then was killed: the daemon does its work.
const TIMER_GRACE: Duration = Duration::from_secs(5);
/// What an operator may have forgotten is said again.
const REMINDER: Duration = Duration::from_secs(3600);

type Answer = oneshot::Sender<Result<(), CaptureError>>;

/// What the rest of the daemon asks of the keeper.
enum Command {
    /// Put what the configuration says in force, as far as operators let it.
    Want(Box<Wanted>, Answer),
    /// The same by order of an operator: what was held or reverted before is over.
    Apply(Box<Wanted>, Answer),
    /// The state on disk has changed.
    Follow(Answer),
    /// Raw addresses to capture from now on.
    RawAddresses(BTreeSet<SocketAddr>, oneshot::Sender<()>),
    /// Read the kernel's counts now, and keep them.
    Count(oneshot::Sender<()>),
    /// End the thread.
    Stop(oneshot::Sender<()>),
}

/// Counted and shown for operators.
#[derive(Debug, Default)]
struct Shared {
    healed: AtomicU64,
    heal_failed: AtomicU64,
    fighting: AtomicBool,
    /// What was last known of the state on disk, and the plan's hash.
    known: Mutex<(Option<String>, CaptureState)>,
}

/// What the daemon knows of capture.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct KeeperView {
    pub backend: BackendKind,
    pub passed_over: Vec<PassedOver>,
    /// The plan of the configuration the daemon runs with.
    pub plan: Option<String>,
    /// Times rules or routes were put back after somebody else had removed them.
    pub healed: u64,
    /// Times they could not be.
    pub heal_failed: u64,
    /// Somebody removes them again and again.
    pub fighting: bool,
    /// The plan was not confirmed in time, so another one is in force.
    pub held: bool,
    pub reverted: bool,
    /// Whom meshd is out of the way of; `*` for everybody.
    pub bypass: Vec<String>,
}

/// How the rest of the daemon speaks to the keeper; the thread ends when the last one is dropped.
#[derive(Clone)]
pub struct KeeperHandle {
    commands: Sender<Command>,
    pub backend: BackendKind,
    passed_over: Arc<[PassedOver]>,
    shared: Arc<Shared>,
    /// Who called in clear, as of the last ten seconds.
    pub ledger: PublishedBook,
}

impl KeeperHandle {
    /// Puts `wanted` in force, as far as operators let it; on an error what was in force before still is.
    pub async fn want(&self, wanted: Wanted) -> Result<(), CaptureError> {
        self.ask(|answer| Command::Want(Box::new(wanted), answer)).await
    }

    /// The same by order: an operator wants it in force although it was held or everything was reverted.
    pub async fn apply(&self, wanted: Wanted) -> Result<(), CaptureError> {
        self.ask(|answer| Command::Apply(Box::new(wanted), answer)).await
    }

    /// Does at once what the state on disk says; answered when it is in force.
    pub async fn follow(&self) -> Result<(), CaptureError> {
        self.ask(Command::Follow).await
    }

    async fn ask(&self, command: impl FnOnce(Answer) -> Command) -> Result<(), CaptureError> {
        let (answer, answered) = oneshot::channel();
        let gone = || CaptureError::State {
            what: "the capture thread is gone".into(),
            source: std::io::Error::other("restart meshd; the log says why"),
        };
        self.commands.send(command(answer)).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Captures these raw addresses and no others; connections that are open stay as they are. Returns when that is
    /// in force, or when it failed, which is logged and tried again.
    pub async fn raw_addresses(&self, addresses: BTreeSet<SocketAddr>) {
        let (answer, answered) = oneshot::channel();
        // Without a keeper nothing is captured any more.
        if self.commands.send(Command::RawAddresses(addresses, answer)).is_ok() {
            let _ = answered.await;
        }
    }

    /// Brings `ledger` up to date, in memory and on disk.
    pub async fn count(&self) {
        let (answer, answered) = oneshot::channel();
        // A keeper that is gone counts no more: what it counted last stands.
        if self.commands.send(Command::Count(answer)).is_ok() {
            let _ = answered.await;
        }
    }

    pub fn view(&self) -> KeeperView {
        let (plan, state) = self.shared.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        KeeperView {
            backend: self.backend,
            passed_over: self.passed_over.to_vec(),
            healed: self.shared.healed.load(Ordering::Relaxed),
            heal_failed: self.shared.heal_failed.load(Ordering::Relaxed),
            fighting: self.shared.fighting.load(Ordering::Relaxed),
            held: plan.as_ref().is_some_and(|hash| state.holds(hash)),
            reverted: state.reverted.is_some(),
            bypass: state.bypass.labels().into_iter().map(str::to_owned).collect(),
            plan,
        }
    }

    /// Ends the thread and the backend's own work, after what is on its way has been passed on. Rules stay.
    pub async fn stop(&self) {
        let (answer, answered) = oneshot::channel();
        if self.commands.send(Command::Stop(answer)).is_ok() {
            // A thread that panicked has stopped, too.
            let _ = answered.await;
        }
    }
}

pub struct Keeper {
    backend: Box<dyn Backend>,
    file: StateFile,
    /// The version of the state that was followed.
    stamp: Option<Stamp>,
    /// What the configuration says.
    intent: Option<Wanted>,
    /// What is in the kernel; None when nothing is.
    in_force: Option<(Wanted, Facts)>,
    raw_addresses: BTreeSet<SocketAddr>,
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
        let ledger = Ledger::open(file.path())?;
        let handle = KeeperHandle {
            commands,
            backend: backend.kind(),
            passed_over: passed_over.into(),
            shared: shared.clone(),
            ledger: ledger.published(),
        };
        let keeper = Keeper {
            backend,
            file,
            stamp: None,
            intent: None,
            in_force: None,
            raw_addresses: BTreeSet::new(),
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
            .spawn(move || keeper.run(&inbox))
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
                    self.raw_addresses = addresses;
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
        Facts { raw_addresses: self.raw_addresses.clone(), ..Facts::find(wanted, &self.file.port_memory()) }
    }

    /// `lift`: what of the operators' decisions is over.
    fn want(&mut self, intent: Wanted, lift: impl FnOnce(&mut CaptureState)) -> Result<(), CaptureError> {
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
            && let Err(error) = self.follow()
        {
            self.tell_failure(now, "what operators decided is not in force", &error);
        }
        let news = self.events.drain();
        self.suspicious |= news.any || !self.backend.notified();
        self.suspect = news.by.or(self.suspect.take());
        let moved = self.in_force.as_ref().is_some_and(|(wanted, facts)| *facts != self.facts_for(wanted));
        if moved || self.suspicious && self.pace.due(now) {
            self.look(now, &intent);
        }
        if let Some((wanted, _)) = &self.in_force {
            self.ledger.tick(self.backend.as_ref(), wanted);
        }
        self.stand_in_for_the_timer(now);
        self.remind(now);
    }

    fn look(&mut self, now: Instant, intent: &Wanted) {
        self.pace.looked(now);
        let settled = self.file.lock().and_then(|mut locked| {
            let settled = self.settle(&mut locked, intent, Look::InTheKernel)?;
            if settled != Settled::WasInForce {
                locked.save()?;
                self.remember(&locked);
            }
            Ok(settled)
        });
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
        self.pace.healed(now);
        self.shared.healed.fetch_add(1, Ordering::Relaxed);
        let by = self.suspect.take().unwrap_or_else(|| "somebody the kernel does not name".into());
        tracing::warn!(by, "another tool had removed or changed meshd's rules or routes; they are back");
        if self.pace.fighting(now) {
            tracing::error!(
                by,
                "meshd's rules or routes are removed again and again; putting them back every 30 s only. Look for \
                 what reloads a whole ruleset (nftables.service, firewalld, ufw, a timer or playbook running \
                 `nft flush ruleset`) or routes (networkd with ManageForeignRoutingPolicyRules=yes), and have it \
                 leave `table inet meshd` and its routing table alone"
            );
        }
    }

    /// The same failure is told once a minute, not every second.
    fn tell_failure(&mut self, now: Instant, what: &str, error: &CaptureError) {
        let text = error.to_string();
        let minute = Duration::from_secs(60);
        if self.told.as_ref().is_some_and(|(told, at)| *told == text && now.duration_since(*at) < minute) {
            return;
        }
        tracing::error!(error = text, "{what}");
        self.told = Some((text, now));
    }

    /// Its process may have been killed; an unconfirmed plan must not stay for that.
    fn stand_in_for_the_timer(&mut self, now: Instant) {
        let clock = BootClock::now();
        let overdue = |state: &CaptureState| {
            state.timer.as_ref().is_some_and(|timer| timer.overdue(&clock).is_some_and(|late| late > TIMER_GRACE))
        };
        if !overdue(&self.shared.known.lock().unwrap_or_else(PoisonError::into_inner).1) {
            return;
        }
        let expired = self.file.lock().and_then(|mut locked| {
            locked.state.give_up_unconfirmed(&clock);
            locked.save()
        });
        if let Err(error) = expired.and_then(|()| self.follow()) {
            self.tell_failure(now, "an unconfirmed plan cannot be taken back", &error);
        }
    }

    /// What is not as the configuration says is said at start, and after every reload.
    fn tell_start(&mut self, state: &CaptureState, intent: &Wanted) {
        self.reminded = Instant::now();
        if let Some(reverted) = &state.reverted {
            tracing::warn!(
                since = reverted.since,
                why = reverted.why,
                "rules stay removed until `meshd intercept apply`"
            );
        } else if let Some(held) = state.held.as_ref().filter(|held| held.hash == intent.hash()) {
            let instead = if state.last_confirmed.is_some() { "the last confirmed plan" } else { "only virtual IPs" };
            tracing::error!(
                plan = held.hash,
                why = held.why,
                "the configured plan is held back, {instead} in force instead; change enrol.d, or run `meshd \
                 intercept apply` and then `meshd intercept confirm`"
            );
        }
        tell_bypass(state);
    }

    fn remind(&mut self, now: Instant) {
        if now.duration_since(self.reminded) >= REMINDER {
            self.reminded = now;
            tell_bypass(&self.shared.known.lock().unwrap_or_else(PoisonError::into_inner).1);
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

/// What operators did, for the record.
fn audit(before: &CaptureState, now: &CaptureState) {
    if let Some(reverted) = now.reverted.as_ref().filter(|_| before.reverted != now.reverted) {
        let (uid, why) = (reverted.by_uid, &reverted.why);
        tracing::warn!(target: "audit", uid, why, "rules and routes were removed; `meshd intercept apply` puts them back");
    }
    if let Some(held) = now.held.as_ref().filter(|_| before.held != now.held) {
        tracing::warn!(target: "audit", plan = held.hash, why = held.why, "plan taken back");
    }
    if let Some(plan) = now.confirmed.last().filter(|_| before.confirmed != now.confirmed) {
        tracing::info!(target: "audit", plan, "plan confirmed");
    }
    if before.bypass != now.bypass {
        tracing::warn!(target: "audit", bypass = now.bypass.labels().join(" "), "bypass changed");
    }
}

fn tell_bypass(state: &CaptureState) {
    if state.bypass.is_on() {
        tracing::warn!(
            bypassed = state.bypass.labels().join(" "),
            "meshd is out of the way: strict ports take plaintext, raw addresses go direct; end it with `meshd bypass off`"
        );
    }
}
