//! The thread that keeps the kernel equal to what is wanted: applies changes, follows units that restart, and
//! puts back what other tools remove. A thread of its own because it runs programs and waits for them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use meshd_sys::kernel_events::KernelEvents;
use tokio::sync::oneshot;

use super::backend::{Backend, BackendKind, PassedOver, can_enforce};
use super::ledger::{Ledger, PublishedBook};
use super::state::{Applied, CaptureState};
use super::tool::CaptureError;
use super::wanted::{Facts, Wanted};

/// How soon a removed rule is noticed; healing must take less than two seconds.
const TICK: Duration = Duration::from_millis(500);

/// What the rest of the daemon asks of the keeper.
enum Command {
    Stop(oneshot::Sender<()>),
    Want(Box<Wanted>, oneshot::Sender<Result<(), CaptureError>>),
    /// Raw addresses to capture from now on.
    RawAddresses(BTreeSet<SocketAddr>, oneshot::Sender<()>),
    /// Reads the kernel's counts now, and keeps them.
    Count(oneshot::Sender<()>),
}

/// Counted for operators.
#[derive(Debug, Default)]
pub struct CaptureCounters {
    /// Times rules or routes were put back after somebody else had removed them.
    pub healed: AtomicU64,
    /// Times they could not be.
    pub heal_failed: AtomicU64,
}

/// How the rest of the daemon speaks to the keeper; the thread ends when the last one is dropped.
#[derive(Clone)]
pub struct KeeperHandle {
    commands: Sender<Command>,
    pub backend: BackendKind,
    pub passed_over: Arc<[PassedOver]>,
    pub counters: Arc<CaptureCounters>,
    /// Who called in clear, as of the last ten seconds.
    pub ledger: PublishedBook,
}

