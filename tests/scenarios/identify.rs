//! Who opened a connection: sockets that are closing, tuples that are used again, ports the kernel rewrites.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail, ensure};
use meshd_sys::conntrack::Conntrack;
use meshd_sys::sock_diag::{Lookup, SocketDiag};
use meshd_tests::backend;
use meshd_tests::lab::Lab;
use meshd_tests::load::{self, LoadReport};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{Plan, Serve};
use meshd_tests::process::Program;
use meshd_tests::wait::{until, until_some};
use nix::sys::signal::Signal;
use nix::sys::stat::fstat;
use socket2::{Domain, Socket, Type};

use crate::DEADLINE;
use crate::enrol::{enrolled, fresh};

/// The kernel's TIME_WAIT (include/net/tcp_states.h).
const TIME_WAIT: u8 = 6;

fn inode(socket: &impl AsFd) -> Result<u64> {
    Ok(fstat(socket)?.st_ino)
}

/// Asks as a worker does, and says whether the answer is the very socket.
fn ensure_owned_by(diag: &mut SocketDiag, client: &TcpStream, address: SocketAddr, original: SocketAddr) -> Result<()> {
    let Lookup::Owned(owner) = diag.owner(address, original)? else { bail!("{address} has no owner") };
    ensure!(u64::from(owner.inode) == inode(client)?, "{address} is taken for another socket: {owner:?}");
    Ok(())
}

/// A connection from a port of the caller's choice, also when an earlier one from there is in TIME_WAIT.
pub(crate) fn connect_from(local: SocketAddr, remote: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&local.into())?;
    socket.connect(&remote.into())?;
    Ok(socket.into())
}

#[test]
fn a_connection_in_time_wait_is_nobodys_and_never_answers_for_the_next_one_of_its_tuple() -> Result<()> {
    let lab = Lab::new(&["alone"])?;
    lab.host("alone").within(|| -> Result<()> {
        let mut diag = SocketDiag::open()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let remote = listener.local_addr()?;
        let first = connect_from("127.0.0.1:0".parse()?, remote)?;
        let local = first.local_addr()?;
        let (mut served, _) = listener.accept()?;
        // Whoever closes first is the one in TIME_WAIT.
        drop(first);
        served.read_to_end(&mut Vec::new())?;
        drop(served);
        let in_time_wait = || matches!(diag.owner(local, remote), Ok(Lookup::Orphaned { state: TIME_WAIT }));
        until(DEADLINE, "the first connection in TIME_WAIT, without owner", in_time_wait)?;

        // The kernel gives the tuple away again when a second has passed.
        let again = || connect_from(local, remote).ok();
        let second = until_some(DEADLINE, "a second connection of the same tuple", again)?;
        ensure!(second.local_addr()? == local, "not the same tuple");
        ensure_owned_by(&mut diag, &second, local, remote)
    })?
}

#[test]
fn a_source_port_that_redirect_rewrites_is_found_in_conntrack_every_time() -> Result<()> {
    const DESTINATIONS: u8 = 5;
    const ROUNDS: usize = 200;
    let lab = Lab::new(&["alone"])?;
    let host = lab.host("alone");
    // Few ports, so that every one is used for every destination.
    few_ports(&host, "20000 20255")?;
    host.nft(
        "table ip redirected { chain output { type nat hook output priority -100; \
         ip daddr 10.99.0.0/24 tcp dport 80 redirect to :15001 ; } ; }\n",
    )?;
    let rewritten = host.within(|| -> Result<usize> {
        let (mut diag, mut conntrack) = (SocketDiag::open()?, Conntrack::open()?);
        let listener = TcpListener::bind("127.0.0.1:15001")?;
        let mut rewritten = 0;
        for _ in 0..ROUNDS {
            for last in 1..=DESTINATIONS {
                let original = SocketAddr::from(([10, 99, 0, last], 80));
                let client = TcpStream::connect(original)?;
                let (mut served, peer) = listener.accept()?;
                let found = conntrack.original_source(peer, listener.local_addr()?)?;
                let found = found.with_context(|| format!("conntrack does not know {peer}"))?;
                ensure!(found == client.local_addr()?, "{found} is not {:?}", client.local_addr());
                ensure_owned_by(&mut diag, &client, found, original)?;
                rewritten += usize::from(peer.port() != found.port());
                drop(client);
                served.read_to_end(&mut Vec::new())?;
            }
        }
        Ok(rewritten)
    })??;
    // As ports come around for the next destination, most collide.
    ensure!(rewritten > ROUNDS, "only {rewritten} were rewritten: the test shows nothing");
    Ok(())
}

