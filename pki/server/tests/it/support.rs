//! A PKI with its server, and hosts that join it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use meshd_identity::statements::DenySet;
use meshd_identity::{JoinToken, PkiPin, SpiffeId, TrustDomain};
use meshd_pki::commands::{TokenRequest, create_token, pin};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::serve::serve;
use meshd_pki::{Options, Pki, state_dir};
use meshd_pki_client::{Agent, Credentials, JoinError, Line, Proof, RenewalMetrics, Surroundings, join_in};
use rcgen::KeyPair;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{interval, timeout};

/// Far more than anything here needs; a test that hangs fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn domain() -> TrustDomain {
    "prod.example.org".parse().unwrap()
}

pub(crate) fn workload(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "shop", name).unwrap()
}

pub(crate) struct Lab {
    dir: TempDir,
    lifetimes: Lifetimes,
    attestors: Option<PathBuf>,
    address: SocketAddr,
    /// Where hosts are told to come, if not there.
    way: Option<SocketAddr>,
    /// Seconds the clock of everybody here is ahead.
    turned: Arc<AtomicU64>,
    running: Option<(Arc<Pki>, oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Lab {
    pub(crate) async fn start() -> Lab {
        Lab::start_with(Lifetimes::default()).await
    }

    pub(crate) async fn start_with(lifetimes: Lifetimes) -> Lab {
        Lab::start_of(domain(), lifetimes).await
    }

    pub(crate) async fn start_of(domain: TrustDomain, lifetimes: Lifetimes) -> Lab {
        let dir = tempfile::tempdir().unwrap();
        state_dir::init(&dir.path().join("pki"), &domain, None, SystemTime::now()).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (attestors, way, turned, running) = (None, None, Arc::default(), None);
        let mut lab = Lab { dir, lifetimes, attestors, address: any, way, turned, running };
        lab.run().await;
        lab
    }

    /// With a file that says by what else than tokens hosts come in; it may name files beside it.
    pub(crate) async fn start_with_attestors(files: &[(&str, &str)]) -> Lab {
        let mut lab = Lab::start().await;
        lab.stop().await;
        for (name, text) in files {
            std::fs::write(lab.dir.path().join(name), text.replace("@DIR@", &lab.dir.path().display().to_string()))
                .unwrap();
        }
        lab.attestors = Some(lab.dir.path().join("attestors.toml"));
        lab.run().await;
        lab
    }

    /// Another lab of whoever copied all that the PKI of this one has, keys included.
    pub(crate) async fn copied(&mut self) -> Lab {
        self.stop().await;
        let mut copy = Lab::start_with(self.lifetimes).await;
        copy.stop().await;
        std::fs::remove_dir_all(copy.state()).unwrap();
        std::fs::create_dir(copy.state()).unwrap();
        let files = std::fs::read_dir(self.state()).unwrap().map(Result::unwrap);
        for file in files.filter(|file| file.file_type().unwrap().is_file()) {
            std::fs::copy(file.path(), copy.state().join(file.file_name())).unwrap();
        }
        copy.turned = self.turned.clone();
        self.run().await;
        copy.run().await;
        copy
    }

    /// Starts the server on the address it had before, if any.
    pub(crate) async fn run(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let options = Options {
            advertise: vec![self.advertised()],
            attestors: self.attestors.clone(),
            ..Options::with_clock(self.lifetimes, self.surroundings().clock)
        };
        let pki = Arc::new(Pki::open(&self.state(), options).unwrap());
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(serve(pki.clone(), listener, async move {
            _ = stopped.await;
        }));
        self.running = Some((pki, stop, server));
    }

    pub(crate) async fn stop(&mut self) {
        let (pki, stop, server) = self.running.take().expect("the server runs");
        stop.send(()).unwrap();
        timeout(PATIENCE, server).await.expect("the server stops in time").unwrap();
        // What answers a stream notices by itself that the server stops.
        let alone = async {
            while Arc::strong_count(&pki) > 1 {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, alone).await.expect("nothing of the stopped server still runs");
    }

    /// Clocks of this lab, for whoever takes part in it.
    pub(crate) fn surroundings(&self) -> Surroundings {
        let turned = self.turned.clone();
        Surroundings::with_clock(Arc::new(move || SystemTime::now() + Duration::from_secs(turned.load(SeqCst))))
    }

    pub(crate) fn now(&self) -> SystemTime {
        (self.surroundings().clock)()
    }

    /// Time passes for everybody, and a running PKI does in it what is due.
    pub(crate) fn pass(&self, seconds: u64) {
        self.turned.fetch_add(seconds, SeqCst);
        if let Some((pki, ..)) = &self.running {
            pki.maintain().unwrap();
        }
    }

    pub(crate) fn pki(&self) -> &Pki {
        &self.running.as_ref().expect("the server runs").0
    }

    pub(crate) fn shared(&self) -> Arc<Pki> {
        self.running.as_ref().expect("the server runs").0.clone()
    }

    pub(crate) fn pin(&self) -> PkiPin {
        pin(&self.state(), &[self.address()]).unwrap()
    }

    /// A file beside the state directory.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.dir.path().join("pki")
    }

    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    fn advertised(&self) -> String {
        self.way.unwrap_or(self.address).to_string()
    }

    /// From now on hosts come another way than straight.
    pub(crate) async fn lead_by(&mut self, way: SocketAddr) {
        self.stop().await;
        self.way = Some(way);
        self.run().await;
    }

    pub(crate) fn host_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join("hosts").join(name)
    }

    pub(crate) fn token(&self, host: &str, allow: &[&SpiffeId]) -> JoinToken {
        let allow: Vec<String> = allow.iter().map(|id| id.short().to_owned()).collect();
        let pki = [self.advertised()];
        let request =
            TokenRequest { host, allow: &allow, pki: &pki, ttl: Duration::from_secs(3600), ..TokenRequest::default() };
        create_token(&self.state(), &request, self.now()).unwrap()
    }

    pub(crate) async fn join(&self, host: &str, allow: &[&SpiffeId]) -> Result<Credentials, JoinError> {
        let token = self.token(host, allow);
        let proof = Proof::JoinToken(token.clone());
        join_in(&self.host_dir(host), &token.pin(), &proof, None, &self.surroundings()).await
    }

    pub(crate) fn host(&self, name: &str) -> Host {
        self.host_and_line(name).0
    }

    pub(crate) fn host_and_line(&self, name: &str) -> (Host, Line) {
        let agent = Agent::open_in(&self.host_dir(name), self.surroundings()).unwrap();
        let line = agent.line();
        (Host::run(agent), line)
    }

    pub(crate) fn audit_log(&self) -> String {
        std::fs::read_to_string(self.state().join("audit.jsonl")).unwrap()
    }
}

/// A running agent, its wishes and its credentials.
pub(crate) struct Host {
    pub(crate) credentials: watch::Receiver<Arc<Credentials>>,
    pub(crate) metrics: Arc<RenewalMetrics>,
    pub(crate) denied: watch::Receiver<Arc<DenySet>>,
    wanted: watch::Sender<BTreeSet<SpiffeId>>,
    agent: JoinHandle<()>,
}

impl Host {
    pub(crate) fn run(agent: Agent) -> Host {
        let (wanted, wishes) = watch::channel(BTreeSet::new());
        let (credentials, metrics, denied) = (agent.watch(), agent.metrics(), agent.denied());
        Host { credentials, metrics, denied, wanted, agent: tokio::spawn(agent.run(wishes)) }
    }

