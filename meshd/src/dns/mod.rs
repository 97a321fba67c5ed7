//! Names: `payments.shop.mesh` and `payments.shop.svc.cluster.local` are the virtual IP of service `payments.shop`;
//! everything else is what the host's own servers say.

mod answer;
mod config;
mod forward;
pub mod integrate;
mod resolv_conf;
mod shares;
mod upstream;
mod vips;
mod zone;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use meshd_discovery::{Directory, Lookups};
use meshd_sys::sock_diag::SocketDiag;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

pub use config::{DnsConfig, Integration};
pub(crate) use integrate::resolved_runs;
pub(crate) use resolv_conf::ResolvConf;
pub use vips::{Vip, Vips, VipsError};
pub use zone::{Zone, ZoneError};

use answer::{Knowledge, Reply, Unknown};
use forward::{Failure, Forwarder, Over};
use shares::{Client, Shares};
use upstream::{HostFiles, Upstreams};
use zone::Zones;

use crate::telemetry::{DnsOutcome, Telemetry};

/// A query is one name and a few options.
const MAX_QUERY: usize = 4096;
const MAX_CONNECTIONS: usize = 64;
/// Of one client. A stub resolver asks for all programs of a host, by few connections at a time.
const MAX_CONNECTIONS_OF_ONE: usize = MAX_CONNECTIONS / 4;
const MAX_QUERIES_PER_CONNECTION: usize = 1024;
/// RFC 7766 6.2.3: a server may close when idle; local clients ask at once.
const IDLE: Duration = Duration::from_secs(2);
/// After an error of the socket itself, so that a lasting one does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers queries, keeps `vips` in step with the directory and saves it. Never returns.
pub async fn serve(
    udp: UdpSocket,
    tcp: TcpListener,
    config: DnsConfig,
    directory: watch::Receiver<Arc<Directory>>,
    vips: Arc<Vips>,
    lookups: Lookups,
    telemetry: Arc<Telemetry>,
) {
    let upstreams = match &config.upstream {
        Some(servers) => Upstreams::configured(config.listen, servers),
        None => Upstreams::of_host(config.listen, HostFiles::default()),
    };
    let responder = Arc::new(Responder {
        zones: config.zones(),
        config,
        directory: directory.clone(),
        vips: vips.clone(),
        lookups,
        forwarder: Forwarder::new(upstreams),
        telemetry,
    });
    tokio::join!(serve_udp(udp, responder.clone()), serve_tcp(tcp, responder), vips.keep(directory));
}

struct Responder {
    config: DnsConfig,
    zones: Zones,
    directory: watch::Receiver<Arc<Directory>>,
    vips: Arc<Vips>,
    lookups: Lookups,
    forwarder: Forwarder,
    telemetry: Arc<Telemetry>,
}

impl Responder {
    /// What we know ourselves; at once.
    fn reply(&self, packet: &[u8], client: SocketAddr) -> Reply {
        self.reply_knowing(packet, client, if self.lookups.are_on() { Unknown::LookUp } else { Unknown::Nowhere })
    }

    fn reply_knowing(&self, packet: &[u8], client: SocketAddr, unknown: Unknown) -> Reply {
        let directory = self.directory.borrow().clone();
        let forwards = self.config.may_forward_for(client.ip()) && self.forwarder.has_servers();
        let known = Knowledge { zones: &self.zones, directory: &directory, forwards, unknown };
        let reply = answer::respond(packet, &known, |service| {
            self.lookups.note_use(service);
            self.vips.assign(service)
        });
        if let Reply::Answer(_, outcome) = &reply {
            self.telemetry.dns.count(*outcome);
        }
        reply
    }

    /// The answer to what others have to be asked for.
    async fn ask(&self, packet: &[u8], client: SocketAddr, over: Over, reply: Reply) -> Option<Vec<u8>> {
        let reply = match reply {
            Reply::LookUp(service) => {
                let looked = self.lookups.look_up(&service).await;
                self.reply_knowing(packet, client, Unknown::Looked(looked))
            }
            reply => reply,
        };
        match reply {
            Reply::Answer(answer, _) => Some(answer),
            Reply::Forward { question_end } => self.forward(packet, question_end, over).await,
            Reply::Silence | Reply::LookUp(_) => None,
        }
    }

