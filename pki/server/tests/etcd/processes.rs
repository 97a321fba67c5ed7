//! Servers as processes, one of which stands still, and hosts that use both.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::SystemTime;

use meshd_pki::commands::{TokenRequest, create_token};
use meshd_pki_client::{Agent, Credentials, join};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::cluster::until;
use crate::desk::Desk;

const HOSTS: usize = 12;
/// Renewed after 18 to 27 s, which is more than four leases. What is left, 33 s, is for a call that was under way when its
/// server stopped (20 s until the host gives it up), another try (1 s) that meets the same server (5 s), and a busy machine.
const LEAF_S: &str = "60";

struct Server {
    name: String,
    process: Child,
    address: String,
    metrics: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

impl Server {
    fn start(desk: &Desk, name: &str) -> Server {
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (address, metrics) = (free(), free());
        let state = desk.state(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_meshd-pki"));
        command.args(["run", "--listen", &address, "--metrics", &metrics, "--leaf-ttl", LEAF_S, "--state"]).arg(state);
        let log = std::fs::File::create(desk.dir.path().join(format!("{name}.log"))).unwrap();
        let mut process = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert!(ready.starts_with("meshd-pki ready"), "{ready}");
        Server { name: name.to_owned(), process, address, metrics }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.process.id()).unwrap()), signal).unwrap();
    }

    fn leads(&self) -> bool {
        let mut stream = TcpStream::connect(&self.metrics).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        page.contains("\nmeshd_pki_leads 1\n")
    }
}

/// Until each host has another certificate. One that ends before is a failed renewal, whatever comes later.
async fn all_renew(hosts: &[watch::Receiver<Arc<Credentials>>], when: &'static str) {
    let mut renewals = JoinSet::new();
    for mut host in hosts.iter().cloned() {
        renewals.spawn(async move {
            let held = host.borrow_and_update().host.clone();
            let left = held.not_after.duration_since(SystemTime::now()).unwrap_or_default();
            let renewed = host.wait_for(|now| now.host.serial != held.serial);
            let in_time = tokio::time::timeout(left, renewed).await;
            assert!(in_time.is_ok(), "{when}: the certificate of {} ended", held.id);
        });
    }
    while let Some(renewal) = renewals.join_next().await {
        renewal.unwrap();
    }
}

#[test]
fn a_leader_that_stands_still_is_replaced_and_its_hosts_renew_with_the_other() {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config()).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(stand_still(&desk));
}

/// A command about authorities, asked of one server through its socket.
fn authority(desk: &Desk, state: &str, verb: &str) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_meshd-pki"));
    let output = command.args(["authority", verb, "--state"]).arg(desk.state(state)).output().unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr))
}

/// Each tells hosts of the other within a second.
async fn know_each_other(desk: &Desk, server: &Server) {
    let pki = [server.address.clone()];
    for n in 0.. {
        let host = format!("scout-{}-{n}", server.process.id());
        let request = TokenRequest { host: &host, pki: &pki, ..TokenRequest::default() };
        let token = create_token(&desk.state("a"), &request, SystemTime::now()).unwrap();
        if join(&desk.dir.path().join(&host), &token, None).await.unwrap().pki.len() == 2 {
            return;
        }
        assert!(n < 100, "it never tells of the other");
    }
}

async fn stand_still(desk: &Desk) {
    let (a, b) = (Server::start(desk, "a"), Server::start(desk, "b"));
    until("one of them leads", || a.leads() != b.leads());
    let (a, b) = if a.leads() { (a, b) } else { (b, a) };
    for server in [&a, &b] {
        know_each_other(desk, server).await;
    }
    let mut hosts = Vec::new();
    let mut agents = JoinSet::new();
    for n in 0..HOSTS {
        let host = format!("host-{n}");
        let pki = [a.address.clone(), b.address.clone()];
        let request = TokenRequest { host: &host, pki: &pki, ..TokenRequest::default() };
        let token = create_token(&desk.state("a"), &request, SystemTime::now()).unwrap();
        let dir = desk.dir.path().join(&host);
        join(&dir, &token, None).await.unwrap();
        let agent = Agent::open(&dir).unwrap();
        hosts.push(agent.watch());
        let (_, wishes) = watch::channel(BTreeSet::new());
        agents.spawn(agent.run(wishes));
    }

    let (stood, led) = (a.name.clone(), b.name.clone());
    a.signal(Signal::SIGSTOP);
    until("the other leads", || b.leads());
    let (ok, said) = authority(desk, &led, "prepare");
    assert!(ok && said.contains("is in the bundle"), "{said}");
    all_renew(&hosts, "while one stands still").await;

    a.signal(Signal::SIGCONT);
    until("the one that stood still knows that it does not lead", || !a.leads());
    assert!(b.leads());
    until("it names the one that leads", || {
        let (ok, said) = authority(desk, &stood, "prepare");
        assert!(!ok, "{said}");
        said.contains("leads and takes the steps")
    });
    let (_, listed) = authority(desk, &stood, "list");
    assert_eq!(
        listed.lines().filter(|line| line.starts_with("root ")).count(),
        2,
        "one prepared a root, once: {listed}"
    );
    a.signal(Signal::SIGKILL);
    all_renew(&hosts, "after one was killed").await;
}
