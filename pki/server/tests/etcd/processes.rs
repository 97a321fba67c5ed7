//! Servers as processes, one of which stands still, and hosts that use both.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_pki::commands::{TokenRequest, create_token};
use meshd_pki_client::{Agent, Credentials, join};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;

use crate::cluster::until;
use crate::desk::Desk;

const HOSTS: usize = 12;
/// Renewed after 5.4 to 8.1 s; what is left is the budget for a server that does not answer.
const LEAF_S: &str = "18";
/// Five leases: as 75 s to the default of 15 s.
const STANDS_STILL: Duration = Duration::from_secs(20);

struct Server {
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
        Server { process, address, metrics }
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

/// A certificate that has ended is a failed renewal, whatever came later.
fn assert_whole(hosts: &[watch::Receiver<Arc<Credentials>>], when: &str) {
    for (n, host) in hosts.iter().enumerate() {
        let left = host.borrow().host.not_after.duration_since(SystemTime::now());
        assert!(left.is_ok(), "{when}: the certificate of host-{n} ended");
    }
}

#[test]
fn a_leader_that_stands_still_is_replaced_and_its_hosts_renew_with_the_other() {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config()).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(stand_still(&desk));
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
    let mut agents = tokio::task::JoinSet::new();
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
    let first: Vec<String> = hosts.iter().map(|host| host.borrow().host.serial.clone()).collect();

    a.signal(Signal::SIGSTOP);
    until("the other leads", || b.leads());
    let stood_still = tokio::time::timeout(STANDS_STILL, async {
        loop {
            assert_whole(&hosts, "while one stands still");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    stood_still.await.unwrap_err();
    let renewed = hosts.iter().zip(&first).filter(|(host, first)| host.borrow().host.serial != **first).count();
    assert_eq!(renewed, HOSTS);

    a.signal(Signal::SIGCONT);
    until("the one that stood still knows that it does not lead", || !a.leads());
    assert!(b.leads());
    a.signal(Signal::SIGKILL);
    until("all have renewed since", || {
        assert_whole(&hosts, "after one was killed");
        let second = hosts.iter().filter(|host| {
            let svid = host.borrow().host.clone();
            svid.not_after.duration_since(SystemTime::now()).is_ok_and(|left| left > Duration::from_secs(10))
        });
        second.count() == HOSTS
    });
}
