//! Worker threads: each a single-threaded runtime with its own listeners, connections, balancer state
//! and counters. Nothing on a connection's path is shared, so nothing is locked.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use meshd_sys::sockets::AcceptQueue;
use tokio::sync::{mpsc, watch};

use super::env::Env;
use super::held::Budget;
use super::identify::Identifier;
use super::limits::{Admission, SourceLimits};
use super::outbound::{self, Accepted, Admitted};
use super::work::Work;
use super::{Shared, inbound};
use crate::capture::{OwnerReader, OwnerRecord, Recoverer, Recovery};
use crate::lifecycle::{Lifecycle, Stage};
use crate::telemetry::Direction;
use crate::transport::dial::{Dialer, OwnAddresses};
use crate::transport::pool::Pool;

/// Connections on their way between workers; one that finds the queue full is carried where it arrived.
const HANDOVER_QUEUE: usize = 1024;
/// Rest after a failed accept, so that a lasting failure does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What the task of one connection may take: with thousands of idle ones, this is what meshd costs.
pub(super) const STREAM_TASK_MAX: usize = 1024;
/// Exit code for a worker that cannot run (EX_OSERR of sysexits.h).
const WORKER_FAILED: i32 = 71;
/// How often unused connections are looked for.
const SWEEP: Duration = Duration::from_secs(15);

/// The listeners of one worker, bound already.
pub struct Listeners {
    pub captured: Vec<StdListener>,
    pub mesh: Vec<StdListener>,
    /// How to learn whom a captured connection was for.
    pub recovery: Recovery,
    /// Whose owners are known also when their sockets are gone.
    pub owners: OwnerRecord,
}

/// What a worker publishes about itself.
#[derive(Default)]
pub(super) struct Load {
    pub(super) busy_percent: AtomicU32,
    peers: AtomicUsize,
}

pub(super) struct Teammate {
    pub(super) load: Load,
    handover: mpsc::Sender<Handover>,
}

/// A connection given to another worker; its socket is registered with no runtime yet.
enum Handover {
    Outbound(Box<Admitted>),
    Inbound(StdStream, SocketAddr, Admission),
}

/// The running workers.
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
    pub work: Arc<Work>,
}

impl Workers {
    /// Waits for the threads; they end when the lifecycle reaches Stopped.
    pub fn join(self) {
        for thread in self.threads {
            // A worker that panicked outside a connection has been logged by its own hook.
            let _ = thread.join();
        }
    }
}

/// Starts one thread per set of listeners.
pub fn start(
    shared: &Arc<Shared>,
    listeners: Vec<Listeners>,
    lifecycle: &Lifecycle,
    tls_changes: &watch::Receiver<u64>,
) -> io::Result<Workers> {
    let (team, inboxes): (Vec<_>, Vec<_>) = listeners
        .iter()
        .map(|_| {
            let (handover, inbox) = mpsc::channel(HANDOVER_QUEUE);
            (Teammate { load: Load::default(), handover }, inbox)
        })
        .unzip();
    let team = Arc::new(team);
    let limits = SourceLimits::default();
    let work = Arc::new(Work::default());
    let mut threads = Vec::new();
    for (worker, (listeners, inbox)) in listeners.into_iter().zip(inboxes).enumerate() {
        let parts = Parts {
            worker,
            shared: shared.clone(),
            lifecycle: lifecycle.clone(),
            tls_changes: tls_changes.clone(),
            work: work.clone(),
            limits: limits.clone(),
            team: team.clone(),
        };
        let thread = std::thread::Builder::new().name(format!("worker-{worker}"));
        threads.push(thread.spawn(move || parts.run(listeners, inbox))?);
    }
    Ok(Workers { threads, work })
}

/// What a worker is made of before it has a thread of its own.
struct Parts {
    worker: usize,
    shared: Arc<Shared>,
    lifecycle: Lifecycle,
    tls_changes: watch::Receiver<u64>,
    work: Arc<Work>,
    limits: SourceLimits,
    team: Arc<Vec<Teammate>>,
}

impl Parts {
    fn run(self, listeners: Listeners, inbox: mpsc::Receiver<Handover>) {
        let worker = self.worker;
        let ran = tokio::runtime::LocalRuntime::new().and_then(|runtime| {
            runtime.block_on(async {
                let env = Rc::new(self.into_env(&listeners)?);
                work(env, listeners, inbox).await
            })
        });
        if let Err(error) = ran {
            // Half a data plane looks alive and drops connections; the service manager can do better.
            tracing::error!(worker, %error, "a worker cannot run; ending meshd so that it is started anew");
            std::process::exit(WORKER_FAILED);
        }
    }

