//! Where meshd listens: for captured connections as the backend says, for peers and questions as configured.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};

use meshd_sys::sockets;
use nix::errno::Errno;
use tokio::net::{TcpListener, UdpSocket};

use super::intent::planned;
use super::{StartError, failed};
use crate::capture::{self, Keeper, KeeperHandle, ListenAt, OwnerRecord, Recovery, StateFile};
use crate::config::Config;
use crate::enrol::Enrolment;
use crate::proxy::Listeners;

/// What capture is made of once it works.
pub(super) struct Captured {
    pub keeper: KeeperHandle,
    pub listeners: Vec<Listeners>,
    pub recovery: Recovery,
}

pub(super) async fn start_capture(
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

pub(super) async fn bind_dns(config: &Config) -> Result<(UdpSocket, TcpListener), StartError> {
    let address = config.dns.listen;
    let udp = start!(UdpSocket::bind(address).await, "[dns] listen {address} (UDP)")?;
    let tcp = start!(TcpListener::bind(address).await, "[dns] listen {address} (TCP)")?;
    Ok((udp, tcp))
}
