//! An operator's connection to a PKI: over its Unix socket, or over mutual TLS with a certificate from files.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use meshd_identity::{Bundle, BundleError, SvidError, inspect_svid};
use meshd_pki_api::MAX_MESSAGE_BYTES;
use meshd_pki_api::admin::admin_client::AdminClient;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::Svid;
pub use crate::connect::Channel;
use crate::connect::{handshake, tls_config};
use crate::verify::pki_server;

const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    #[error("{path}: {source}")]
    Socket { path: String, source: io::Error },
    #[error("{path} does not speak the Admin API: {source}")]
    Http { path: String, source: hyper::Error },
    #[error("{path}: {problem}")]
    File { path: String, problem: String },
    #[error("{path}: the certificate is no identity of the mesh: {source}")]
    Identity { path: String, source: SvidError },
    #[error("{path}: {source}")]
    Bundle { path: String, source: BundleError },
    #[error("{0}")]
    Connect(String),
}

/// Where the proof of an operator's identity is, in PEM; the bundle may also be a SPIFFE bundle document.
#[derive(Debug, Clone, Copy)]
pub struct Proof<'a> {
    pub certificate: &'a Path,
    pub key: &'a Path,
    pub bundle: &'a Path,
}

/// Whether nobody listens: no socket, or one that a server left behind.
pub fn is_absent(error: &OperatorError) -> bool {
    let absent = |kind: io::ErrorKind| matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
    matches!(error, OperatorError::Socket { source, .. } if absent(source.kind()))
}

pub async fn over_socket(path: &Path) -> Result<AdminClient<Channel>, OperatorError> {
    let named = || path.display().to_string();
    let stream = UnixStream::connect(path).await.map_err(|source| OperatorError::Socket { path: named(), source })?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|source| OperatorError::Http { path: named(), source })?;
    // Ends by itself when the last sender is dropped.
    tokio::spawn(connection);
    Ok(client(Channel(sender), "http://localhost"))
}

pub async fn over_tls(address: &str, proof: &Proof<'_>) -> Result<AdminClient<Channel>, OperatorError> {
    let svid = read_svid(proof)?;
    let bundle = read_bundle(proof.bundle, &svid)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let failed = |error: &dyn std::fmt::Display| OperatorError::Connect(error.to_string());
    let verifier = pki_server(provider, &bundle, SystemTime::UNIX_EPOCH).map_err(|error| failed(&error))?;
    let tls = tls_config(verifier, Some(&svid)).map_err(|error| failed(&error))?;
    let late = |_| OperatorError::Connect(format!("no answer from {address} within 10 s"));
    let channel = timeout(DEADLINE, handshake(address, tls)).await.map_err(late)?.map_err(|error| failed(&error))?;
    Ok(client(channel, &format!("https://{address}")))
}

fn client(channel: Channel, origin: &str) -> AdminClient<Channel> {
    let origin = origin.parse().unwrap_or_else(|_| http::Uri::from_static("https://pki"));
    AdminClient::with_origin(channel, origin).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

fn read_svid(proof: &Proof<'_>) -> Result<Svid, OperatorError> {
    let path = proof.certificate;
    let chain = certificates(path)?;
    let leaf = chain.first().ok_or_else(|| unreadable(path, "it holds no certificate"))?;
    let source = |source| OperatorError::Identity { path: path.display().to_string(), source };
    let info = inspect_svid(leaf).map_err(source)?;
    let key = PrivateKeyDer::from_pem_file(proof.key).map_err(|error| unreadable(proof.key, &error.to_string()))?;
    Ok(Svid {
        id: info.id,
        chain,
        key: Arc::new(key),
        issued_at: info.not_before,
        not_before: info.not_before,
        not_after: info.not_after,
        serial: info.serial,
    })
}

fn read_bundle(path: &Path, svid: &Svid) -> Result<Bundle, OperatorError> {
    let domain = svid.id.trust_domain().clone();
    let bundle = |source| OperatorError::Bundle { path: path.display().to_string(), source };
    let content = std::fs::read(path).map_err(|error| unreadable(path, &error.to_string()))?;
    if content.trim_ascii_start().starts_with(b"{") {
        return Bundle::from_jwks(domain, &content).map_err(bundle);
    }
    let roots = certificates(path)?.into_iter().map(|one| one.to_vec()).collect();
    Bundle::new(domain, 0, 0, roots).map_err(bundle)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, OperatorError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    read.map_err(|error| unreadable(path, &error.to_string()))
}

fn unreadable(path: &Path, problem: &str) -> OperatorError {
    OperatorError::File { path: path.display().to_string(), problem: problem.to_owned() }
}
