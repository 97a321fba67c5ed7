//! The composition root: the only place that knows all parts. Binds and checks everything first, so that
//! a mistake ends the start with one clear error; then runs until told to stop.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use meshd_discovery::{SourceConfig, Watcher};
use meshd_identity::SpiffeId;
use meshd_pki_client::{Agent, Credentials};
use meshd_sys::sockets::Mark;
use meshd_sys::{inherit, memory};
use tokio::net::{TcpListener, UdpSocket, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

use crate::admin::{self, Control, View};
use crate::attest::Attestor;
use crate::capture::KeeperHandle;
use crate::config::Config;
use crate::dns::{self, Vips};
use crate::enrol::{PortMemory, PortWatch, Sight};
use crate::lifecycle::{self, Conductor, Stage};
use crate::only_one::OnlyOne;
use crate::proxy::{self, Locality, Shared, Workers};
use crate::raw::RawFollower;
use crate::telemetry::{AccessLog, Telemetry};
use crate::transport::denied::Denied;
use crate::transport::generations::Generations;
use crate::transport::tls::TlsState;
use crate::workload_api;

/// How long the first certificates and the first reading of the sources may take before we serve with what there is.
const SETTLE: Duration = Duration::from_secs(5);
/// The first conversation with the PKI and the first look at every source are over by then.
const SETTLED_AFTER: Duration = Duration::from_secs(10);
/// Renewals and reloads are hours apart and use code nothing else does; what an hour's minor faults cost (about a
/// hundred) is not measurable.
const FORGET_EVERY: Duration = Duration::from_secs(3600);
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

mod certificates;
mod intent;
mod last_known;
mod listeners;
mod registering;
mod reload;
mod self_check;
mod supervise;

pub use intent::wanted;

use certificates::{Certificates, default_identity, wait_for_certificates};
use last_known::LastKnown;
use listeners::{Captured, bind_dns, start_capture};
use registering::Leaving;
use reload::{Reloader, load_enrolment, withhold};
use supervise::{Supervisor, another};

/// A daemon that has everything it needs and serves already.
pub struct App {
    config: Config,
    shared: Arc<Shared>,
    conductor: Conductor,
    workers: Workers,
    credentials: watch::Receiver<Arc<Credentials>>,
    certificates: Arc<Certificates>,
    keeper: KeeperHandle,
    /// Keeps the captured raw addresses equal to the directory's.
    raw: JoinHandle<()>,
    /// Tells if what keeps the kernel as it should be has ended.
    capture: JoinHandle<()>,
    reloading: JoinHandle<()>,
    /// The PKI's, which enrolment in force agrees with.
    selectors: BTreeMap<SpiffeId, Vec<String>>,
    /// Has it reload.
    hangup: Arc<Notify>,
    leaving: Leaving,
    _only_one: OnlyOne,
}

impl App {
    pub async fn start(config: Config, config_path: &Path) -> Result<App, StartError> {
        let inherited = inherit::listeners();
        let hands_over = registering::hands_over(&inherited);
        let only_one =
            OnlyOne::here(&config.run_dir, &config.state_dir).map_err(|error| StartError(error.to_string()))?;
        let agent = start!(Agent::open(&config.identity_dir()), "identity")?;
        let mut credentials = agent.watch();
        let (renewals, line) = (agent.metrics(), agent.line());
        let (denied, denials) = Denied::follow(agent.denied());
        let selectors = credentials.borrow().selectors.clone();
        let attestor = Attestor::new(Sight::of(config.workload_api.path_selectors));
        let mut enrolment = start!(load_enrolment(&config, &credentials.borrow(), attestor.sight()), "enrolment")?;
        let (identities, identities_receiver) = watch::channel(enrolment.identities());
        let access_log = match &config.proxy.access_log {
            Some(path) => start!(AccessLog::to_file(path), "access_log {}", path.display())?,
            None => AccessLog::off(),
        };
        let telemetry = Telemetry::new(config.proxy.worker_count(), access_log);
        count_panics(&telemetry);
        let tasks = Supervisor(telemetry.clone());
        tasks.keep("renewal", (agent, identities_receiver), |(agent, wanted)| Box::pin(agent.work(wanted)));
        tasks.keep("denials", denials, |denials| Box::pin(denials.run()));
        // First of all: until then strict ports of a host that has just booted are open. What is captured meanwhile
        // waits in the listeners' queues.
        let Captured { keeper, listeners, recovery } = start_capture(&config, &enrolment, inherited).await?;
        let ended = keeper.clone();
        let capture = tasks.watch("capture", async move { ended.ended().await });
        wait_for_certificates(&mut credentials, &enrolment.identities()).await;
        let installed = credentials.borrow().clone();
        withhold(&mut enrolment, &installed, attestor.sight());
        let sources =
            start!(SourceConfig::open_all(&config.sources, &credentials.borrow().trust_domain), "meshd.toml")?;
        let registrations = registering::registrations(&sources);
        let known = Arc::new(LastKnown::new(&config.state_dir));
        let watcher = Watcher::new(sources, credentials.borrow().trust_domain.clone())
            .wanting(intent::imported(&config))
            .keeping(known);
        let watcher = match config.imports.declared() {
            None => watcher.looking_up(Arc::new(LastKnown::in_dir(&config.state_dir))),
            Some(_) => watcher,
        };
        let (lookups, imports) = (watcher.lookups(), watcher.imports());
        let (directory, mut health, losses) = (watcher.directory(), watcher.health(), watcher.losses());
        let suspects = watcher.suspects();
        let vips = Arc::new(start!(
            Vips::open(&config.state_dir.join("vips.json"), config.capture.vip4, config.capture.vip6),
            "virtual IPs"
        )?);
        let default_identity = default_identity(&config, config_path, &installed)?;
        let tls = start!(
            TlsState::build_denying(&installed, default_identity.as_ref(), Generations::default(), denied),
            "certificates"
        )?;
        let shared = Arc::new(Shared {
            config: config.proxy.clone(),
            mark: Mark(config.capture.mark),
            directory: ArcSwap::from(directory.borrow().clone()),
            enrolment: ArcSwap::from_pointee(enrolment),
            attestor: Arc::new(attestor),
            ports: start!(
                PortWatch::open(PortMemory::new(&config.state_dir)),
                "{}: remove it to have the owners of enrolled ports learned anew",
                PortMemory::new(&config.state_dir).path().display()
            )?,
            tls: ArcSwap::from_pointee(tls),
            vips: vips.clone(),
            raw: ArcSwap::default(),
            telemetry,
            locality: start!(Locality::of(&config.host), "the addresses of this host")?,
            suspects,
            lookups,
        });
        let certificates = Arc::new(Certificates::new(shared.clone(), default_identity, installed));
        shared.ports.refresh(&shared.enrolment.load());
        let dns = bind_dns(&config).await?;
        let metrics =
            start!(TcpListener::bind(config.metrics.listen).await, "[metrics] listen {}", config.metrics.listen)?;
        let admin_socket = start!(admin::bind(&config.admin_socket()), "{}", config.admin_socket().display())?;

        let (conductor, lifecycle) = lifecycle::channel();
        tasks.watch("discovery", watcher.run());
        if tokio::time::timeout(SETTLE, meshd_discovery::settled(&mut health)).await.is_err() {
            tracing::warn!("a discovery source has not answered yet; serving with what is known");
        }
        shared.directory.store(directory.borrow().clone());
        vips.sync(&directory.borrow());
        let following = (shared.clone(), directory.clone());
        tasks.keep("directory", following, |(shared, directory)| Box::pin(follow_directory(shared, directory)));
        tasks.keep("ports", shared.clone(), |shared| Box::pin(follow_ports(shared)));
        tasks.keep("self_check", shared.clone(), |shared| Box::pin(self_check::watch(shared.clone())));
        let workers = start!(proxy::start(&shared, listeners, &lifecycle, &certificates.changes()), "worker threads")?;
        let mut raw = RawFollower::new(&config.capture.raw, shared.clone(), keeper.clone());
        raw.follow_to(&directory.borrow().clone()).await;
        let raw = tasks.keep("raw", (raw, directory.clone()), |(raw, directory)| Box::pin(raw.follow(directory)));
        keep_answering(&tasks, &config, &shared, dns, directory)?;
        let integrated = (config.clone(), shared.clone(), keeper.clone());
        tasks.keep("dns_integration", integrated, |(config, shared, keeper)| {
            Box::pin(keep_integrated(config, shared.clone(), keeper.clone()))
        });
        let captured = (keeper.clone(), recovery);
        let view = View::new(&config, shared.clone(), lifecycle, credentials.clone(), health, renewals, captured);
        let view = Arc::new(view.registering(registrations.clone()).importing(imports));
        let metrics = start!(metrics.into_std(), "[metrics] listen")?;
        tasks.keep("metrics", (metrics, view.clone()), |(socket, view)| {
            Box::pin(async {
                if let Some(listener) = another(socket.try_clone().and_then(TcpListener::from_std)) {
                    admin::serve_metrics(listener, view.clone()).await;
                }
            })
        });
        let (reload, reloads) = mpsc::channel(1);
        let control = Control { keeper: keeper.clone(), reload, losses };
        let admin_socket = start!(admin_socket.into_std(), "{}", config.admin_socket().display())?;
        tasks.keep("admin", (admin_socket, view, control), |(socket, view, control)| {
            Box::pin(async {
                if let Some(listener) = another(socket.try_clone().and_then(UnixListener::from_std)) {
                    admin::serve_socket(listener, view.clone(), control.clone()).await;
                }
            })
        });
        if config.workload_api.enabled {
            let path = config.api_socket();
            let socket = start!(workload_api::bind(&path), "{}", path.display())?;
            let socket = start!(socket.into_std(), "{}", path.display())?;
            let (shared, credentials, enrolled) = (shared.clone(), certificates.published(), identities.subscribe());
            let tokens = Arc::new(workload_api::PkiTokens::new(credentials.clone(), line));
            let sources = workload_api::Sources { shared, credentials, enrolled, tokens: Some(tokens) };
            tasks.keep("workload_api", (socket, Arc::new(sources)), |(socket, sources)| {
                Box::pin(async {
                    if let Some(listener) = another(socket.try_clone().and_then(UnixListener::from_std)) {
                        workload_api::serve(listener, sources.clone()).await;
                    }
                })
            });
        }
        let reloader = Reloader {
            config: config.clone(),
            shared: shared.clone(),
            credentials: credentials.clone(),
            certificates: certificates.clone(),
            identities,
            keeper: keeper.clone(),
        };
        registering::keep_registered(&tasks, &config, &shared, &credentials, &registrations);
        let hangup = Arc::new(Notify::new());
        let reloading = tasks.keep("reload", (reloader, reloads, hangup.clone()), |(reloader, orders, hangup)| {
            Box::pin(reloader.serve(orders, hangup))
        });
        Ok(App {
            config,
            selectors,
            shared,
            conductor,
            workers,
            credentials,
            certificates,
            keeper,
            raw,
            capture,
            reloading,
            hangup,
            leaving: Leaving { registrations, hands_over },
            _only_one: only_one,
        })
    }

    /// Serves until SIGTERM or SIGINT, then drains.
    pub async fn run(mut self) -> io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "meshd ready");
        let mut renewing = true;
        let mut forget = tokio::time::interval(FORGET_EVERY);
        forget.reset_after(SETTLED_AFTER);
        self.follow_selectors();
        loop {
            tokio::select! {
                _ = forget.tick() => memory::forget_rare_code(),
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => {
                    self.shared.telemetry.access_log.reopen();
                    self.hangup.notify_one();
                }
                changed = self.credentials.changed(), if renewing => {
                    renewing = changed.is_ok();
                    if renewing {
                        self.certificates.install(self.credentials.borrow_and_update().clone());
                        self.follow_selectors();
                    } else {
                        tracing::error!("certificates are not renewed any more; restart meshd before they expire");
                    }
                }
            }
        }
        self.drain(terminate).await;
        Ok(())
    }

    /// Whose identities are is the PKI's to say, too: what it says now is compared with enrol.d again.
    fn follow_selectors(&mut self) {
        let selectors = &self.credentials.borrow().selectors;
        if self.selectors != *selectors {
            self.selectors.clone_from(selectors);
            self.hangup.notify_one();
        }
    }

    async fn drain(self, mut again: tokio::signal::unix::Signal) {
        let limit = Duration::from_secs(self.config.proxy.drain_timeout_s);
        tracing::info!(under_way = self.workers.work.under_way(), "draining");
        tokio::select! {
            () = self.leaving.announce() => {}
            _ = again.recv() => tracing::warn!("told to stop again: peers may not know yet that this host leaves"),
        }
        // New connections to raw addresses go direct from now on; captured ones stay with us.
        self.reloading.abort();
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
        self.leaving.leave().await;
        self.conductor.enter(Stage::Stopped);
        // Rules stay on purpose: virtual IPs are refused and strict ports closed until meshd is back or reverted.
        self.workers.join();
        self.capture.abort();
        // After the last socket: what closing it said must still reach the application.
        self.keeper.stop().await;
        if let Err(error) = dns::integrate::release(&self.config.dns) {
            tracing::error!(%error, "names still come to meshd, which is gone; `meshd intercept revert` takes that back");
        }
        // Best effort: the next start replaces a stale socket.
        for socket in [self.config.admin_socket(), self.config.api_socket()] {
            let _ = std::fs::remove_file(socket);
        }
        tracing::info!("meshd stopped");
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

/// Units restart, and others take their ports: whoever is enrolled by a port is looked for again and again.
async fn follow_ports(shared: &Shared) {
    loop {
        shared.ports.refresh_if_due(&shared.enrolment.load(), Instant::now());
        tokio::time::sleep(PORTS_TICK).await;
    }
}

async fn follow_directory(shared: &Shared, directory: &mut watch::Receiver<Arc<meshd_discovery::Directory>>) {
    while directory.changed().await.is_ok() {
        let current = directory.borrow_and_update().clone();
        shared.directory.store(current);
    }
    // Discovery is gone; what it said last stays.
    std::future::pending::<()>().await;
}

/// Answers questions for names.
fn keep_answering(
    tasks: &Supervisor,
    config: &Config,
    shared: &Arc<Shared>,
    (udp, tcp): (UdpSocket, TcpListener),
    directory: watch::Receiver<Arc<meshd_discovery::Directory>>,
) -> Result<(), StartError> {
    let udp = start!(udp.into_std(), "[dns] listen {} (UDP)", config.dns.listen)?;
    let tcp = start!(tcp.into_std(), "[dns] listen {} (TCP)", config.dns.listen)?;
    let answering = (udp, tcp, config.dns.clone(), shared.clone(), directory);
    tasks.keep("dns", answering, |(udp, tcp, config, shared, directory)| {
        Box::pin(async {
            let udp = another(udp.try_clone().and_then(UdpSocket::from_std));
            let tcp = another(tcp.try_clone().and_then(TcpListener::from_std));
            if let (Some(udp), Some(tcp)) = (udp, tcp) {
                let (vips, telemetry) = (shared.vips.clone(), shared.telemetry.clone());
                dns::serve(udp, tcp, config.clone(), directory.clone(), vips, shared.lookups.clone(), telemetry).await;
            }
        })
    });
    Ok(())
}
