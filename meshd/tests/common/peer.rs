//! A peer written without meshd's transport: TLS as the wire wants it, or deliberately not, and HTTP/2 on it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode, Uri};
use meshd_identity::{SpiffeId, inspect_svid, server_name};
use meshd_pki_client::fake::FakeCa;
use meshd_pki_client::{ServerJudge, Svid};
use rustls::ClientConfig;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{identity, within};

/// Who calls and how: everything a peer chooses before HTTP/2.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) certificate: Option<Arc<Svid>>,
    pub(crate) alpn: &'static [u8],
    pub(crate) server_name: Option<String>,
}

impl Caller {
    /// A workload of the mesh that wants to see `wanted`, as meshd would ask.
    pub(crate) fn new(authority: &FakeCa, wanted: &str) -> Caller {
        let certificate = Some(authority.svid(&identity("web")));
        Caller { certificate, alpn: b"meshd/1", server_name: Some(server_name(&identity(wanted))) }
    }

    pub(crate) fn certificate(mut self, certificate: Option<Arc<Svid>>) -> Caller {
        self.certificate = certificate;
        self
    }

    pub(crate) fn server_name(mut self, name: Option<&str>) -> Caller {
        self.server_name = name.map(str::to_owned);
        self
    }

    pub(crate) fn alpn(mut self, alpn: &'static [u8]) -> Caller {
        self.alpn = alpn;
        self
    }

    pub(crate) async fn tls(&self, address: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
        self.tls_on(TcpStream::connect(address).await?).await
    }

    /// Over a connection that takes hardly anything until it is read.
    pub(crate) async fn narrow_tls(&self, address: SocketAddr) -> io::Result<TlsStream<TcpStream>> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(4096)?;
        self.tls_on(socket.connect(address).await?).await
    }

    async fn tls_on(&self, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        socket.set_nodelay(true)?;
        let name = self.server_name.clone().unwrap_or_else(|| "unsent.invalid".to_owned());
        let name = ServerName::try_from(name).unwrap();
        within("a TLS handshake", TlsConnector::from(Arc::new(self.config())).connect(name, socket)).await
    }

    fn config(&self) -> ClientConfig {
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(anybody());
        let mut config = match &self.certificate {
            Some(svid) => builder.with_client_auth_cert(svid.chain.clone(), svid.key.clone_key()).unwrap(),
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![self.alpn.to_vec()];
        config.enable_sni = self.server_name.is_some();
        config
    }

    /// A connection the peer has accepted: it has answered on it.
    pub(crate) async fn connect(&self, address: SocketAddr) -> Link {
        let tls = self.tls(address).await.unwrap();
        let presented = tls.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
        let (requests, mut connection) = h2::client::handshake(tls).await.unwrap();
        let mut pings = connection.ping_pong().unwrap();
        let ended = tokio::spawn(connection);
        within("the first answer", pings.ping(h2::Ping::opaque())).await.unwrap();
        Link { requests, ended, presented }
    }

    /// Why there is no connection. In TLS 1.3 a client learns that only when it listens after its handshake.
    pub(crate) async fn refused(&self, address: SocketAddr) -> io::Error {
        match self.tls(address).await {
            Err(error) => error,
            Ok(mut tls) => within("an alert", tls.read_u8()).await.unwrap_err(),
        }
    }
}

/// One HTTP/2 connection to a host.
pub(crate) struct Link {
    requests: SendRequest<Bytes>,
    pub(crate) ended: JoinHandle<Result<(), h2::Error>>,
    presented: CertificateDer<'static>,
}

/// How a host says no.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) error: Option<String>,
}

impl Refusal {
    pub(crate) fn new(status: u16, error: Option<&str>) -> Refusal {
        Refusal { status: StatusCode::from_u16(status).unwrap(), error: error.map(str::to_owned) }
    }
}

impl Link {
    /// Who the host proved to be.
    pub(crate) fn presented(&self) -> SpiffeId {
        inspect_svid(&self.presented).unwrap().id
    }

    pub(crate) fn serial(&self) -> String {
        inspect_svid(&self.presented).unwrap().serial
    }

    /// Sends a CONNECT and nothing else yet.
    pub(crate) async fn ask(&mut self, authority: &str) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let mut parts = http::uri::Parts::default();
        parts.authority = Some(authority.parse().unwrap());
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = Uri::from_parts(parts).unwrap();
        let mut ready = within("room for a stream", self.requests.clone().ready()).await?;
        ready.send_request(request, false)
    }

    /// A stream to the target, or why there is none.
    pub(crate) async fn open(&mut self, authority: &str) -> Result<Tunnel, Refusal> {
        let (response, send) = self.ask(authority).await.unwrap();
        answered(response, send).await
    }

    /// The answer to an ordinary request.
    pub(crate) async fn request(&mut self, request: Request<()>) -> Refusal {
        let (response, _send) = self.requests.send_request(request, true).unwrap();
        refusal(&within("an answer", response).await.unwrap())
    }

    /// Whether the peer has told us to go elsewhere.
    pub(crate) async fn sent_away(&mut self) -> bool {
        match self.requests.clone().ready().await {
            Ok(_) => false,
            Err(error) => error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR),
        }
    }
}

pub(crate) async fn answered(response: ResponseFuture, send: SendStream<Bytes>) -> Result<Tunnel, Refusal> {
    let response = within("an answer", response).await.unwrap();
    if response.status() != StatusCode::OK {
        return Err(refusal(&response));
    }
    Ok(Tunnel { send, receive: response.into_body(), heard: Vec::new() })
}

fn refusal(response: &http::Response<RecvStream>) -> Refusal {
    let error = response.headers().get("meshd-error").map(|error| error.to_str().unwrap().to_owned());
    Refusal { status: response.status(), error }
}

/// An accepted stream.
pub(crate) struct Tunnel {
    pub(crate) send: SendStream<Bytes>,
    receive: RecvStream,
    heard: Vec<u8>,
}

impl Tunnel {
    pub(crate) fn say(&mut self, text: &'static [u8]) {
        self.send.send_data(Bytes::from_static(text), false).unwrap();
    }

    pub(crate) fn finish(&mut self) {
        self.send.send_data(Bytes::new(), true).unwrap();
    }

    pub(crate) async fn hear(&mut self, count: usize) -> Vec<u8> {
        while self.heard.len() < count {
            let data = within("bytes", self.receive.data()).await.expect("more bytes before the end").unwrap();
            self.receive.flow_control().release_capacity(data.len()).unwrap();
            self.heard.extend_from_slice(&data);
        }
        self.heard.drain(..count).collect()
    }

    /// How the far side ends; anything it still says is a surprise.
    pub(crate) async fn ending(&mut self) -> Result<(), h2::Error> {
        match within("the far side to end", self.receive.data()).await {
            None => Ok(()),
            Some(Err(error)) => Err(error),
            Some(Ok(data)) if data.is_empty() => Ok(()),
            Some(Ok(data)) => panic!("{data:?} instead of an end"),
        }
    }
}

/// Believes everybody: what a host presents is for the tests to judge.
fn anybody() -> Arc<dyn ServerCertVerifier> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    Arc::new(ServerJudge::new(provider, |_: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime| Ok(())))
}
