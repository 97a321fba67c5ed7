//! Opens connections: marked TCP, mutual TLS, HTTP/2.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use meshd_identity::{SpiffeId, server_name};
use meshd_sys::sockets::{self, Mark};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use socket2::Socket;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::mesh::{self, ClientDriver, MeshError};
use super::secure_io::SecureIo;
use super::tls::{PeerCertificate, TlsState};
use super::trust::unfederated;
use super::wire::{ALPN_HBONE, ALPN_MESHD, WireVersion};
use crate::fault::Fault;
use crate::telemetry::Telemetry;

/// How to reach other hosts.
#[derive(Clone)]
pub struct Dialer {
    pub mark: Mark,
    /// For each of TCP connect, TLS handshake and first answer.
    pub connect_timeout: Duration,
    pub telemetry: Arc<Telemetry>,
    pub own: OwnAddresses,
}

/// Addresses that lead back to this daemon: dialling one of them would be a loop.
#[derive(Clone, Debug, Default)]
pub struct OwnAddresses {
    /// The virtual IPs of services.
    pub virtual_ips: Vec<IpNet>,
    /// Where captured connections arrive.
    pub capture: Vec<SocketAddr>,
}

impl OwnAddresses {
    pub fn contain(&self, address: SocketAddr) -> bool {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        self.capture.contains(&address) || self.virtual_ips.iter().any(|net| net.contains(&address.ip()))
    }
}

/// Which connection: whom we prove to be, whom we expect, where and how.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PoolKey {
    pub source: SpiffeId,
    pub expected: SpiffeId,
    pub address: SocketAddr,
    pub version: WireVersion,
}

/// An opened connection that the peer has answered on.
pub struct Opened {
    pub send: h2::client::SendRequest<bytes::Bytes>,
    pub driver: ClientDriver,
    pub io: SecureIo,
    /// The earlier NotAfter of both certificates: no new streams after it.
    pub expires: SystemTime,
    pub peer: PeerCertificate,
}

impl Dialer {
    /// A TCP connection carrying our mark.
    pub async fn tcp(&self, address: SocketAddr) -> Result<TcpStream, Fault> {
        self.connect(self.socket(address)?, address).await
    }

    /// The same, seeming to come from `source`; the outer error where this host may not speak for it.
    pub async fn tcp_from(&self, source: IpAddr, address: SocketAddr) -> io::Result<Result<TcpStream, Fault>> {
        let socket = match self.socket(address) {
            Ok(socket) => socket,
            Err(fault) => return Ok(Err(fault)),
        };
        sockets::speak_for(&socket, source)?;
        Ok(self.connect(socket, address).await)
    }

    fn socket(&self, address: SocketAddr) -> Result<Socket, Fault> {
        if self.own.contain(address) {
            return Err(Fault::Loop);
        }
        sockets::marked(address, self.mark).map_err(|error| {
            tracing::error!(%address, %error, "cannot open a marked socket; meshd needs CAP_NET_ADMIN, and descriptors (LimitNOFILE)");
            Fault::Internal
        })
    }

    async fn connect(&self, socket: Socket, address: SocketAddr) -> Result<TcpStream, Fault> {
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(address);
        match timeout(self.connect_timeout, connecting).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Err(Fault::ConnectTimeout),
            Ok(Err(_)) => Err(Fault::ConnectRefused),
            Err(_) => Err(Fault::ConnectTimeout),
        }
    }

    /// A mesh connection to a peer that has proven to be whom `key` expects.
    pub async fn mesh(&self, tls: &TlsState, key: &PoolKey) -> Result<Opened, Fault> {
        let mut opened = self.open(tls, key).await;
        // A peer that took over a new certificate during the handshake says goodbye, and means: once more.
        if matches!(opened, Err(Fault::Drain)) {
            opened = self.open(tls, key).await;
        }
        let counters = &self.telemetry.handshakes;
        match &opened {
            Ok(_) => counters.dialled.fetch_add(1, Ordering::Relaxed),
            Err(fault) => {
                let (PoolKey { address, expected, .. }, error) = (key, fault.label());
                tracing::warn!(%address, %expected, error, "no connection to a peer: {}", remedy(*fault));
                counters.dial_failed.fetch_add(1, Ordering::Relaxed)
            }
        };
        opened
    }

    async fn open(&self, tls: &TlsState, key: &PoolKey) -> Result<Opened, Fault> {
        // Claimed by this host, not (yet) permitted by the PKI: both are needed to be enrolled.
        let own = tls.identity(&key.source).ok_or(Fault::Unenrolled)?.not_after;
        if own <= SystemTime::now() {
            return Err(Fault::CertExpired);
        }
        if !tls.deals(&key.source, key.expected.trust_domain()) {
            return Err(Fault::Unfederated);
        }
        let config = client_config(tls, key).ok_or(Fault::Internal)?;
        let socket = self.tcp(key.address).await?;
        let (io, peer) = timeout(self.connect_timeout, handshake(tls, config, key, socket))
            .await
            .map_err(|_| Fault::ConnectTimeout)??;
        let (send, mut driver) = mesh::client(io.clone()).await.map_err(|error| mesh_fault(&error))?;
        timeout(self.connect_timeout, driver.proven())
            .await
            .map_err(|_| Fault::ConnectTimeout)?
            .map_err(|error| mesh_fault(&error))?;
        Ok(Opened { send, driver, io, expires: own.min(peer.not_after), peer })
    }
}

