//! What the rest of the daemon asks of the keeper, and what it sees of it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{oneshot, watch};

use super::super::backend::{BackendKind, PassedOver};
use super::super::ledger::PublishedBook;
use super::super::state::CaptureState;
use super::super::tool::CaptureError;
use super::super::wanted::Wanted;

pub(super) type Answer = oneshot::Sender<Result<(), CaptureError>>;

/// What the rest of the daemon asks of the keeper.
pub(super) enum Command {
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
pub(super) struct Shared {
    pub healed: AtomicU64,
    pub heal_failed: AtomicU64,
    pub fighting: AtomicBool,
    /// What was last known of the state on disk, and the plan's hash.
    pub known: Mutex<(Option<String>, CaptureState)>,
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
    pub(super) commands: Sender<Command>,
    pub backend: BackendKind,
    pub(super) passed_over: Arc<[PassedOver]>,
    pub(super) shared: Arc<Shared>,
    /// Who called in clear, as of the last ten seconds.
    pub ledger: PublishedBook,
    /// Of the thread, until it ends.
    pub(super) alive: watch::Receiver<()>,
}

impl KeeperHandle {
    /// Resolves when the thread has ended, by a defect or told to.
    pub async fn ended(&self) {
        let mut alive = self.alive.clone();
        while alive.changed().await.is_ok() {}
    }

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
        let known = self.shared.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (plan, state) = &*known;
        KeeperView {
            backend: self.backend,
            passed_over: self.passed_over.to_vec(),
            healed: self.shared.healed.load(Ordering::Relaxed),
            heal_failed: self.shared.heal_failed.load(Ordering::Relaxed),
            fighting: self.shared.fighting.load(Ordering::Relaxed),
            held: plan.as_ref().is_some_and(|hash| state.holds(hash)),
            reverted: state.reverted.is_some(),
            bypass: state.bypass.labels().into_iter().map(str::to_owned).collect(),
            plan: plan.clone(),
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_thread_that_panics_is_known_to_have_ended_and_one_that_waits_is_not() {
        let ((living, alive), (commands, inbox)) = (watch::channel(()), channel());
        let passed_over = Arc::from([]);
        let (shared, ledger) = (Arc::default(), Arc::default());
        let keeper = KeeperHandle { commands, backend: BackendKind::Tun, passed_over, shared, ledger, alive };
        let thread = std::thread::spawn(move || {
            let _living = living;
            let _ = inbox.recv();
            panic!("a defect");
        });
        tokio::select! {
            biased;
            () = keeper.ended() => panic!("it waits"),
            () = tokio::task::yield_now() => {}
        }
        let (answer, _) = oneshot::channel();
        keeper.commands.send(Command::Stop(answer)).unwrap();
        keeper.ended().await;
        assert!(thread.join().is_err());
    }
}
