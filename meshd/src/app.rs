//! The composition root: the only place that knows all parts. Binds and checks everything first, so that
//! a mistake ends the start with one clear error; then runs until told to stop.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use meshd_discovery::{SourceConfig, Watcher};
use meshd_identity::SpiffeId;
use meshd_pki_client::{Agent, Credentials};
use meshd_sys::sockets::{self, Mark};
use meshd_sys::{inherit, memory};
use nix::errno::Errno;
use tokio::net::{TcpListener, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::admin::{self, Control, Reload, View};
use crate::capture::{
    self, Caller, Keeper, KeeperHandle, ListenAt, OwnerRecord, Recovery, StateFile, StrictPort, Wanted,
};
use crate::config::{Config, identity_in};
use crate::dns::{self, Vips};
use crate::enrol::{self, ClientAddress, Delivery, Enrolment, Mode, PortMemory, PortWatch, Selector};
use crate::lifecycle::{self, Conductor, Stage};
use crate::only_one::OnlyOne;
use crate::proxy::{self, Listeners, Shared, Workers};
use crate::raw::RawFollower;
use crate::telemetry::{AccessLog, Telemetry};
use crate::transport::tls::TlsState;

/// How long the first certificates and the first reading of the sources may take before we serve with what there is.
const SETTLE: Duration = Duration::from_secs(5);
/// How often a drain looks whether it is done.
const DRAIN_TICK: Duration = Duration::from_millis(50);
/// How soon another owner of an enrolled port is noticed without it calling anybody.
const PORTS_TICK: Duration = Duration::from_secs(1);

/// Why meshd cannot start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(String);

/// Names what failed in front of why.
fn failed(what: impl std::fmt::Display) -> impl FnOnce(&dyn std::fmt::Display) -> StartError {
    move |why| StartError(format!("{what}: {why}"))
}

macro_rules! start {
    ($result:expr, $($what:tt)+) => {
        $result.map_err(|error| failed(format_args!($($what)+).to_string())(&error))
    };
}

/// A daemon that has everything it needs and serves already.
pub struct App {
    config: Config,
    config_path: PathBuf,
    shared: Arc<Shared>,
    conductor: Conductor,
    workers: Workers,
    credentials: watch::Receiver<Arc<Credentials>>,
    identities: watch::Sender<BTreeSet<SpiffeId>>,
    tls_generation: watch::Sender<u64>,
    keeper: KeeperHandle,
    /// Keeps the captured raw addresses equal to the directory's.
    raw: JoinHandle<()>,
    reloads: mpsc::Receiver<Reload>,
    _only_one: OnlyOne,
}

impl App {
    pub async fn start(config: Config, config_path: &Path) -> Result<App, StartError> {
        let inherited = inherit::listeners();
        let only_one =
            OnlyOne::here(&config.run_dir, &config.state_dir).map_err(|error| StartError(error.to_string()))?;
        let agent = start!(Agent::open(&config.identity_dir()), "identity")?;
        let mut credentials = agent.watch();
        let renewals = agent.metrics();
        let enrolment = start!(load_enrolment(&config, &credentials.borrow()), "enrolment")?;
        let (identities, identities_receiver) = watch::channel(enrolment.identities());
        tokio::spawn(agent.run(identities_receiver));
        // First of all: until then strict ports of a host that has just booted are open. What is captured meanwhile
        // waits in the listeners' queues.
        let Captured { keeper, listeners, recovery } = start_capture(&config, &enrolment, inherited).await?;
        wait_for_certificates(&mut credentials, &enrolment.identities()).await;
        let sources =
            start!(SourceConfig::open_all(&config.sources, &credentials.borrow().trust_domain), "meshd.toml")?;
        let watcher = Watcher::new(sources);
        let (directory, mut health) = (watcher.directory(), watcher.health());
        let vips = Arc::new(start!(
            Vips::open(&config.state_dir.join("vips.json"), config.capture.vip4, config.capture.vip6),
            "virtual IPs"
        )?);
        let default_identity = default_identity(&config, config_path, &credentials.borrow())?;
        let tls = start!(TlsState::build(&credentials.borrow(), default_identity.as_ref(), 0), "certificates")?;
        let access_log = match &config.proxy.access_log {
            Some(path) => start!(AccessLog::to_file(path), "access_log {}", path.display())?,
            None => AccessLog::off(),
        };
        let shared = Arc::new(Shared {
            config: config.proxy.clone(),
            mark: Mark(config.capture.mark),
            directory: ArcSwap::from(directory.borrow().clone()),
            enrolment: ArcSwap::from_pointee(enrolment),
            ports: start!(
                PortWatch::open(PortMemory::new(&config.state_dir)),
                "{}: remove it to have the owners of enrolled ports learned anew",
                PortMemory::new(&config.state_dir).path().display()
            )?,
            tls: ArcSwap::from_pointee(tls),
            vips: vips.clone(),
            raw: ArcSwap::default(),
            telemetry: Telemetry::new(config.proxy.worker_count(), access_log),
        });
        count_panics(&shared.telemetry);
        shared.ports.refresh(&shared.enrolment.load());
        let dns = bind_dns(&config).await?;
        let metrics =
            start!(TcpListener::bind(config.metrics.listen).await, "[metrics] listen {}", config.metrics.listen)?;
        let admin_socket = start!(admin::bind(&config.admin_socket()), "{}", config.admin_socket().display())?;

        let (conductor, lifecycle) = lifecycle::channel();
        let (tls_generation, tls_generation_receiver) = watch::channel(0);
        tokio::spawn(watcher.run());
        if tokio::time::timeout(SETTLE, meshd_discovery::settled(&mut health)).await.is_err() {
            tracing::warn!("a discovery source has not answered yet; serving with what is known");
        }
        shared.directory.store(directory.borrow().clone());
        vips.sync(&directory.borrow());
        tokio::spawn(follow_directory(shared.clone(), directory.clone()));
        tokio::spawn(follow_ports(shared.clone()));
        let workers = start!(proxy::start(&shared, listeners, &lifecycle, &tls_generation_receiver), "worker threads")?;
        let mut raw = RawFollower::new(&config.capture.raw, shared.clone(), keeper.clone());
        raw.follow_to(&directory.borrow().clone()).await;
        let raw = tokio::spawn(raw.follow(directory.clone()));
        tokio::spawn(dns::serve(dns.0, dns.1, config.dns.clone(), directory, vips, shared.telemetry.clone()));
        tokio::spawn(keep_integrated(&config, shared.clone(), keeper.clone()));
        let capture = (keeper.clone(), recovery);
        let view = View::new(&config, shared.clone(), lifecycle, credentials.clone(), health, renewals, capture);
        let view = Arc::new(view);
        tokio::spawn(admin::serve_metrics(metrics, view.clone()));
        let (reload, reloads) = mpsc::channel(1);
        let control = Control { keeper: keeper.clone(), reload };
        tokio::spawn(admin::serve_socket(admin_socket, view, control));
        let config_path = config_path.to_owned();
        Ok(App {
            config,
            config_path,
            shared,
            conductor,
            workers,
            credentials,
            identities,
            tls_generation,
            keeper,
            raw,
            reloads,
            _only_one: only_one,
        })
    }

    /// Serves until SIGTERM or SIGINT, then drains.
    pub async fn run(mut self) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "meshd ready");
        memory::forget_startup_code();
        let mut renewing = true;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {
                    self.shared.telemetry.access_log.reopen();
                    // Told in the log; nobody waits for an answer.
                    let _ = self.reload_enrolment(None).await;
                }
                Some(Reload { apply, answer }) = self.reloads.recv() => {
                    // Whoever asked may have given up waiting.
                    let _ = answer.send(self.reload_enrolment(apply.as_deref()).await);
                }
                changed = self.credentials.changed(), if renewing => {
                    renewing = changed.is_ok();
                    if renewing {
                        self.install_credentials();
                    } else {
                        tracing::error!("certificates are not renewed any more; restart meshd before they expire");
                    }
                }
            }
        }
        self.drain(terminate).await;
        Ok(())
    }

    async fn drain(self, mut again: tokio::signal::unix::Signal) {
        let limit = Duration::from_secs(self.config.proxy.drain_timeout_s);
        tracing::info!(under_way = self.workers.work.under_way(), "draining");
        // New connections to raw addresses go direct from now on; captured ones stay with us.
        self.raw.abort();
        self.keeper.raw_addresses(BTreeSet::new()).await;
        self.conductor.enter(Stage::Draining);
        let drained = async {
            // Two quiet looks in a row: a stream may be between a peer's socket and our count.
            let mut quiet = 0;
            while quiet < 2 {
                tokio::time::sleep(DRAIN_TICK).await;
                quiet = if self.workers.work.under_way() == 0 { quiet + 1 } else { 0 };
            }
        };
        tokio::select! {
            () = drained => {}
            () = tokio::time::sleep(limit) => {
                tracing::warn!(cut = self.workers.work.under_way(), "drain timeout: cutting what is left");
            }
            _ = again.recv() => tracing::warn!("told to stop again: cutting what is left"),
        }
        self.conductor.enter(Stage::Stopped);
        // Rules stay on purpose: virtual IPs are refused and strict ports closed until meshd is back or reverted.
        self.workers.join();
        // After the last socket: what closing it said must still reach the application.
        self.keeper.stop().await;
        if let Err(error) = dns::integrate::release(&self.config.dns) {
            tracing::error!(%error, "names still come to meshd, which is gone; `meshd intercept revert` takes that back");
        }
        // Best effort: the next start replaces a stale socket.
        let _ = std::fs::remove_file(self.config.admin_socket());
        tracing::info!("meshd stopped");
    }

    /// New certificates: all or nothing, and nothing changes when they are unusable.
    fn install_credentials(&mut self) {
        let credentials = self.credentials.borrow_and_update().clone();
        let generation = *self.tls_generation.borrow() + 1;
        let default = default_identity(&self.config, &self.config_path, &credentials).ok().flatten();
        match TlsState::build(&credentials, default.as_ref(), generation) {
            Ok(tls) => {
                self.shared.tls.store(Arc::new(tls));
                self.tls_generation.send_replace(generation);
            }
            Err(error) => tracing::error!(%error, "new certificates are unusable; keeping the ones in force"),
        }
    }

    /// `apply`: the plan an operator has ordered to be in force after it.
    async fn reload_enrolment(&mut self, apply: Option<&str>) -> Result<(), String> {
        let reloaded = self.try_reload_enrolment(apply).await;
        match &reloaded {
            Ok(()) => tracing::info!("enrolment reloaded"),
            Err(error) => tracing::error!(error, "enrolment not reloaded; the last good one stays in force"),
        }
        reloaded
    }

    async fn try_reload_enrolment(&mut self, apply: Option<&str>) -> Result<(), String> {
        let credentials = self.credentials.borrow().clone();
        let enrolment = Arc::new(load_enrolment(&self.config, &credentials).map_err(|error| error.to_string())?);
        let plan = self.plan(enrolment.clone()).await?;
        if let Some(hash) = apply.filter(|hash| *hash != plan.hash()) {
            return Err(another_plan(hash, &plan.hash()));
        }
        // Who is captured must be known and certified first: a connection that went direct a moment ago is not to
        // be refused for that.
        let before = self.shared.enrolment.swap(enrolment.clone());
        self.identities.send_replace(enrolment.identities());
        if !plan.raw_callers.is_empty() {
            wait_for_certificates(&mut self.credentials.clone(), &enrolment.identities()).await;
            // What has arrived must be in use before anybody is captured; the main loop waits for us.
            self.install_credentials();
        }
        let done = match apply {
            Some(_) => self.keeper.apply(plan).await,
            None => self.keeper.want(plan).await,
        };
        if let Err(error) = done {
            self.identities.send_replace(before.identities());
            self.shared.enrolment.store(before);
            return Err(error.to_string());
        }
        self.shared.ports.refresh(&enrolment);
        Ok(())
    }

    /// Asks systemd, and looks through sockets and processes: not on the thread that answers names.
    async fn plan(&self, enrolment: Arc<Enrolment>) -> Result<Wanted, String> {
        let config = self.config.clone();
        let planned = tokio::task::spawn_blocking(move || planned(&config, &enrolment));
        planned.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }
}

