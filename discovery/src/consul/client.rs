//! One HTTP/1.1 connection to Consul: a request at a time, as a blocking query occupies it.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::settings::{Address, Settings, SettingsError};

/// TCP and TLS together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// 10,000 instances of one service have a third of it.
const LARGEST_ANSWER: usize = 64 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("Consul at {authority} cannot be reached: {reason}")]
    Unreachable { authority: String, reason: String },
    #[error("Consul at {authority} did not answer within {} s", after.as_secs())]
    Deadline { authority: String, after: Duration },
}

#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

pub(super) struct Client {
    settings: Arc<Settings>,
    connection: Option<SendRequest<Empty<Bytes>>>,
}

impl Client {
    pub(super) fn new(settings: Arc<Settings>) -> Client {
        Client { settings, connection: None }
    }

    /// To the same Consul over a connection of its own.
    pub(super) fn another(&self) -> Client {
        Client::new(self.settings.clone())
    }

    /// What is shown to Consul now.
    pub(super) fn token(&self) -> Result<Option<HeaderValue>, CallError> {
        Ok(self.settings.token()?)
    }

    pub(super) async fn get(
        &mut self,
        path: &str,
        token: Option<&HeaderValue>,
        deadline: Duration,
    ) -> Result<Reply, CallError> {
        let address = self.settings.parsed()?;
        match timeout(deadline, self.exchange(&address, path, token)).await {
            Ok(reply) => reply,
            Err(_) => Err(CallError::Deadline { authority: address.authority, after: deadline }),
        }
    }

    async fn exchange(
        &mut self,
        address: &Address,
        path: &str,
        token: Option<&HeaderValue>,
    ) -> Result<Reply, CallError> {
        // Consul may close a connection between two requests; that is no trouble.
        if let Some(mut connection) = self.connection.take()
            && let Ok(reply) = send(&mut connection, address, path, token).await
        {
            self.connection = Some(connection);
            return Ok(reply);
        }
        let unreachable = |reason: String| CallError::Unreachable { authority: address.authority.clone(), reason };
        let opened = timeout(CONNECT_DEADLINE, self.open(address)).await;
        let late = |_| unreachable(format!("no connection within {} s", CONNECT_DEADLINE.as_secs()));
        let mut connection = opened.map_err(late)??;
        let reply = send(&mut connection, address, path, token).await.map_err(unreachable)?;
        self.connection = Some(connection);
        Ok(reply)
    }

    async fn open(&self, address: &Address) -> Result<SendRequest<Empty<Bytes>>, CallError> {
        let unreachable = |reason: &dyn std::fmt::Display| CallError::Unreachable {
            authority: address.authority.clone(),
            reason: reason.to_string(),
        };
        let tls = if address.tls { Some(self.settings.tls()?) } else { None };
        let tcp = TcpStream::connect(&address.authority).await.map_err(|error| unreachable(&error))?;
        tcp.set_nodelay(true).map_err(|error| unreachable(&error))?;
        let connection = match tls {
            None => handshake(tcp).await,
            Some(config) => {
                let name = ServerName::try_from(address.host.clone()).map_err(|error| unreachable(&error))?;
                let tls = TlsConnector::from(config).connect(name, tcp).await;
                handshake(tls.map_err(|error| unreachable(&format!("TLS: {error}")))?).await
            }
        };
        connection.map_err(|error| unreachable(&error))
    }
}

async fn handshake(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<SendRequest<Empty<Bytes>>, hyper::Error> {
    let (sender, connection) = http1::handshake(TokioIo::new(io)).await?;
    // Ends by itself when the sender is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to Consul ended");
        }
    });
    Ok(sender)
}

async fn send(
    connection: &mut SendRequest<Empty<Bytes>>,
    address: &Address,
    path: &str,
    token: Option<&HeaderValue>,
) -> Result<Reply, String> {
    let mut request = Request::get(path).header(HOST, &address.authority);
    if let Some(token) = token {
        request = request.header("x-consul-token", token);
    }
    let request = request.body(Empty::new()).map_err(|error| error.to_string())?;
    connection.ready().await.map_err(|error| told(&error))?;
    let response = connection.send_request(request).await.map_err(|error| told(&error))?;
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, LARGEST_ANSWER).collect().await.map_err(|error| error.to_string())?;
    Ok(Reply { status: parts.status, headers: parts.headers, body: body.to_bytes() })
}

/// hyper says the rest in its cause: that of a refused client certificate, for instance.
fn told(error: &hyper::Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(" ({cause})"));
    format!("{error}{}", cause.unwrap_or_default())
}
