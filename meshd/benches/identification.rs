//! What knowing the caller costs, per captured connection and for each backend: whom it was for (flow), whose
//! socket it is (sock_diag), which unit that is (cgroup). `cargo bench -p meshd --bench identification`, as root.
//!
//! Everything happens in a network namespace of this process's own, which goes with it.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use meshd::capture::{Backend, BackendKind, CaptureConfig, Facts, Recoverer, Wanted};
use meshd::enrol::CgroupUnits;
use meshd_sys::sock_diag::{Lookup, SocketDiag};
use meshd_sys::sockets;
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::SockRef;

const ROUNDS: usize = 5;
/// Open at once while they are identified, as on a busy host.
const CONNECTIONS: usize = 2000;
const CAPTURE_PORT: u16 = 15001;

/// The steps of one identification.
struct Sample {
    flow: Duration,
    owner: Duration,
    unit: Duration,
}

fn main() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("this needs root: it works in a network namespace of its own")?;
    ip("link set lo up")?;
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
    let wanted = CaptureConfig::default().bare(CAPTURE_PORT);
    let mut samples: Vec<(BackendKind, Vec<Sample>)> = BackendKind::ALL.map(|kind| (kind, Vec::new())).into();
    // In turn, so that a slow minute of the machine hits all alike.
    for _ in 0..ROUNDS {
        for (kind, samples) in &mut samples {
            match measure(kind.open().as_mut(), &wanted) {
                Ok(round) => samples.extend(round),
                Err(error) => println!("{} left out: {error:#}", kind.label()),
            }
        }
    }
    println!("per connection, us: median (99th percentile); {ROUNDS} rounds of {CONNECTIONS} open connections\n");
    println!("| backend | flow | sock_diag | cgroup | together |\n|---|---|---|---|---|");
    for (kind, samples) in samples.iter().filter(|(_, samples)| !samples.is_empty()) {
        let flow = column(samples, |sample| sample.flow);
        let owner = column(samples, |sample| sample.owner);
        let unit = column(samples, |sample| sample.unit);
        let all = column(samples, |sample| sample.flow + sample.owner + sample.unit);
        println!("| {} | {flow} | {owner} | {unit} | {all} |", kind.label());
    }
    Ok(())
}

fn measure(backend: &mut dyn Backend, wanted: &Wanted) -> Result<Vec<Sample>> {
    backend.probe(wanted)?;
    let listen = backend.prepare(wanted)?;
    let bind = if listen.transparent { sockets::listen_transparent } else { sockets::listen };
    let listener: TcpListener = bind(listen.addresses[0])?;
    listener.set_nonblocking(false)?;
    backend.apply(wanted, &Facts::default())?;
    let measured = identify_all(&listener, &Recoverer::open(&backend.recovery())?, &listen.addresses, wanted);
    backend.revert(wanted)?;
    measured
}

fn identify_all(
    listener: &TcpListener,
    recoverer: &Recoverer,
    listeners: &[SocketAddr],
    wanted: &Wanted,
) -> Result<Vec<Sample>> {
    let target = SocketAddr::new(wanted.vip4.hosts().nth(9).context("an empty range")?.into(), 80);
    let (mut diag, mut units) = (SocketDiag::open()?, CgroupUnits::discover());
    let mut open = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        let client = TcpStream::connect(target)?;
        let (accepted, peer) = listener.accept()?;
        open.push((client, accepted, peer));
    }
    let mut samples = Vec::with_capacity(CONNECTIONS);
    for (client, accepted, peer) in &open {
        let start = Instant::now();
        let flow = recoverer.flow(accepted, *peer, listeners)?.context("a connection nobody captured")?;
        let flow_known = Instant::now();
        let Lookup::Owned(owner) = diag.owner(flow.client, flow.original)? else {
            bail!("an open socket without owner")
        };
        let owner_known = Instant::now();
        if let Some(cgroup) = owner.cgroup {
            units.unit_of(cgroup);
        }
        samples.push(Sample { flow: flow_known - start, owner: owner_known - flow_known, unit: owner_known.elapsed() });
        ensure!((flow.client, flow.original) == (client.local_addr()?, target), "the wrong connection: {flow:?}");
    }
    // Reset, so that nothing of this round is in the way of the next.
    for (client, ..) in &open {
        SockRef::from(client).set_linger(Some(Duration::ZERO))?;
    }
    Ok(samples)
}

fn column(samples: &[Sample], step: impl Fn(&Sample) -> Duration) -> String {
    let mut times: Vec<f64> = samples.iter().map(|sample| step(sample).as_secs_f64() * 1e6).collect();
    times.sort_by(f64::total_cmp);
    format!("{:.1} ({:.1})", times[times.len() / 2], times[times.len() * 99 / 100])
}

fn ip(arguments: &str) -> Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status()?;
    ensure!(status.success(), "`ip {arguments}` failed ({status})");
    Ok(())
}