impl KeeperHandle {
    /// Puts `wanted` in force; on an error what was in force before still is.
    pub async fn want(&self, wanted: Wanted) -> Result<(), CaptureError> {
        let (answer, answered) = oneshot::channel();
        let gone = || CaptureError::State {
            what: "the capture thread is gone".into(),
            source: std::io::Error::other("restart meshd; the log says why"),
        };
        self.commands.send(Command::Want(Box::new(wanted), answer)).map_err(|_| gone())?;
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
    state_path: PathBuf,
    state: CaptureState,
    wanted: Option<Wanted>,
    facts: Facts,
    events: KernelEvents,
    counters: Arc<CaptureCounters>,
    ledger: Ledger,
    raw_addresses: BTreeSet<SocketAddr>,
    /// Something may not be as it should: to be looked at.
    suspicious: bool,
}

impl Keeper {
    /// Starts the thread; nothing is applied before the first `want`.
    pub fn start(
        backend: Box<dyn Backend>,
        passed_over: Vec<PassedOver>,
        state_path: PathBuf,
    ) -> Result<KeeperHandle, CaptureError> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| CaptureError::State { what, source }
        };
        let state = CaptureState::load(&state_path)?;
        let ledger = Ledger::open(&state_path)?;
        let events = KernelEvents::open().map_err(failed("cannot follow changes of rules and routes"))?;
        let counters = Arc::new(CaptureCounters::default());
        let (commands, inbox) = channel();
        let handle = KeeperHandle {
            commands,
            backend: backend.kind(),
            passed_over: passed_over.into(),
            counters: counters.clone(),
            ledger: ledger.published(),
        };
        let keeper = Keeper {
            backend,
            state_path,
            state,
            wanted: None,
            facts: Facts::default(),
            events,
            counters,
            ledger,
            raw_addresses: BTreeSet::new(),
            suspicious: false,
        };
        std::thread::Builder::new()
            .name("capture".into())
            .spawn(move || keeper.run(&inbox))
            .map_err(failed("cannot start the capture thread"))?;
        Ok(handle)
    }

    fn run(mut self, inbox: &Receiver<Command>) {
        loop {
            match inbox.recv_timeout(TICK) {
                Ok(Command::Want(wanted, answer)) => {
                    // Whoever asked may have given up; the rules are in force all the same.
                    let _ = answer.send(self.want(*wanted));
                }
                Ok(Command::RawAddresses(addresses, answer)) => {
                    self.raw_addresses = addresses;
                    self.follow_facts();
                    let _ = answer.send(());
                }
                Ok(Command::Count(answer)) => {
                    self.ledger.harvest(self.backend.as_ref());
                    self.ledger.save();
                    let _ = answer.send(());
                }
                Ok(Command::Stop(answer)) => {
                    self.ledger.harvest(self.backend.as_ref());
                    self.ledger.save();
                    drop(self);
                    let _ = answer.send(());
                    return;
                }
                Err(RecvTimeoutError::Timeout) => self.tick(),
                // Rules stay on purpose: see the head of this module.
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn want(&mut self, wanted: Wanted) -> Result<(), CaptureError> {
        can_enforce(self.backend.kind(), &wanted)?;
        self.forget_what_another_configuration_left(&wanted)?;
        self.facts = self.apply_as_it_is(&wanted)?;
        self.wanted = Some(wanted);
        Ok(())
    }

    /// A unit that stops meanwhile takes its cgroup with it, and rules that name it are refused: then once more.
    fn apply_as_it_is(&mut self, wanted: &Wanted) -> Result<Facts, CaptureError> {
        let found = self.facts_for(wanted);
        let Err(error) = self.apply(wanted, &found) else { return Ok(found) };
        let now = self.facts_for(wanted);
        if now == found {
            return Err(error);
        }
        self.apply(wanted, &now)?;
        Ok(now)
    }

    fn apply(&mut self, wanted: &Wanted, facts: &Facts) -> Result<(), CaptureError> {
        // Written first: a crash between the two must leave a record of what may be there.
        self.state.applied = Some(Applied { backend: self.backend.kind(), wanted: wanted.clone() });
        self.state.save(&self.state_path)?;
        // Replacing rules resets what they counted.
        self.ledger.harvest(self.backend.as_ref());
        self.backend.apply(wanted, facts)?;
        self.ledger.harvest(self.backend.as_ref());
        // Our own changes are no news; somebody else's among them would never be noticed.
        self.events.drain();
        self.suspicious = !self.backend.intact(wanted)?;
        Ok(())
    }

    /// An earlier run may have used another backend, table or range; nobody else would remove its rules.
    fn forget_what_another_configuration_left(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        let Some(Applied { backend, wanted: before }) = self.state.applied.take() else { return Ok(()) };
        let routes = |wanted: &Wanted| (wanted.vip4, wanted.vip6, wanted.table, wanted.mark, wanted.mark_mask);
        if backend == self.backend.kind() && routes(&before) == routes(wanted) {
            return Ok(());
        }
        tracing::info!(backend = backend.label(), "removing what an earlier configuration had installed");
        backend.open().revert(&before)
    }

    fn tick(&mut self) {
        self.follow_facts();
        let Some(wanted) = self.wanted.clone() else { return };
        self.suspicious |= self.events.drain() || !self.backend.notified();
        if self.suspicious {
            self.heal(&wanted);
        }
        self.ledger.tick(self.backend.as_ref(), &wanted);
    }

    fn follow_facts(&mut self) {
        let Some(wanted) = self.wanted.clone() else { return };
        let facts = self.facts_for(&wanted);
        if facts != self.facts {
            match self.apply(&wanted, &facts) {
                Ok(()) => self.facts = facts,
                Err(error) => {
                    tracing::error!(%error, "rules do not follow this host's units and services; trying again");
                }
            }
        }
    }

    fn facts_for(&self, wanted: &Wanted) -> Facts {
        Facts { raw_addresses: self.raw_addresses.clone(), ..Facts::find(wanted) }
    }

    fn heal(&mut self, wanted: &Wanted) {
        let healed = match self.backend.intact(wanted) {
            Ok(true) => {
                self.suspicious = false;
                return;
            }
            Ok(false) => self.apply(wanted, &self.facts.clone()),
            Err(error) => Err(error),
        };
        match healed {
            Ok(()) => {
                self.counters.healed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!("another tool had removed or changed meshd's rules or routes; they are back");
            }
            Err(error) => {
                self.counters.heal_failed.fetch_add(1, Ordering::Relaxed);
                tracing::error!(%error, "another tool removed or changed meshd's rules or routes, and they cannot be put back");
            }
        }
    }
}
