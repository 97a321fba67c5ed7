//! One TLS port for gRPC and plain HTTP; a second, plain one for metrics.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use meshd_pki_api::MAX_MESSAGE_BYTES;
use meshd_pki_api::v1::host_server::HostServer;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_rustls::TlsAcceptor;
use tower_service::Service;

use crate::admin::AdminService;
use crate::federation::poll;
use crate::istio::IstioService;
use crate::pki::{Pki, PkiError};
use crate::service::{HostService, Peer};

/// Until the first byte, and from its turn on.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Every host keeps one connection open, and makes the next before it leaves it: 10,000 hosts, half as many more, twice.
const MAX_CONNECTIONS: usize = 32 * 1024;
/// Descriptors for files, sockets of operators, etcd and federation, whatever hosts and strangers do.
const OTHER_DESCRIPTORS: u64 = 256;
/// Of all connections no more than one in so many may wait for a handshake at one place.
const SHARE_OF_ONE_PLACE: usize = 4;
const MAX_STREAMS: u32 = 32;
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// A ban is on its way to every host within this time.
const REFRESH_EVERY: Duration = Duration::from_secs(1);
const DRAIN: Duration = Duration::from_secs(10);

/// Serves until `stop` completes, then lets calls in progress finish. Nothing of it runs on afterwards.
pub async fn serve(pki: Arc<Pki>, listener: TcpListener, stop: impl Future<Output = ()>) {
    let router = router(pki.clone());
    let graceful = GracefulShutdown::new();
    let mut maintenance = JoinSet::new();
    maintenance.spawn(every(pki.lifetimes.look_every(), "rotation", pki.clone(), Pki::maintain));
    maintenance.spawn(every(REFRESH_EVERY, "taking over what changed", pki.clone(), Pki::refresh));
    maintenance.spawn(poll::follow(pki.clone()));
    maintenance.spawn(every(REFRESH_EVERY, "reading how hosts may attest", pki.clone(), Pki::read_attestors));
    maintenance.spawn(pki.clone().follow_clusters());
    let (mut connections, most) = (JoinSet::new(), most_connections());
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((socket, address)) => {
                    let most = most.div_ceil(SHARE_OF_ONE_PLACE);
                    let (pki, router) = (pki.clone(), router.clone());
                    connections.spawn(connection(pki, router, socket, address, most, graceful.watcher()));
                }
                Err(error) => {
                    // Out of file descriptors, mostly: give connections time to end.
                    tracing::warn!(%error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    pki.begin_to_stop();
    while maintenance.join_next().await.is_some() {}
    if timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("calls still in progress after {} s were cut", DRAIN.as_secs());
    }
    connections.shutdown().await;
}

/// The usual soft limit of 1024 descriptors is for programs that use select(2), and a thousand hosts would take all.
fn most_connections() -> usize {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open descriptors");
    }
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    let most = connections_within(descriptors);
    if most < MAX_CONNECTIONS {
        tracing::warn!(descriptors, most, "fewer connections than a large fleet takes; raise LimitNOFILE");
    }
    most
}

/// A few always: of what little there is, half.
fn connections_within(descriptors: u64) -> usize {
    let left = descriptors.saturating_sub(OTHER_DESCRIPTORS).max(descriptors / 2);
    usize::try_from(left).unwrap_or(MAX_CONNECTIONS).min(MAX_CONNECTIONS)
}

/// Prometheus text over plain HTTP; bind it to loopback.
pub async fn serve_metrics(pki: Arc<Pki>, listener: TcpListener) -> std::io::Result<()> {
    let router = Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz)).with_state(pki);
    axum::serve(listener, router).await
}

async fn every(period: Duration, what: &'static str, pki: Arc<Pki>, act: fn(&Pki) -> Result<(), PkiError>) {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stopping = pki.stopping();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stopping.wait_for(|stops| *stops) => return,
        }
        let worker = pki.clone();
        match tokio::task::spawn_blocking(move || act(&worker)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                pki.metrics.maintenance_failures.inc();
                tracing::error!(%error, "{what} failed; what is active stays in use");
            }
            Err(error) => {
                pki.metrics.maintenance_failures.inc();
                tracing::error!(%error, "{what} panicked; what is active stays in use");
            }
        }
    }
}