    async fn forward(&self, packet: &[u8], question_end: usize, over: Over) -> Option<Vec<u8>> {
        let answer = self.forwarder.forward(packet, question_end, over).await;
        self.telemetry.dns.count(match &answer {
            Ok(_) => DnsOutcome::Forwarded,
            Err(Failure::Silent) => DnsOutcome::ForwardFailed,
            Err(Failure::Limited) => DnsOutcome::ForwardLimited,
        });
        answer.ok().or_else(|| answer::failure(packet, ResponseCode::ServFail))
    }
}

async fn serve_udp(socket: UdpSocket, responder: Arc<Responder>) {
    let socket = Arc::new(socket);
    let mut asked = JoinSet::new();
    let mut packet = vec![0; MAX_QUERY];
    loop {
        let (length, peer) = match socket.recv_from(&mut packet).await {
            Ok(received) => received,
            Err(error) => {
                pause("receive", &error).await;
                continue;
            }
        };
        match responder.reply(&packet[..length], peer) {
            Reply::Silence => {}
            Reply::Answer(answer, _) => send(&socket, &answer, peer).await,
            others => {
                let (socket, responder, packet) = (socket.clone(), responder.clone(), packet[..length].to_vec());
                asked.spawn(async move {
                    if let Some(answer) = responder.ask(&packet, peer, Over::Udp, others).await {
                        send(&socket, &answer, peer).await;
                    }
                });
            }
        }
        while asked.try_join_next().is_some() {}
    }
}

async fn send(socket: &UdpSocket, answer: &[u8], peer: SocketAddr) {
    if let Err(error) = socket.send_to(answer, peer).await {
        tracing::debug!(%error, %peer, "DNS answer not sent");
    }
}

async fn serve_tcp(listener: TcpListener, responder: Arc<Responder>) {
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let shares = Shares::of(MAX_CONNECTIONS_OF_ONE);
    // Without it, all of this host are one client.
    let mut diag = SocketDiag::open().ok();
    let mut connections = JoinSet::new();
    loop {
        // Beyond the limit clients wait in the kernel's queue.
        let Ok(permit) = free.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let responder = responder.clone();
                let local = stream.local_addr().unwrap_or(peer);
                let Some(share) = shares.take(Client::of(diag.as_mut(), peer, local)) else { continue };
                connections.spawn(async move {
                    let _ = serve_connection(stream, peer, &responder).await; // a client that goes away is no news
                    drop((permit, share));
                });
            }
            Err(error) => pause("accept", &error).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

/// RFC 1035 4.2.2: every message after its length in two bytes.
async fn serve_connection(mut stream: TcpStream, peer: SocketAddr, responder: &Responder) -> io::Result<()> {
    let mut packet = vec![0; MAX_QUERY];
    for _ in 0..MAX_QUERIES_PER_CONNECTION {
        let length = within(IDLE, read_message(&mut stream, &mut packet)).await?;
        let packet = &packet[..length];
        let answer = responder.ask(packet, peer, Over::Tcp, responder.reply(packet, peer)).await;
        let Some(answer) = answer else { return Ok(()) };
        within(IDLE, stream.write_all(&frame(&answer)?)).await?;
    }
    Ok(())
}

fn frame(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok([&length.to_be_bytes(), message].concat())
}

async fn read_message(stream: &mut TcpStream, packet: &mut [u8]) -> io::Result<usize> {
    let length = usize::from(stream.read_u16().await?);
    let space = packet.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
    stream.read_exact(space).await
}

async fn within<T>(limit: Duration, step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, step).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn pause(doing: &str, error: &io::Error) {
    tracing::warn!(%error, "DNS cannot {doing}");
    tokio::time::sleep(PAUSE).await;
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;