/// Where to look first when a peer cannot be reached.
fn remedy(fault: Fault) -> &'static str {
    match fault {
        Fault::ConnectRefused => "is meshd running there, on this port?",
        Fault::ConnectTimeout => "is the host up, and does a firewall between drop this port?",
        Fault::IdentityMismatch => "check `identity` of this endpoint in its MeshService, and who listens there",
        Fault::Unfederated => "that trust domain is not federated for the caller; see `meshd status`",
        Fault::CertExpired => "run `meshd check` on both hosts, and look at their clocks",
        Fault::TlsHandshake => "are both hosts of the same trust domain, and is that port meshd's?",
        Fault::Loop => {
            "a virtual IP or a listener of our own; give the endpoint the address of the host that serves it"
        }
        Fault::Unenrolled => "the PKI has issued no certificate for the caller; see `meshd status`",
        _ => "the log has more",
    }
}

fn client_config(tls: &TlsState, key: &PoolKey) -> Option<ClientConfig> {
    match key.version {
        WireVersion::Meshd1 => tls.client(&key.source, &key.expected, ALPN_MESHD),
        WireVersion::Hbone => {
            let mut config = tls.client(&key.source, &key.expected, ALPN_HBONE)?;
            // ztunnel ignores SNI and sends none.
            config.enable_sni = false;
            Some(config)
        }
    }
}

async fn handshake(
    state: &TlsState,
    config: ClientConfig,
    key: &PoolKey,
    socket: TcpStream,
) -> Result<(SecureIo, PeerCertificate), Fault> {
    let name = ServerName::try_from(server_name(&key.expected)).map_err(|_| Fault::Internal)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await.map_err(|error| tls_fault(&error))?;
    let (socket, tls) = stream.into_inner();
    let agreed = WireVersion::from_alpn(tls.alpn_protocol());
    let peer = state.peer(tls.peer_certificates()).ok_or(Fault::TlsHandshake)?;
    // The transport is what the endpoint record says, never what a dial happened to get.
    if agreed != Some(key.version) {
        return Err(Fault::TlsHandshake);
    }
    Ok((SecureIo::new(socket, tls.into()), peer))
}

/// Which fault a broken handshake is, ours or as told by the peer's alert.
pub fn tls_fault(error: &io::Error) -> Fault {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(reason)) => match reason {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Fault::CertExpired,
            CertificateError::NotValidForName => Fault::IdentityMismatch,
            CertificateError::Revoked => Fault::Banned,
            reason if unfederated(reason).is_some() => Fault::Unfederated,
            _ => Fault::TlsHandshake,
        },
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateExpired)) => Fault::CertExpired,
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateRevoked)) => Fault::Banned,
        _ => Fault::TlsHandshake,
    }
}

/// The same in words.
pub fn tls_reason(error: &io::Error) -> String {
    let reason = match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(reason)) => unfederated(reason),
        _ => None,
    };
    reason.map_or_else(|| error.to_string(), ToString::to_string)
}

/// A connection that broke before the peer answered on it: in TLS 1.3 that is how a server refuses a client.
fn mesh_fault(error: &MeshError) -> Fault {
    match error {
        MeshError::Io(error) => tls_fault(error),
        MeshError::Http2(error) => error.get_io().map_or(Fault::TlsHandshake, tls_fault),
        MeshError::Leaving => Fault::Drain,
        MeshError::Silent(_) => Fault::ConnectTimeout,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_ips_and_the_capture_listener_lead_back_to_us() {
        let own = OwnAddresses {
            virtual_ips: vec!["240.240.0.0/16".parse().unwrap(), "fd6d::/64".parse().unwrap()],
            capture: vec!["127.0.0.1:15001".parse().unwrap()],
        };
        for (address, loops) in [
            ("240.240.7.7:15008", true),
            ("[fd6d::7]:15008", true),
            ("[::ffff:240.240.7.7]:15008", true),
            ("127.0.0.1:15001", true),
            // This host's own mesh port: how a service of this host is reached.
            ("127.0.0.1:15008", false),
            ("10.0.0.5:15001", false),
        ] {
            assert_eq!(own.contain(address.parse().unwrap()), loops, "{address}");
        }
    }
}