async fn connection(
    pki: Arc<Pki>,
    router: Router,
    socket: TcpStream,
    address: SocketAddr,
    most_waiting: usize,
    watcher: Watcher,
) {
    _ = socket.set_nodelay(true);
    let Some(waiting) = pki.handshakes.wait(address.ip(), most_waiting) else {
        pki.metrics.tls_failures.inc();
        tracing::debug!(%address, "too many from there wait for a TLS handshake; the host asks again");
        return;
    };
    if !begins(&socket).await {
        pki.metrics.tls_failures.inc();
        tracing::debug!(%address, "nothing came within {} s", HANDSHAKE_DEADLINE.as_secs());
        return;
    }
    let Some(turn) = pki.handshakes.turn(address.ip()).await else {
        pki.metrics.tls_failures.inc();
        tracing::debug!(%address, "no turn for a TLS handshake came; the host asks again");
        return;
    };
    drop(waiting);
    let signer = pki.signer();
    let acceptor = TlsAcceptor::from(signer.tls.clone());
    let tls = match timeout(HANDSHAKE_DEADLINE, acceptor.accept(socket)).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(error)) => {
            pki.metrics.tls_failures.inc();
            tracing::debug!(%address, %error, "TLS handshake failed");
            return;
        }
        Err(_) => {
            pki.metrics.tls_failures.inc();
            tracing::debug!(%address, "no TLS handshake within {} s", HANDSHAKE_DEADLINE.as_secs());
            return;
        }
    };
    drop(turn);
    let peer = Peer::of(tls.get_ref().1.peer_certificates().unwrap_or_default(), &signer.bundle, address);
    drop(signer);
    // The routes are shared by all connections: a copy of them with its peer would be most of what a host costs.
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.clone().call(request)
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_DEADLINE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(16 * 1024)
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(HEADER_DEADLINE);
    pki.metrics.connections.inc();
    let served = watcher.watch(builder.serve_connection(TokioIo::new(tls), service).into_owned()).await;
    pki.metrics.connections.dec();
    if let Err(error) = served {
        tracing::debug!(%address, %error, "connection ended");
    }
}

/// Whether the client says anything in time: who is silent takes no turn from those who are not.
async fn begins(socket: &TcpStream) -> bool {
    matches!(timeout(HANDSHAKE_DEADLINE, socket.peek(&mut [0])).await, Ok(Ok(1..)))
}

fn router(pki: Arc<Pki>) -> Router {
    let admin = AdminService::server(pki.clone());
    let istio = IstioService::server(pki.clone());
    let grpc = HostServer::new(HostService::new(pki.clone())).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Router::new()
        .route("/.well-known/spiffe-bundle", get(spiffe_bundle))
        .route("/v1/bundle", get(bundle_by_digest))
        .route("/healthz", get(healthz))
        .with_state(pki)
        .route_service("/meshd.pki.v1.Host/{method}", grpc)
        .route_service("/meshd.pki.admin.v1.Admin/{method}", admin)
        .route_service("/istio.v1.auth.IstioCertificateService/{method}", istio)
}

/// Only what other trust domains need.
pub(crate) fn bundle_router(pki: Arc<Pki>) -> Router {
    Router::new().route("/.well-known/spiffe-bundle", get(spiffe_bundle)).with_state(pki)
}

async fn spiffe_bundle(State(pki): State<Arc<Pki>>) -> Response {
    bundle_response(pki, Vec::new()).await
}

#[derive(serde::Deserialize)]
struct BundleQuery {
    #[serde(default)]
    sha256: String,
}

async fn bundle_by_digest(State(pki): State<Arc<Pki>>, Query(query): Query<BundleQuery>) -> Response {
    match data_encoding::HEXLOWER_PERMISSIVE.decode(query.sha256.as_bytes()) {
        Ok(digest) => bundle_response(pki, digest).await,
        Err(_) => (StatusCode::BAD_REQUEST, "sha256 must be 64 hexadecimal digits\n").into_response(),
    }
}

async fn bundle_response(pki: Arc<Pki>, digest: Vec<u8>) -> Response {
    let found = tokio::task::spawn_blocking(move || pki.bundle(&digest)).await;
    match found {
        Ok(Ok(bundle)) => ([(header::CONTENT_TYPE, "application/json")], bundle.jwks).into_response(),
        Ok(Err(refused)) => (StatusCode::NOT_FOUND, format!("{refused}\n")).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn healthz(State(pki): State<Arc<Pki>>) -> Response {
    let healthy = tokio::task::spawn_blocking(move || pki.bundle(&[])).await;
    match healthy {
        Ok(Ok(_)) => "ok\n".into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "the database does not answer\n").into_response(),
    }
}

async fn metrics(State(pki): State<Arc<Pki>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], pki.metrics.encode()).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_handshake_begins_with_a_byte_that_is_still_there_afterwards() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).await.unwrap();
        let (mut socket, _) = listener.accept().await.unwrap();
        assert!(timeout(Duration::from_millis(50), begins(&socket)).await.is_err(), "silence is no beginning");
        client.write_all(b"hello").await.unwrap();
        assert!(begins(&socket).await);
        let mut read = [0; 5];
        socket.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"hello");
        drop(client);
        assert!(!begins(&socket).await, "it is gone");
    }

    #[test]
    fn connections_leave_descriptors_for_everything_else() {
        assert_eq!(connections_within(1024), 768);
        assert_eq!(connections_within(256), 128);
        assert_eq!(connections_within(524_288), MAX_CONNECTIONS);
        assert_eq!(connections_within(u64::MAX), MAX_CONNECTIONS);
    }
}
