//! One gRPC connection to a PKI server: TCP, TLS 1.3, HTTP/2, each step under a deadline.

use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use meshd_identity::Bundle;
use meshd_pki_api::MAX_MESSAGE_BYTES;
use meshd_pki_api::v1::host_client::HostClient;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::Status;
use tonic::body::Body;

use crate::Svid;
use crate::surroundings::{Clock, TlsTime};
use crate::verify::{any_server, pki_server};

const TCP_DEADLINE: Duration = Duration::from_secs(5);
/// As long as a handshake takes with nobody before it, many times over.
const NEXT_AFTER: Duration = Duration::from_secs(5);
/// TLS and the HTTP/2 preface together; most of it is for a queue at the PKI.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(20);
/// A full batch signs and syncs in well under a second; the rest is for a queue at the PKI.
pub(crate) const RPC_DEADLINE: Duration = Duration::from_secs(20);
/// A PKI that vanished without a word is noticed within twice this time.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The PKI does not select by name; the constant keeps the host's own names out of the ClientHello.
const SERVER_NAME: &str = "pki.id.mesh.internal";

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("no answer from {address} within 5 s; check the address and the firewall for TCP")]
    Unreachable { address: String },
    #[error("{address} takes connections and does no handshake within 20 s; it hangs, or too many hosts ask it")]
    Deadline { address: String },
    #[error("cannot reach {address}: {source}")]
    Tcp { address: String, source: std::io::Error },
    #[error("TLS with {address} failed: {source}")]
    Tls { address: String, source: std::io::Error },
    #[error("HTTP/2 with {address} failed: {source}")]
    Http { address: String, source: hyper::Error },
    #[error("TLS is not possible with the material at hand: {0}")]
    Material(#[from] rustls::Error),
    #[error("`{0}` is not a usable PKI address")]
    Address(String),
}

impl ConnectError {
    /// Whether one side does not believe the other's certificate: what the host trusts may be out of date.
    pub(crate) fn is_distrust(&self) -> bool {
        matches!(self, ConnectError::Tls { .. }) && !self.may_pass()
    }

    /// Whether the same address may work in a moment. A certificate that does not verify will not.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            ConnectError::Unreachable { .. }
            | ConnectError::Deadline { .. }
            | ConnectError::Tcp { .. }
            | ConnectError::Http { .. } => true,
            ConnectError::Tls { source, .. } => {
                source.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>()).is_none()
            }
            ConnectError::Material(_) | ConnectError::Address(_) => false,
        }
    }
}

/// None of the servers this host knows.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{reasons}")]
pub(crate) struct Unusable {
    pub(crate) reasons: String,
    /// One of them does not prove to be the PKI.
    pub(crate) is_distrusted: bool,
}

pub(crate) type PkiClient = HostClient<Channel>;

/// To one server.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) address: String,
    channel: Channel,
    origin: Uri,
}

impl Connection {
    async fn to(address: &str, config: ClientConfig) -> Result<Connection, ConnectError> {
        let channel = handshake(address, config).await?;
        let origin = format!("https://{address}").parse().map_err(|_| ConnectError::Address(address.to_owned()))?;
        Ok(Connection { address: address.to_owned(), channel, origin })
    }

    pub(crate) fn pki(&self) -> PkiClient {
        let client = HostClient::with_origin(self.channel.clone(), self.origin.clone());
        client.max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Whether anything is answered: that there is no such page needs no turn and no database.
    pub(crate) async fn lives(&self) -> bool {
        let request = Request::get(self.origin.clone()).body(Body::empty());
        let mut sender = self.channel.0.clone();
        match request {
            Ok(request) => sender.ready().await.is_ok() && sender.send_request(request).await.is_ok(),
            Err(_) => false,
        }
    }
}

/// Nobody is authenticated: only for what a digest verifies.
pub(crate) fn unverified_tls() -> Result<ClientConfig, ConnectError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    tls_config(any_server(provider), None)
}