/// "Ready" should mean that workloads can be reached: waits for the certificates of newly enrolled ones,
/// but not for a PKI that is away. What was on disk already is served at once.
async fn wait_for_certificates(credentials: &mut watch::Receiver<Arc<Credentials>>, wanted: &BTreeSet<SpiffeId>) {
    let settled = credentials.wait_for(|credentials| {
        wanted.iter().all(|id| credentials.workloads.contains_key(id) || credentials.refused.contains_key(id))
    });
    if tokio::time::timeout(SETTLE, settled).await.is_err() {
        tracing::warn!("the PKI has not issued every certificate yet; serving with those that are there");
    }
}

/// A panic ends one connection (its task); the operator sees it counted, and in the log with its place.
fn count_panics(telemetry: &Arc<Telemetry>) {
    // Weak: the hook lives for ever, and the access log is written out when the last owner goes.
    let telemetry = Arc::downgrade(telemetry);
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if let Some(telemetry) = telemetry.upgrade() {
            telemetry.panics.fetch_add(1, Ordering::Relaxed);
        }
        print(panic);
    }));
}

fn load_enrolment(config: &Config, credentials: &Credentials) -> Result<Enrolment, enrol::EnrolError> {
    enrol::load(&config.enrol_dir, &credentials.trust_domain, &config.reserved())
}

