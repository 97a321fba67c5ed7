//! A host of the mesh: the real data plane, with certificates from an authority in memory.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwap;
use meshd::capture::{OwnerRecord, Recovery};
use meshd::dns::Vips;
use meshd::enrol::{self, Enrolment, PortWatch, Reserved};
use meshd::fault::Fault;
use meshd::lifecycle::{self, Conductor, Stage};
use meshd::proxy::{self, Listeners, Locality, ProxyConfig, Shared, Workers};
use meshd::telemetry::{AccessLog, Direction, Telemetry};
use meshd::transport::tls::TlsState;
use meshd_discovery::{Directory, Endpoint, Health, Service, Transport};
use meshd_identity::SpiffeId;
use meshd_pki_client::Credentials;
use meshd_pki_client::fake::FakeCa;
use meshd_sys::sockets::{self, Mark};
use socket2::SockRef;
use tempfile::TempDir;
use tokio::sync::watch;

use super::{PATIENCE, domain, identity, until};

/// Loopback addresses nobody uses: a listener on all addresses gets what is sent to them, as TPROXY would give it.
const VIPS: &str = "127.77.0.0/16";

/// What a host is made of.
pub(crate) struct Plan {
    enrolment: String,
    owners: Vec<SpiffeId>,
    default_identity: Option<SpiffeId>,
    workers: usize,
    connect_timeout: Duration,
}

impl Plan {
    pub(crate) fn new() -> Plan {
        Plan {
            enrolment: String::new(),
            owners: Vec::new(),
            default_identity: None,
            workers: 1,
            // Long: a busy machine is no reason to leave a peer.
            connect_timeout: PATIENCE,
        }
    }

    /// Enrols the workload `name`; it serves the given (service, port) at the given addresses.
    pub(crate) fn workload(self, name: &str, serves: &[(&str, u16, SocketAddr)]) -> Plan {
        let unit = format!("unit = \"{name}.service\"");
        self.selected(&unit, name, serves)
    }

    /// Enrols whoever runs this test as the workload `name`.
    pub(crate) fn caller(self, name: &str) -> Plan {
        let uid = format!("uid = {}", nix::unistd::getuid());
        self.selected(&uid, name, &[])
    }

    fn selected(mut self, selector: &str, name: &str, serves: &[(&str, u16, SocketAddr)]) -> Plan {
        self.enrolment += &format!("[[workload]]\n{selector}\nnamespace = \"shop\"\nname = \"{name}\"\n");
        for (service, port, deliver) in serves {
            self.enrolment += "[[workload.serve]]\n";
            self.enrolment += &format!("service = \"{service}\"\nport = {port}\ndeliver = \"{deliver}\"\n");
        }
        self.owners.push(identity(name));
        self
    }

    /// What callers without SNI are shown.
    pub(crate) fn default_identity(mut self, name: &str) -> Plan {
        self.default_identity = Some(identity(name));
        self
    }

    pub(crate) fn workers(mut self, workers: usize) -> Plan {
        self.workers = workers;
        self
    }

    pub(crate) fn connect_timeout(mut self, timeout: Duration) -> Plan {
        self.connect_timeout = timeout;
        self
    }

    pub(crate) fn start(self, authority: &FakeCa) -> Host {
        let credentials = authority.credentials("host", &self.owners);
        self.start_with(&credentials)
    }

    pub(crate) fn start_with(self, credentials: &Credentials) -> Host {
        let directory = tempfile::tempdir().unwrap();
        let tls = TlsState::build(credentials, self.default_identity.as_ref(), 0).unwrap();
        let access_log = AccessLog::to_file(&directory.path().join("access.log")).unwrap();
        let shared = Arc::new(Shared {
            config: self.config(),
            mark: Mark(0),
            directory: ArcSwap::default(),
            enrolment: ArcSwap::from_pointee(enrolled(directory.path(), &self.enrolment)),
            attestor: Arc::default(),
            ports: PortWatch::default(),
            tls: ArcSwap::from_pointee(tls),
            raw: ArcSwap::default(),
            vips: Arc::new(vips(directory.path())),
            telemetry: Telemetry::new(self.workers, access_log),
            locality: Locality::default(),
            suspects: meshd_discovery::Suspects::ignored(),
            lookups: meshd_discovery::Lookups::off(),
        });
        Host::run(shared, self, directory)
    }
}

impl Plan {
    fn config(&self) -> ProxyConfig {
        ProxyConfig { connect_timeout_ms: self.connect_timeout.as_millis() as u64, ..ProxyConfig::default() }
    }
}

fn enrolled(directory: &Path, text: &str) -> Enrolment {
    let enrol = directory.join("enrol.d");
    std::fs::create_dir(&enrol).unwrap();
    std::fs::write(enrol.join("10-test.toml"), text).unwrap();
    enrol::load(&enrol, &domain(), &Reserved::default()).unwrap()
}

fn vips(directory: &Path) -> Vips {
    Vips::open(&directory.join("vips.json"), VIPS.parse().unwrap(), "fd77::/64".parse().unwrap()).unwrap()
}

/// A running host; stops when dropped.
pub(crate) struct Host {
    pub(crate) shared: Arc<Shared>,
    /// Where peers dial it.
    pub(crate) mesh: SocketAddr,
    /// Where captured connections arrive, whatever address they were sent to.
    pub(crate) captured: SocketAddr,
    /// The same, dialled by its own address.
    pub(crate) capture_itself: SocketAddr,
    default_identity: Option<SpiffeId>,
    conductor: Conductor,
    tls_generation: watch::Sender<u64>,
    workers: Option<Workers>,
    directory: Option<TempDir>,
}