fn few_ports(host: &meshd_tests::host::Host, range: &str) -> Result<()> {
    host.command("sysctl", &["-qw", &format!("net.ipv4.ip_local_port_range={range}")])?;
    Ok(())
}

#[test]
fn thousands_of_connections_to_five_destinations_from_few_ports_are_all_identified() -> Result<()> {
    const PORTS: [u16; 5] = [80, 81, 82, 83, 84];
    const EACH: u32 = 600;
    let mut plan = Plan::shop_with_one_server();
    plan.services[0].ports = PORTS.to_vec();
    for workload in plan.hosts.iter_mut().flat_map(|host| &mut host.workloads).filter(|it| it.name == "payments") {
        workload.serve = PORTS.map(|port| Serve::new("payments.shop", port, "127.0.0.1:8080", false)).to_vec();
    }
    let mesh = Mesh::start(plan)?;
    few_ports(&mesh.host("web"), "20000 20999")?;
    let requests = EACH.to_string();
    let load = |port: u16| {
        let target = format!("payments.shop.mesh:{port}");
        let args = ["load", "--target", &target, "--per-request", "--requests", &requests, "--size", "16"];
        mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &args))
    };
    for process in PORTS.map(load) {
        let report: LoadReport = load::report(&process?.finish(DEADLINE)?)?;
        ensure!(report.ok == u64::from(EACH) && report.failed == 0, "{report:?}");
    }
    let metrics = mesh.daemon("web").metrics()?;
    let unknown = metrics.sum("meshd_identify_unknown_total", &[]);
    ensure!(unknown == 0.0 && metrics.sum("meshd_refused_total", &[]) == 0.0, "{unknown} unknown");
    let checkout = [("direction", "outbound"), ("peer", "src"), ("unit", "checkout.service")];
    let opened = metrics.sum("tcp_open_total", &checkout);
    ensure!(opened == f64::from(EACH) * 5.0, "{opened} were checkout's");
    Ok(())
}

#[test]
fn a_caller_that_is_gone_before_it_is_looked_at_is_refused_and_never_root() -> Result<()> {
    const CALLS: u32 = 20;
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    // A socket without process says uid 0: whoever is enrolled as that must not be given the connection.
    enrolled(&mesh, "web", &["--uid", "0", "--as", "ns/shop/sa/billing"])?;
    let address = mesh.virtual_address("web", "payments.shop.mesh")?;
    let daemon = mesh.daemon("web");
    daemon.stand_still()?;
    let script = format!("for i in $(seq {CALLS}); do exec 3<>/dev/tcp/{address}/80; exec 3>&-; done");
    let called = mesh.in_unit("web", &fresh("hasty"), Program::new("bash").args(["-c", &script]));
    let called = mesh.host("web").run(&called);
    daemon.signal(Signal::SIGCONT)?;
    called?.expect_success("connecting and closing while meshd stands still")?;

    let refused = || daemon.metrics().unwrap_or_default().sum("meshd_refused_total", &[]);
    until(DEADLINE, "every one of them counted", || refused() >= f64::from(CALLS))?;
    // Recorded by the kernel when they connected, or not known any more.
    let error = if backend::records_owners() { "unenrolled" } else { "identify_unknown" };
    ensure!(crate::refused(&mesh, "web", error)? == f64::from(CALLS), "refused as something else than {error}");
    let billing = mesh.spiffe_id("billing");
    ensure!(daemon.access_log().iter().all(|event| event.client_id.as_deref() != Some(&billing)), "taken for root");
    Ok(())
}