fn default_identity(config: &Config, path: &Path, credentials: &Credentials) -> Result<Option<SpiffeId>, StartError> {
    let Some(text) = &config.proxy.default_identity else { return Ok(None) };
    let id = identity_in(&credentials.trust_domain, text, path, "proxy.default_identity");
    id.map(Some).map_err(|error| StartError(error.to_string()))
}

/// What capture is made of once it works.
struct Captured {
    keeper: KeeperHandle,
    listeners: Vec<Listeners>,
    recovery: Recovery,
}

async fn start_capture(
    config: &Config,
    enrolment: &Enrolment,
    inherited: Vec<(String, StdListener)>,
) -> Result<Captured, StartError> {
    let intent = start!(planned(config, enrolment), "capture")?;
    let mut chosen = start!(capture::choose(config.capture.backend, &intent), "[capture] backend")?;
    tell_choice(&chosen);
    let listen_at = start!(chosen.backend.prepare(&intent), "capture")?;
    let recovery = chosen.backend.recovery();
    let owners = chosen.backend.owners();
    let listeners = bind_workers(config, inherited, &listen_at, &recovery, &owners)?;
    let keeper =
        start!(Keeper::start(chosen.backend, chosen.passed_over, StateFile::new(&config.state_dir)), "capture")?;
    start!(keeper.want(intent).await, "capture")?;
    Ok(Captured { keeper, listeners, recovery })
}

