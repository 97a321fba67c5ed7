//! A fleet of real agents against the real server: all of them want certificates at the same moment, right after the
//! server was killed and started again. `MESHD_SOAK` set: 10,000 of them.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use meshd_identity::{JoinToken, SpiffeId, TrustDomain};
use meshd_pki::commands::{TokenRequest, create_token};
use meshd_pki_client::{Agent, Credentials, RenewalMetrics, join};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

const WORKLOADS: usize = 10;
/// Enrolling is not what is measured.
const JOINING_AT_ONCE: usize = 16;
/// Long enough to enrol all of them before the first is due by itself.
const LEAF_TTL: &str = "40m";
/// What a failing test is bounded by.
const PATIENCE: Duration = Duration::from_secs(1200);

fn agents() -> usize {
    let asked = std::env::var("MESHD_FLEET").ok().and_then(|count| count.parse().ok());
    asked.unwrap_or(if std::env::var_os("MESHD_SOAK").is_some() { 10_000 } else { 2_000 })
}

fn domain() -> TrustDomain {
    "fleet.example".parse().unwrap()
}

/// The server; killed when dropped.
struct Server(Child);

impl Server {
    fn start(state: &Path, listen: &str) -> (Server, String) {
        let state = state.to_str().unwrap();
        // Under the soft limit of descriptors that systemd gives: more hosts than that must find a place.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -Sn 1024; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_meshd-pki")]);
        command.args(["run", "--state", state, "--listen", listen, "--leaf-ttl", LEAF_TTL]).env("RUST_LOG", "error");
        let mut server = Server(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut ready = String::new();
        BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        let address = ready.split("listen=").nth(1).and_then(|rest| rest.split_whitespace().next());
        (server, address.unwrap_or_else(|| panic!("not ready: {ready}")).to_owned())
    }

    /// The most memory it ever had, in MiB.
    fn peak_mib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }

    fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

struct Member {
    credentials: watch::Receiver<Arc<Credentials>>,
    metrics: Arc<RenewalMetrics>,
    wanted: watch::Sender<BTreeSet<SpiffeId>>,
}

fn workloads() -> Vec<SpiffeId> {
    (0..WORKLOADS).map(|n| SpiffeId::workload(&domain(), "shop", &format!("w{n}")).unwrap()).collect()
}

/// Where agents keep what they hold: in memory where that can be, for a real host has a disk of its own.
fn hosts_directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

async fn enrol(state: PathBuf, hosts: &Path, address: &str) -> Vec<Member> {
    let address = address.to_owned();
    // Before anybody joins: a command that waits for its turn to write gives up after 5 s, on a busy machine.
    let making = move || (0..agents()).map(|n| token(&state, &format!("h{n}"), &address)).collect::<Vec<_>>();
    let tokens = tokio::task::spawn_blocking(making).await.unwrap();
    let (permits, mut joining) = (Arc::new(Semaphore::new(JOINING_AT_ONCE)), JoinSet::new());
    for (n, token) in tokens.into_iter().enumerate() {
        let (permits, directory) = (permits.clone(), hosts.join(n.to_string()));
        joining.spawn(async move {
            let _permit = permits.acquire().await.unwrap();
            join(&directory, &token, None).await.unwrap();
            directory
        });
    }
    let mut members = Vec::new();
    while let Some(directory) = joining.join_next().await {
        let agent = Agent::open(&directory.unwrap()).unwrap();
        let (wanted, wishes) = watch::channel(BTreeSet::new());
        members.push(Member { credentials: agent.watch(), metrics: agent.metrics(), wanted });
        tokio::spawn(agent.run(wishes));
    }
    members
}

fn token(state: &Path, host: &str, address: &str) -> JoinToken {
    let allow: Vec<String> = workloads().iter().map(|id| id.short().to_owned()).collect();
    let pki = [address.to_owned()];
    let request =
        TokenRequest { host, allow: &allow, pki: &pki, ttl: Duration::from_secs(3600), ..TokenRequest::default() };
    create_token(state, &request, SystemTime::now()).unwrap()
}

fn quantile(sorted: &[Duration], percent: usize) -> f64 {
    sorted[(sorted.len() * percent).div_ceil(100).max(1) - 1].as_secs_f64()
}

fn raise_file_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_that_wants_everything_at_once_gets_it() {
    raise_file_limit();
    let (state, hosts) = (tempfile::tempdir().unwrap(), hosts_directory());
    let state_dir = state.path().join("pki");
    meshd_pki::state_dir::init(&state_dir, &domain(), None, SystemTime::now()).unwrap();
    let (server, address) = Server::start(&state_dir, "127.0.0.1:0");
    let began = Instant::now();
    let mut members = enrol(state_dir.clone(), hosts.path(), &address).await;
    let (enrolled, peak_enrolling) = (began.elapsed(), server.peak_mib());

    drop(server);
    let (server, _) = Server::start(&state_dir, &address);
    let wishes: BTreeSet<SpiffeId> = workloads().into_iter().collect();
    let began = Instant::now();
    for member in &members {
        member.wanted.send_replace(wishes.clone());
    }
    let mut waiting = JoinSet::new();
    for member in &members {
        let mut credentials = member.credentials.clone();
        waiting.spawn(async move {
            let all = credentials.wait_for(|held| held.workloads.len() == WORKLOADS);
            timeout(PATIENCE, all).await.expect("never all certificates").unwrap();
            began.elapsed()
        });
    }
    let mut took: Vec<Duration> = waiting.join_all().await;
    took.sort();
    let retries: u64 = members.iter().map(|member| member.metrics.refreshes_failed()).sum();
    let now = SystemTime::now();
    let ended = members.iter_mut().filter(|member| member.credentials.borrow().host.not_after <= now).count();
    println!(
        "figure: {} agents with {WORKLOADS} certificates each: enrolled in {:.1} s (server {peak_enrolling} MiB at most); \
         all at once after a kill: p50 {:.2} s, p99 {:.2} s, last {:.2} s, {:.0} certificates/s, {retries} attempts \
         failed and were repeated, {ended} certificates ended; server {} MiB at most, {:.1} s of CPU",
        members.len(),
        enrolled.as_secs_f64(),
        quantile(&took, 50),
        quantile(&took, 99),
        quantile(&took, 100),
        (members.len() * WORKLOADS) as f64 / quantile(&took, 100),
        server.peak_mib(),
        server.cpu_seconds(),
    );
    assert_eq!(ended, 0);
    assert!(server.peak_mib() < 1024, "{} MiB", server.peak_mib());
}
