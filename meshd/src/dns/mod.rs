//! Names of the mesh domain: `payments.shop.mesh` is the virtual IP of service `payments.shop`.

mod answer;
mod vips;

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use meshd_discovery::Directory;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

pub use answer::{Zone, ZoneError};
pub use vips::{Vip, Vips, VipsError};

/// A query is one name and a few options.
const MAX_QUERY: usize = 4096;
const MAX_CONNECTIONS: usize = 64;
const MAX_QUERIES_PER_CONNECTION: usize = 1024;
/// RFC 7766 6.2.3: a server may close when idle; local clients ask at once.
const IDLE: Duration = Duration::from_secs(2);
/// After an error of the socket itself, so that a lasting one does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// `[dns]` of meshd.toml.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DnsConfig {
    pub listen: SocketAddr,
    pub domain: Zone,
}

impl Default for DnsConfig {
    fn default() -> DnsConfig {
        let domain = Zone::new("mesh").expect("a constant label is a domain");
        DnsConfig { listen: (Ipv4Addr::LOCALHOST, 53).into(), domain }
    }
}

/// Answers queries, keeps `vips` in step with the directory and saves it. Never returns.
pub async fn serve(
    udp: UdpSocket,
    tcp: TcpListener,
    zone: Zone,
    directory: watch::Receiver<Arc<Directory>>,
    vips: Arc<Vips>,
) {
    let responder = Arc::new(Responder { zone, directory: directory.clone(), vips: vips.clone() });
    tokio::join!(serve_udp(udp, responder.clone()), serve_tcp(tcp, responder), vips.keep(directory));
}

struct Responder {
    zone: Zone,
    directory: watch::Receiver<Arc<Directory>>,
    vips: Arc<Vips>,
}

impl Responder {
    fn respond(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let directory = self.directory.borrow().clone();
        answer::respond(packet, &self.zone, &directory, |service| self.vips.assign(service))
    }
}

async fn serve_udp(socket: UdpSocket, responder: Arc<Responder>) {
    let mut packet = vec![0; MAX_QUERY];
    loop {
        let (length, peer) = match socket.recv_from(&mut packet).await {
            Ok(received) => received,
            Err(error) => {
                pause("receive", &error).await;
                continue;
            }
        };
        if let Some(response) = responder.respond(&packet[..length])
            && let Err(error) = socket.send_to(&response, peer).await
        {
            tracing::debug!(%error, %peer, "DNS answer not sent");
        }
    }
}

async fn serve_tcp(listener: TcpListener, responder: Arc<Responder>) {
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // Beyond the limit clients wait in the kernel's queue.
        let Ok(permit) = free.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let responder = responder.clone();
                connections.spawn(async move {
                    let _ = serve_connection(stream, &responder).await; // a client that goes away is no news
                    drop(permit);
                });
            }
            Err(error) => pause("accept", &error).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

/// RFC 1035 4.2.2: every message after its length in two bytes.
async fn serve_connection(mut stream: TcpStream, responder: &Responder) -> io::Result<()> {
    let mut packet = vec![0; MAX_QUERY];
    for _ in 0..MAX_QUERIES_PER_CONNECTION {
        let length = within(IDLE, read_message(&mut stream, &mut packet)).await?;
        let Some(response) = responder.respond(&packet[..length]) else { return Ok(()) };
        let Ok(length) = u16::try_from(response.len()) else { return Ok(()) };
        let framed = [&length.to_be_bytes(), response.as_slice()].concat();
        within(IDLE, stream.write_all(&framed)).await?;
    }
    Ok(())
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