fn tell_choice(chosen: &capture::Chosen) {
    for passed in &chosen.passed_over {
        tracing::info!(backend = passed.backend.label(), "capture backend passed over: {}", passed.reason);
    }
    tracing::info!(backend = chosen.backend.kind().label(), "capture backend");
}

fn bind_workers(
    config: &Config,
    mut inherited: Vec<(String, StdListener)>,
    capture: &ListenAt,
    recovery: &Recovery,
    owners: &OwnerRecord,
) -> Result<Vec<Listeners>, StartError> {
    let listen = if capture.transparent { sockets::listen_transparent } else { sockets::listen };
    // An inherited listener carries its queue of waiting connections over: it must not be bound anew.
    let mut take = |name: &str| {
        let at = inherited.iter().position(|(given, _)| given == name)?;
        Some(inherited.swap_remove(at).1)
    };
    let mut all = Vec::new();
    for worker in 0..config.proxy.worker_count() {
        let mut captured = Vec::new();
        for &address in &capture.addresses {
            match take(&format!("capture-{worker}-{}", address.ip())).map_or_else(|| listen(address), Ok) {
                Ok(listener) => captured.push(listener),
                Err(error) if has_no_ipv6(address, &error) => {}
                Err(error) => return Err(failed(format!("capture listener {address}"))(&error)),
            }
        }
        let mut mesh = Vec::new();
        for address in &config.proxy.mesh_listen {
            match take(&format!("mesh-{worker}-{address}")).map_or_else(|| sockets::listen(*address), Ok) {
                Ok(listener) => mesh.push(listener),
                Err(error) if address.ip().is_unspecified() && has_no_ipv6(*address, &error) => {}
                Err(error) => return Err(failed(format!("[proxy] mesh_listen {address}"))(&error)),
            }
        }
        if mesh.is_empty() && !config.proxy.mesh_listen.is_empty() {
            return Err(StartError(
                "[proxy] mesh_listen has only IPv6 addresses, and this host has no IPv6".to_owned(),
            ));
        }
        all.push(Listeners { captured, mesh, recovery: recovery.clone(), owners: owners.clone() });
    }
    Ok(all)
}

