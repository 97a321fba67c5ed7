//! The socket: accept, limit, HTTP/2, and which API is called.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use meshd_sys::peer::Peer;
use meshd_workload_api::envoy::secret_discovery_service_server::SecretDiscoveryServiceServer;
use meshd_workload_api::spiffe::spiffe_workload_api_server::SpiffeWorkloadApiServer;
use tokio::net::{UnixListener, UnixStream};
use tonic::body::Body;
use tonic::{Code, Status};
use tower_service::Service;

use super::Sources;
use super::attest::Caller;
use super::authority::Named;
use super::limits::{Admission, Complaints, Holder, Limits};
use super::refused::Refused;
use super::sds::Sds;
use super::session::Session;
use super::spiffe::Spiffe;
use crate::admin;
use crate::attest::Attestor;

/// Requests are a few names.
const MAX_REQUEST: usize = 64 * 1024;
const MAX_HEADERS: u32 = 16 * 1024;
/// Streams on one connection.
const MAX_STREAMS: u32 = 128;
/// What may wait for a client that does not read; an answer has a few KiB.
const SEND_BUFFER: usize = 64 * 1024;
/// Without descriptors accepting fails until some are closed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Kept from those who came by accident.
const HEADER: &str = "workload.spiffe.io";

/// Binds the socket, for everybody: who calls is asked of the kernel.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    admin::bind_with_mode(path, 0o666)
}

pub async fn serve(listener: UnixListener, sources: Arc<Sources>) {
    let (limits, complaints) = (Limits::default(), Arc::new(Complaints::default()));
    loop {
        let socket = match listener.accept().await {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "cannot accept at the Workload API");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let accepted = Instant::now();
        let counters = &sources.shared.telemetry.workload_api;
        let Some((caller, admission)) = admit(&limits, &socket, &sources.shared.attestor) else {
            counters.turned_away();
            continue;
        };
        let (sources, complaints) = (sources.clone(), complaints.clone());
        let session = Arc::new(Session { sources, caller, admission: Arc::new(admission), complaints });
        tokio::spawn(connection(socket, session, accepted));
    }
}

/// None if the caller has gone already, or has too much open.
fn admit(limits: &Limits, socket: &UnixStream, attestor: &Arc<Attestor>) -> Option<(Caller, Admission)> {
    let caller = Caller::of(Peer::of(socket).ok()?, attestor.clone());
    let holder = Holder::of(&caller.owner().ok()?);
    let admission = limits.admit(holder, Instant::now())?;
    Some((caller, admission))
}

async fn connection(socket: UnixStream, session: Arc<Session>, accepted: Instant) {
    let counters = &session.sources.shared.telemetry.workload_api;
    let _open = counters.connection();
    if !session.caller.meet(accepted).await {
        // Kept, it would be nobody's for good: it dials anew.
        counters.turned_away();
        return;
    }
    let admission = session.admission.clone();
    let socket = Named::new(socket, move |requests| admission.pace(requests, Instant::now()));
    let service = service_fn(move |request| {
        let session = session.clone();
        async move { Ok::<_, Infallible>(call(session, request).await) }
    });
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buf_size(SEND_BUFFER)
        .serve_connection(TokioIo::new(socket), service);
    if let Err(error) = served.await {
        tracing::debug!(%error, "a connection to the Workload API ended");
    }
}

async fn call(session: Arc<Session>, request: Request<Incoming>) -> Response<Body> {
    let (service, method) = named(request.uri().path());
    let counters = session.sources.shared.clone();
    let done = match service {
        Some(Api::Spiffe) if !has_header(&request) => Ok(Status::from(Refused::NoHeader).into_http()),
        Some(Api::Spiffe) => {
            SpiffeWorkloadApiServer::new(Spiffe(session)).max_decoding_message_size(MAX_REQUEST).call(request).await
        }
        Some(Api::Secrets) => {
            SecretDiscoveryServiceServer::new(Sds(session)).max_decoding_message_size(MAX_REQUEST).call(request).await
        }
        None => Ok(Status::unimplemented("this socket serves SpiffeWorkloadAPI and Envoy's StreamSecrets").into_http()),
    };
    let Ok(response) = done;
    let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
    counters.telemetry.workload_api.answered(method, code);
    response
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Api {
    Spiffe,
    Secrets,
}

/// The API a path means, and the method's name among those we count.
fn named(path: &str) -> (Option<Api>, &'static str) {
    const METHODS: [&str; 7] = [
        "FetchX509SVID",
        "FetchX509Bundles",
        "FetchJWTSVID",
        "FetchJWTBundles",
        "ValidateJWTSVID",
        "StreamSecrets",
        "FetchSecrets",
    ];
    let (service, method) = path.strip_prefix('/').and_then(|path| path.split_once('/')).unwrap_or_default();
    let api = match service {
        "SpiffeWorkloadAPI" => Some(Api::Spiffe),
        "envoy.service.secret.v3.SecretDiscoveryService" => Some(Api::Secrets),
        _ => None,
    };
    (api, METHODS.into_iter().find(|known| *known == method).unwrap_or("other"))
}

fn has_header(request: &Request<Incoming>) -> bool {
    let mut given = request.headers().get_all(HEADER).iter();
    given.next().is_some_and(|value| value == "true") && given.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_means_an_api_and_only_known_methods_are_counted_by_name() {
        assert_eq!(named("/SpiffeWorkloadAPI/FetchX509SVID"), (Some(Api::Spiffe), "FetchX509SVID"));
        assert_eq!(named("/SpiffeWorkloadAPI/FetchWITSVID"), (Some(Api::Spiffe), "other"));
        let sds = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
        assert_eq!(named(sds), (Some(Api::Secrets), "StreamSecrets"));
        assert_eq!(named("/x"), (None, "other"));
    }
}