impl Host {
    fn run(shared: Arc<Shared>, plan: Plan, directory: TempDir) -> Host {
        let (conductor, lifecycle) = lifecycle::channel();
        let (tls_generation, generations) = watch::channel(0);
        let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (mut mesh, mut everywhere, mut itself) = (loopback, SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), loopback);
        let listeners = (0..plan.workers)
            .map(|_| Listeners {
                mesh: vec![listen(&mut mesh)],
                captured: vec![listen(&mut everywhere), listen(&mut itself)],
                recovery: Recovery::Transparent,
                owners: OwnerRecord::default(),
            })
            .collect();
        let workers = proxy::start(&shared, listeners, &lifecycle, &generations).unwrap();
        Host {
            shared,
            mesh,
            captured: everywhere,
            capture_itself: itself,
            default_identity: plan.default_identity,
            conductor,
            tls_generation,
            workers: Some(workers),
            directory: Some(directory),
        }
    }

    pub(crate) fn telemetry(&self) -> &Telemetry {
        &self.shared.telemetry
    }

    pub(crate) fn enter(&self, stage: Stage) {
        self.conductor.enter(stage);
    }

    /// Takes new certificates into use, as the daemon does after a renewal.
    pub(crate) fn rotate(&self, credentials: &Credentials) {
        let generation = *self.tls_generation.borrow() + 1;
        let tls = TlsState::build(credentials, self.default_identity.as_ref(), generation).unwrap();
        self.shared.tls.store(Arc::new(tls));
        self.tls_generation.send_replace(generation);
    }

    /// Announces a service on the port where captured connections arrive; the address to dial it by.
    pub(crate) fn announce(&self, endpoints: Vec<Endpoint>) -> SocketAddr {
        let name = endpoints[0].service.clone();
        let port = self.captured.port();
        let service = Service {
            name: name.clone(),
            ports: vec![meshd_discovery::ServicePort { port, protocol: meshd_discovery::Protocol::Tcp }],
            identities: endpoints.iter().map(|endpoint| endpoint.identity.clone()).collect(),
            allow_plaintext: true,
            addresses: vec![],
            source: "test".into(),
            endpoints: endpoints.into_iter().map(|endpoint| Arc::new(Endpoint { port, ..endpoint })).collect(),
        };
        self.shared.directory.store(Arc::new(Directory::from_services([Arc::new(service)])));
        let vip = self.shared.vips.assign(&name).unwrap();
        SocketAddr::from((vip.v4, port))
    }

    /// What a drain still waits for.
    pub(crate) fn under_way(&self) -> u64 {
        self.workers.as_ref().unwrap().work.under_way()
    }

    pub(crate) fn failed_handshakes(&self) -> u64 {
        self.telemetry().handshakes.accept_failed.load(Ordering::Relaxed)
    }

    pub(crate) fn refused(&self, direction: Direction, fault: Fault) -> u64 {
        self.telemetry().refused.value(direction, fault)
    }

    /// Waits until `count` connections have been opened and all of them have ended.
    pub(crate) async fn settled(&self, direction: Direction, count: u64) -> Tally {
        let mut tally = Tally::default();
        until(&format!("{count} {} connections to end", direction.label()), || {
            tally = Tally::of(self, direction);
            tally.closed() >= count
        })
        .await;
        assert_eq!(tally.opened, count, "{tally:?}");
        assert_eq!(tally.closed(), count, "{tally:?}");
        tally
    }

    /// Ends the host and gives what its access log says.
    pub(crate) fn access_log(mut self) -> Vec<serde_json::Value> {
        let directory = self.directory.take().unwrap();
        // The writer ends, everything written, with the last owner of the log.
        drop(self);
        let text = std::fs::read_to_string(directory.path().join("access.log")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn stop(&mut self) {
        self.conductor.enter(Stage::Stopped);
        if let Some(workers) = self.workers.take() {
            workers.join();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Listens, sharing the port with the other workers once the first has got one.
fn listen(address: &mut SocketAddr) -> StdListener {
    let listener = sockets::listen(*address).unwrap();
    // One of them listens on all addresses, to have those nobody uses; other machines are not meant.
    SockRef::from(&listener).bind_device(Some(b"lo")).unwrap();
    *address = listener.local_addr().unwrap();
    listener
}

/// The workload `name` serving `service` at `target`, to be dialled over meshd's own wire; its port comes with
/// the announcement.
pub(crate) fn endpoint(service: &str, name: &str, dial: SocketAddr, target: SocketAddr) -> Endpoint {
    Endpoint {
        service: service.parse().unwrap(),
        port: 0,
        dial,
        target,
        transport: Transport::Meshd,
        identity: identity(name),
        network: "".into(),
        zone: "".into(),
        weight: 100,
        health: Health::Healthy,
        source: "test".into(),
        rank: 0,
        by_authority: true,
        stale: false,
        epoch: 0,
    }
}

/// All connections of one direction, however many edges they make.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) opened: u64,
    pub(crate) connected: u64,
    pub(crate) ok: u64,
    pub(crate) faults: BTreeMap<Fault, u64>,
    pub(crate) up_bytes: u64,
    pub(crate) down_bytes: u64,
}

impl Tally {
    pub(crate) fn of(host: &Host, direction: Direction) -> Tally {
        let mut tally = Tally::default();
        for (_, row) in host.telemetry().edges.rows().iter().filter(|(key, _)| key.direction == direction) {
            tally.opened += row.opened;
            tally.connected += row.connected;
            tally.ok += row.closed_ok;
            tally.up_bytes += row.up_bytes;
            tally.down_bytes += row.down_bytes;
            for (fault, count) in &row.closed_fault {
                *tally.faults.entry(*fault).or_default() += count;
            }
        }
        tally
    }

    pub(crate) fn closed(&self) -> u64 {
        self.ok + self.faults.values().sum::<u64>()
    }
}