    pub(crate) fn want(&self, ids: &[&SpiffeId]) {
        self.wanted.send_replace(ids.iter().map(|id| (*id).clone()).collect());
    }

    pub(crate) fn now(&self) -> Arc<Credentials> {
        self.credentials.borrow().clone()
    }

    /// Waits for credentials like this.
    pub(crate) async fn until(&mut self, like: impl Fn(&Credentials) -> bool) -> Arc<Credentials> {
        let found = timeout(PATIENCE, self.credentials.wait_for(|held| like(held))).await;
        let error = self.metrics.last_error();
        found.unwrap_or_else(|_| panic!("the credentials never came; last error: {error:?}")).unwrap().clone()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.agent.abort();
    }
}

/// Waits for something that announces itself nowhere.
pub(crate) async fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let mut ticks = interval(Duration::from_millis(10));
    let waiting = async {
        while !is_so() {
            ticks.tick().await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A certificate request over a key.
pub(crate) fn request_over(key: &KeyPair) -> Vec<u8> {
    rcgen::CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

pub(crate) async fn openssl(arguments: &[&str], stdin: &[u8]) -> Output {
    let arguments: Vec<String> = arguments.iter().map(|one| (*one).to_owned()).collect();
    let stdin = stdin.to_vec();
    let run = move || {
        use std::io::Write;
        use std::process::Stdio;
        let mut command = Command::new("openssl");
        command.args(&arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the openssl program is installed (Debian package openssl)");
        child.stdin.take().unwrap().write_all(&stdin).unwrap();
        child.wait_with_output().unwrap()
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}