/// The PKI is authenticated against the bundle; the host too when it has a certificate.
pub(crate) fn verified_tls(
    bundle: &Bundle,
    host: Option<&Svid>,
    last_pki_time: SystemTime,
    clock: &Clock,
) -> Result<ClientConfig, ConnectError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = tls_config(pki_server(provider, bundle, last_pki_time)?, host)?;
    config.time_provider = Arc::new(TlsTime(clock.clone()));
    Ok(config)
}

pub(crate) fn tls_config(
    verifier: Arc<dyn ServerCertVerifier>,
    host: Option<&Svid>,
) -> Result<ClientConfig, ConnectError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match host {
        Some(svid) => builder.with_client_auth_cert(svid.chain.clone(), svid.key.clone_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would skip the verifier.
    config.resumption = Resumption::disabled();
    Ok(config)
}

pub(crate) async fn connect(address: &str, config: ClientConfig) -> Result<PkiClient, ConnectError> {
    Ok(Connection::to(address, config).await?.pki())
}

/// The first of several servers that proves to be the PKI, in an order drawn anew each time. One that stands still is not
/// given up, but the next is asked beside it. The one to avoid comes last.
pub(crate) async fn connect_anywhere(
    addresses: &[String],
    avoided: Option<&str>,
    config: &ClientConfig,
) -> Result<Connection, Unusable> {
    let mut addresses = addresses.to_vec();
    fastrand::shuffle(&mut addresses);
    // They are taken from the end.
    addresses.sort_by_key(|address| avoided != Some(address.as_str()));
    let mut reasons = Vec::new();
    let mut is_distrusted = false;
    let mut asked = JoinSet::new();
    loop {
        let is_last = match addresses.pop() {
            Some(address) => {
                let config = config.clone();
                asked.spawn(async move { Connection::to(&address, config).await });
                addresses.is_empty()
            }
            None => true,
        };
        let answer = match is_last {
            true => asked.join_next().await,
            false => timeout(NEXT_AFTER, asked.join_next()).await.unwrap_or_default(),
        };
        match answer {
            Some(Ok(Ok(pki))) => return Ok(pki),
            Some(Ok(Err(error))) => {
                is_distrusted |= error.is_distrust();
                reasons.push(error.to_string());
            }
            Some(Err(error)) => reasons.push(error.to_string()),
            None if is_last => break,
            None => {}
        }
    }
    Err(Unusable { reasons: reasons.join("; "), is_distrusted })
}

pub(crate) async fn handshake(address: &str, config: ClientConfig) -> Result<Channel, ConnectError> {
    let named = || address.to_owned();
    let tcp = timeout(TCP_DEADLINE, TcpStream::connect(address))
        .await
        .map_err(|_| ConnectError::Unreachable { address: named() })?
        .map_err(|source| ConnectError::Tcp { address: named(), source })?;
    let over_tls = timeout(HANDSHAKE_DEADLINE, over_tls(address, config, tcp));
    over_tls.await.map_err(|_| ConnectError::Deadline { address: named() })?
}

async fn over_tls(address: &str, config: ClientConfig, tcp: TcpStream) -> Result<Channel, ConnectError> {
    let named = || address.to_owned();
    let name = ServerName::try_from(SERVER_NAME).expect("a constant DNS name");
    let tls = TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .map_err(|source| ConnectError::Tls { address: named(), source })?;
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .handshake(TokioIo::new(tls))
        .await
        .map_err(|source| ConnectError::Http { address: named(), source })?;
    // Ends by itself when the last sender is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to the PKI ended");
        }
    });
    Ok(Channel(sender))
}

/// Runs one call under the RPC deadline.
pub(crate) async fn call<T>(rpc: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    match timeout(RPC_DEADLINE, rpc).await {
        Ok(result) => result.map(tonic::Response::into_inner),
        Err(_) => Err(late()),
    }
}

pub(crate) fn late() -> Status {
    Status::deadline_exceeded("the PKI did not answer within 20 s; see its log and load")
}

/// One HTTP/2 connection as the service tonic's client wants.
#[derive(Clone)]
pub struct Channel(pub(crate) http2::SendRequest<Body>);

impl tower_service::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