    fn into_env(self, listeners: &Listeners) -> io::Result<Env> {
        let captured = listeners.captured.iter().map(StdListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        let dialer = Dialer {
            own: OwnAddresses { virtual_ips: self.shared.vips.networks().to_vec(), capture: captured.clone() },
            mark: self.shared.mark,
            connect_timeout: self.shared.config.connect_timeout(),
            telemetry: self.shared.telemetry.clone(),
        };
        Ok(Env {
            worker: self.worker,
            identifier: Identifier::open(OwnerReader::open(&listeners.owners)?)?,
            dialer,
            pool: Pool::default(),
            lifecycle: self.lifecycle,
            tls_changes: self.tls_changes,
            work: self.work,
            budget: Budget {
                telemetry: self.shared.telemetry.clone(),
                limit: self.shared.config.max_buffered_mib * 1024 * 1024,
            },
            limits: self.limits,
            balancers: RefCell::default(),
            captured,
            recoverer: Recoverer::open(&listeners.recovery)?,
            team: self.team,
            measured: Cell::new((Instant::now(), Duration::ZERO)),
            logged: RefCell::default(),
            shared: self.shared,
        })
    }
}

async fn work(env: Rc<Env>, listeners: Listeners, mut inbox: mpsc::Receiver<Handover>) -> io::Result<()> {
    for listener in listeners.captured {
        spawn_accept(&env, listener, captured)?;
    }
    for listener in listeners.mesh {
        spawn_accept(&env, listener, peer)?;
    }
    let mut lifecycle = env.lifecycle.clone();
    let mut denied = env.shared.tls.load().denied().clone();
    let mut renewed = env.tls_changes.clone();
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            given = inbox.recv() => match given {
                Some(Handover::Outbound(admitted)) => spawn_outbound(&env, admitted),
                Some(Handover::Inbound(socket, address, admission)) => spawn_inbound(&env, socket, address, admission),
                None => return Ok(()),
            },
            _ = sweep.tick() => env.sweep(),
            () = denied.changed() => {
                env.count_cut(env.pool.cut_denied(&denied));
            }
            Ok(()) = renewed.changed() => {
                env.count_cut(env.pool.cut_unfederated(&env.shared.tls.load()));
            }
            () = lifecycle.reached(Stage::Stopped) => return Ok(()),
        }
    }
}

type Take = fn(&Rc<Env>, StdStream, SocketAddr);

fn spawn_accept(env: &Rc<Env>, listener: StdListener, take: Take) -> io::Result<()> {
    tokio::task::spawn_local(accept(env.clone(), AcceptQueue::new(listener)?, take));
    Ok(())
}

/// Accepts until the drain begins; the listener closes then, so that peers are refused at once and go elsewhere.
async fn accept(env: Rc<Env>, listener: AcceptQueue, take: Take) {
    let mut lifecycle = env.lifecycle.clone();
    loop {
        let accepted = tokio::select! {
            biased;
            () = lifecycle.reached(Stage::Draining) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            // A defect met while admitting one connection must not take the listener with it.
            Ok((socket, address)) => drop(catch_unwind(AssertUnwindSafe(|| take(&env, socket, address)))),
            Err(error) if transient(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections; raise LimitNOFILE if descriptors ran out");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The connection died in the queue; the next one may be fine.
fn transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

fn captured(env: &Rc<Env>, socket: StdStream, client: SocketAddr) {
    match outbound::admit(env, socket, client) {
        Some(Accepted::Admitted(admitted)) => hand_over(env, admitted),
        Some(Accepted::Awaits(awaiting)) => {
            let env = env.clone();
            tokio::task::spawn_local(async move {
                let _working = env.work.begin();
                if let Some(admitted) = outbound::look_up(&env, *awaiting).await {
                    hand_over(&env, admitted);
                }
            });
        }
        None => {}
    }
}

/// To the worker that owns the connections to its service.
fn hand_over(env: &Rc<Env>, mut admitted: Box<Admitted>) {
    let owner = env.owner(&admitted.who.identity, &admitted.place);
    if owner == env.worker {
        return spawn_outbound(env, admitted);
    }
    admitted.report.move_to(owner);
    match env.team[owner].handover.try_send(Handover::Outbound(admitted)) {
        Ok(()) => {}
        Err(mpsc::error::TrySendError::Full(given) | mpsc::error::TrySendError::Closed(given)) => {
            let Handover::Outbound(mut admitted) = given else { return };
            admitted.report.move_to(env.worker);
            spawn_outbound(env, admitted);
        }
    }
}

fn peer(env: &Rc<Env>, socket: StdStream, address: SocketAddr) {
    let admission = match env.limits.admit(address.ip()) {
        Ok(admission) => admission,
        Err(fault) => {
            env.shared.telemetry.handshakes.accept_limited.fetch_add(1, Ordering::Relaxed);
            env.shared.telemetry.refused.count(Direction::Inbound, fault);
            return;
        }
    };
    // A peer's connection carries many streams and stays: it goes where the fewest are.
    let least = (0..env.team.len()).min_by_key(|worker| env.team[*worker].load.peers.load(Ordering::Relaxed));
    let owner = least.unwrap_or(env.worker);
    if owner == env.worker {
        return spawn_inbound(env, socket, address, admission);
    }
    match env.team[owner].handover.try_send(Handover::Inbound(socket, address, admission)) {
        Ok(()) => {}
        Err(mpsc::error::TrySendError::Full(given) | mpsc::error::TrySendError::Closed(given)) => {
            let Handover::Inbound(socket, address, admission) = given else { return };
            spawn_inbound(env, socket, address, admission);
        }
    }
}

fn spawn_outbound(env: &Rc<Env>, admitted: Box<Admitted>) {
    env.measure();
    let working = env.work.begin();
    let env = env.clone();
    let task = async move {
        let _working = working;
        outbound::carry(env, admitted).await;
    };
    debug_assert!(size_of_val(&task) <= STREAM_TASK_MAX, "an idle connection costs {} bytes", size_of_val(&task));
    tokio::task::spawn_local(task);
}

fn spawn_inbound(env: &Rc<Env>, socket: StdStream, address: SocketAddr, admission: Admission) {
    let env = env.clone();
    tokio::task::spawn_local(async move {
        // Work until it is closed: what its last streams sent may still be on its way when they have ended.
        let _working = env.work.begin();
        let _counted = Counted::peer(&env);
        inbound::connection(env, socket, address, admission).await;
    });
}

/// A peer's connection counted on its worker, also when its task panics.
struct Counted(Arc<Vec<Teammate>>, usize);

impl Counted {
    fn peer(env: &Env) -> Counted {
        env.team[env.worker].load.peers.fetch_add(1, Ordering::Relaxed);
        Counted(env.team.clone(), env.worker)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0[self.1].load.peers.fetch_sub(1, Ordering::Relaxed);
    }
}
