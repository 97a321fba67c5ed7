//! Opens connections: marked TCP, mutual TLS, HTTP/2.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use meshd_identity::{SpiffeId, server_name};
use meshd_sys::sockets::{self, Mark};
use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError, ClientConfig};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::mesh::{self, ClientDriver, MeshError};
use super::secure_io::SecureIo;
use super::tls::{TlsState, peer_certificate};
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
}

/// An opened connection that the peer has answered on.
pub struct Opened {
    pub send: h2::client::SendRequest<bytes::Bytes>,
    pub driver: ClientDriver,
    pub io: SecureIo,
    /// The earlier NotAfter of both certificates: no new streams after it.
    pub expires: SystemTime,
}

impl Dialer {
    /// A TCP connection carrying our mark.
    pub async fn tcp(&self, address: SocketAddr) -> Result<TcpStream, Fault> {
        let socket = sockets::marked(address, self.mark).map_err(|error| {
            tracing::error!(%address, %error, "cannot open a marked socket; meshd needs CAP_NET_ADMIN");
            Fault::Internal
        })?;
        let connecting = TcpSocket::from_std_stream(socket.into()).connect(address);
        match timeout(self.connect_timeout, connecting).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::TimedOut => Err(Fault::ConnectTimeout),
            Ok(Err(_)) => Err(Fault::ConnectRefused),
            Err(_) => Err(Fault::ConnectTimeout),
        }
    }

    /// A mesh connection as `source`, to a peer that must prove to be `expected`.
    pub async fn mesh(
        &self,
        tls: &TlsState,
        source: &SpiffeId,
        expected: &SpiffeId,
        address: SocketAddr,
        version: WireVersion,
    ) -> Result<Opened, Fault> {
        let opened = self.open(tls, source, expected, address, version).await;
        let counters = &self.telemetry.handshakes;
        match &opened {
            Ok(_) => counters.dialled.fetch_add(1, Ordering::Relaxed),
            Err(fault) => {
                tracing::warn!(%address, %expected, error = fault.label(), "no connection to peer");
                counters.dial_failed.fetch_add(1, Ordering::Relaxed)
            }
        };
        opened
    }

    async fn open(
        &self,
        tls: &TlsState,
        source: &SpiffeId,
        expected: &SpiffeId,
        address: SocketAddr,
        version: WireVersion,
    ) -> Result<Opened, Fault> {
        // Claimed by this host, not (yet) permitted by the PKI: both are needed to be enrolled.
        let own = tls.identity(source).ok_or(Fault::Unenrolled)?.not_after;
        if own <= SystemTime::now() {
            return Err(Fault::CertExpired);
        }
        let config = client_config(tls, source, expected, version).ok_or(Fault::Internal)?;
        let socket = self.tcp(address).await?;
        let (io, peer_expires) = timeout(self.connect_timeout, handshake(config, expected, socket, version))
            .await
            .map_err(|_| Fault::ConnectTimeout)??;
        let (send, mut driver) = mesh::client(io.clone()).await.map_err(|error| mesh_fault(&error))?;
        timeout(self.connect_timeout, driver.proven())
            .await
            .map_err(|_| Fault::ConnectTimeout)?
            .map_err(|error| mesh_fault(&error))?;
        Ok(Opened { send, driver, io, expires: own.min(peer_expires) })
    }
}

fn client_config(tls: &TlsState, source: &SpiffeId, expected: &SpiffeId, version: WireVersion) -> Option<ClientConfig> {
    match version {
        WireVersion::Meshd1 => tls.client(source, expected, ALPN_MESHD),
        WireVersion::Hbone => {
            let mut config = tls.client(source, expected, ALPN_HBONE)?;
            // ztunnel ignores SNI and sends none.
            config.enable_sni = false;
            Some(config)
        }
    }
}

async fn handshake(
    config: ClientConfig,
    expected: &SpiffeId,
    socket: TcpStream,
    version: WireVersion,
) -> Result<(SecureIo, SystemTime), Fault> {
    let name = ServerName::try_from(server_name(expected)).map_err(|_| Fault::Internal)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, socket).await.map_err(|error| tls_fault(&error))?;
    let (socket, tls) = stream.into_inner();
    let agreed = WireVersion::from_alpn(tls.alpn_protocol());
    let peer = peer_certificate(tls.peer_certificates()).ok_or(Fault::TlsHandshake)?;
    // The transport is what the endpoint record says, never what a dial happened to get.
    if agreed != Some(version) {
        return Err(Fault::TlsHandshake);
    }
    Ok((SecureIo::new(socket, tls.into()), peer.not_after))
}

/// Which fault a broken handshake is, ours or as told by the peer's alert.
pub fn tls_fault(error: &std::io::Error) -> Fault {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(reason)) => match reason {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Fault::CertExpired,
            CertificateError::NotValidForName => Fault::IdentityMismatch,
            _ => Fault::TlsHandshake,
        },
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateExpired)) => Fault::CertExpired,
        _ => Fault::TlsHandshake,
    }
}

/// A connection that broke before the peer answered on it: in TLS 1.3 that is how a server refuses a client.
fn mesh_fault(error: &MeshError) -> Fault {
    match error {
        MeshError::Io(error) => tls_fault(error),
        MeshError::Http2(error) => error.get_io().map_or(Fault::TlsHandshake, tls_fault),
        MeshError::Silent(_) => Fault::ConnectTimeout,
    }
}
