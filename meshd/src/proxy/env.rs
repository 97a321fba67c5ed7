//! What the steps of a connection have on their worker.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{SocketAddr, TcpStream as StdStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use meshd_discovery::ServiceName;
use meshd_identity::SpiffeId;
use nix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use super::Shared;
use super::balance::Balancer;
use super::held::Budget;
use super::identify::Identifier;
use super::limits::SourceLimits;
use super::resolve::Place;
use super::work::Work;
use super::worker::Teammate;
use crate::capture::{Flow, Recoverer};
use crate::lifecycle::Lifecycle;
use crate::telemetry::Direction;
use crate::transport::dial::Dialer;
use crate::transport::pool::Pool;

/// A worker this busy keeps what arrives elsewhere away from itself.
const BUSY_PERCENT: u32 = 70;
/// How often a worker's load is measured, at most.
const LOAD_SAMPLE: Duration = Duration::from_millis(100);
/// One log line per refused caller in this time.
const LOG_PAUSE: Duration = Duration::from_secs(10);
/// Distinct refused callers remembered for that.
const LOG_CALLERS: usize = 256;

/// Everything the steps need on this worker.
pub(super) struct Env {
    pub(super) worker: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) identifier: Identifier,
    pub(super) dialer: Dialer,
    pub(super) pool: Pool,
    pub(super) lifecycle: Lifecycle,
    /// Counts the replacements of what `Shared::tls` has.
    pub(super) tls_changes: watch::Receiver<u64>,
    pub(super) work: Arc<Work>,
    pub(super) budget: Budget,
    pub(super) limits: SourceLimits,
    pub(super) balancers: RefCell<HashMap<(SpiffeId, ServiceName, u16), Rc<Balancer>>>,
    pub(super) captured: Vec<SocketAddr>,
    pub(super) recoverer: Recoverer,
    pub(super) team: Arc<Vec<Teammate>>,
    pub(super) measured: Cell<(Instant, Duration)>,
    pub(super) logged: RefCell<HashMap<String, Instant>>,
}

impl Env {
    /// Outbound connections ended because of who the peer is.
    pub(super) fn count_cut(&self, cut: u64) {
        self.shared.telemetry.handshakes.cut[Direction::Outbound as usize].fetch_add(cut, Ordering::Relaxed);
    }

    /// Lets go of connections nobody uses, and of balancers whose service is gone, their probes with them.
    pub(super) fn sweep(&self) {
        self.measure();
        let tls = self.shared.tls.load();
        // One dialled while the federation ended.
        self.count_cut(self.pool.cut_unfederated(&tls));
        self.pool.sweep(&tls, Instant::now());
        let directory = self.shared.directory.load();
        self.balancers.borrow_mut().retain(|(_, name, port), balancer| {
            if balancer.take_used() {
                self.shared.lookups.note_use(name);
            }
            let service = directory.get(name);
            if let Some(service) = service {
                balancer.update(service, *port, &self.shared.locality);
            }
            service.is_some()
        });
    }

    /// Whom an accepted connection was for; None if it was dialled here directly.
    pub(super) fn flow(&self, socket: &StdStream, peer: SocketAddr) -> io::Result<Option<Flow>> {
        self.recoverer.flow(socket, peer, &self.captured)
    }

    /// The balancer of a service port, up to date with `place`.
    pub(super) fn balancer(&self, source: &SpiffeId, place: &Place) -> Rc<Balancer> {
        let key = (source.clone(), place.service.name.clone(), place.port);
        let balancer = self.balancers.borrow_mut().entry(key).or_default().clone();
        balancer.update(&place.service, place.port, &self.shared.locality);
        balancer
    }

    /// The worker that owns the connections of `source` to a service: few connections with many streams
    /// cost less than many with few. While the owner is busy, we keep what came to us.
    pub(super) fn owner(&self, source: &SpiffeId, place: &Place) -> usize {
        let mut hasher = DefaultHasher::new();
        (source, &place.service.name).hash(&mut hasher);
        let owner = (hasher.finish() % self.team.len() as u64) as usize;
        let busy = |worker: usize| self.team[worker].load.busy_percent.load(Ordering::Relaxed);
        if busy(owner) > BUSY_PERCENT && busy(self.worker) < busy(owner) { self.worker } else { owner }
    }

    /// Publishes how much of its time this thread was running.
    pub(super) fn measure(&self) {
        let now = Instant::now();
        let (since, cpu_then) = self.measured.get();
        let elapsed = now.saturating_duration_since(since);
        if elapsed < LOAD_SAMPLE {
            return;
        }
        let Ok(cpu) = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID) else { return };
        let cpu = Duration::from(cpu);
        let percent = 100.0 * cpu.saturating_sub(cpu_then).as_secs_f64() / elapsed.as_secs_f64();
        self.team[self.worker].load.busy_percent.store(percent as u32, Ordering::Relaxed);
        self.measured.set((now, cpu));
    }

    /// Whether to log about `caller` again.
    pub(super) fn may_log(&self, caller: &str) -> bool {
        let mut logged = self.logged.borrow_mut();
        let now = Instant::now();
        if logged.get(caller).is_some_and(|last| now.saturating_duration_since(*last) < LOG_PAUSE) {
            return false;
        }
        if logged.len() >= LOG_CALLERS {
            logged.clear();
        }
        logged.insert(caller.to_owned(), now);
        true
    }
}