/// Whether it is only that this host has no IPv6: then nobody will come by it.
fn has_no_ipv6(address: SocketAddr, error: &io::Error) -> bool {
    let no_family = error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32);
    address.is_ipv6() && (no_family || error.kind() == io::ErrorKind::AddrNotAvailable)
}

async fn bind_dns(config: &Config) -> Result<(UdpSocket, TcpListener), StartError> {
    let address = config.dns.listen;
    let udp = start!(UdpSocket::bind(address).await, "[dns] listen {address} (UDP)")?;
    let tcp = start!(TcpListener::bind(address).await, "[dns] listen {address} (TCP)")?;
    Ok((udp, tcp))
}

fn keep_integrated(config: &Config, shared: Arc<Shared>, capture: KeeperHandle) -> impl Future<Output = ()> + use<> {
    let keeper = dns::integrate::Keeper::new(&config.dns, &config.state_dir);
    keeper.run(move || {
        // A revert takes names away, too; they come back with the rules.
        if capture.view().reverted {
            return None;
        }
        let enrolment = shared.enrolment.load();
        Some(enrolment.workloads().iter().map(|workload| workload.unit.clone()).collect())
    })
}

fn another_plan(asked: &str, found: &str) -> String {
    format!(
        "plan {asked} was asked for, but the daemon finds {found}: enrol.d has changed since (look at `meshd intercept \
         plan` again), or meshd.toml has changed since the daemon was started (restart it)"
    )
}

/// What is wanted, if it locks nobody out.
fn planned(config: &Config, enrolment: &Enrolment) -> Result<Wanted, capture::CaptureError> {
    let wanted = wanted(config, enrolment);
    capture::refuse_lockout(enrolment, &wanted, &capture::look(&wanted, None)?)?;
    Ok(wanted)
}

/// What the configuration and the enrolled workloads ask of the kernel.
pub fn wanted(config: &Config, enrolment: &Enrolment) -> Wanted {
    let of_mode = |mode| enrolment.deliveries().iter().filter(move |delivery| delivery.mode == mode);
    Wanted {
        strict: of_mode(Mode::Strict).map(|delivery| strict_port(delivery)).collect(),
        raw_callers: match config.capture.raw.is_empty() {
            true => BTreeSet::new(),
            false => enrolment.workloads().iter().map(|workload| caller(&workload.selector)).collect(),
        },
        permissive: of_mode(Mode::Permissive).map(|delivery| delivery.deliver.port()).collect(),
        transparent: enrolment
            .deliveries()
            .iter()
            .filter(|delivery| delivery.client_address == ClientAddress::Transparent)
            .map(|delivery| delivery.deliver)
            .collect(),
        ..config.capture.bare(config.proxy.capture_port)
    }
}

fn strict_port(delivery: &Delivery) -> StrictPort {
    let owner = caller(&delivery.owner.selector);
    let local = delivery.local_ok.iter().map(|uid| Caller::Uid(*uid)).chain([owner.clone()]).collect();
    StrictPort {
        port: delivery.deliver.port(),
        owner,
        local,
        plaintext_from: delivery.plaintext_from.iter().copied().collect(),
    }
}

/// The processes of a workload, as rules can tell them.
fn caller(selector: &Selector) -> Caller {
    match selector {
        Selector::Unit(_) | Selector::Scope(_) => Caller::Unit(selector.to_string()),
        Selector::Uid(uid) => Caller::Uid(*uid),
        Selector::Port(port) => Caller::Port(*port),
    }
}

/// Units restart, and others take their ports: whoever is enrolled by a port is looked for again and again.
async fn follow_ports(shared: Arc<Shared>) {
    loop {
        shared.ports.refresh_if_due(&shared.enrolment.load(), Instant::now());
        tokio::time::sleep(PORTS_TICK).await;
    }
}

async fn follow_directory(shared: Arc<Shared>, mut directory: watch::Receiver<Arc<meshd_discovery::Directory>>) {
    while directory.changed().await.is_ok() {
        let current = directory.borrow_and_update().clone();
        shared.directory.store(current);
    }
}
