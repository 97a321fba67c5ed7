//! One HTTP/2 connection to one member.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::body::Body;

use crate::settings::Endpoint;

/// A member that stands still is noticed within both together. etcd closes connections that ping more often than every
/// 5 s (--grpc-keepalive-min-time), or without a call under way.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub(crate) struct Connection(http2::SendRequest<Body>);

pub(crate) async fn connect(endpoint: &Endpoint, tls: Option<Arc<ClientConfig>>) -> std::io::Result<Connection> {
    let tcp = TcpStream::connect(&endpoint.address).await?;
    tcp.set_nodelay(true)?;
    match tls {
        None => http(tcp).await,
        Some(config) => {
            let name = ServerName::try_from(endpoint.host.clone()).map_err(std::io::Error::other)?;
            http(TlsConnector::from(config).connect(name, tcp).await?).await
        }
    }
}

async fn http(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> std::io::Result<Connection> {
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .handshake(TokioIo::new(io))
        .await
        .map_err(std::io::Error::other)?;
    // Ends by itself when the last sender is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to etcd ended");
        }
    });
    Ok(Connection(sender))
}

impl tower_service::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
