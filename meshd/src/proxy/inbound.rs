//! Mesh to local application: the whole story of a connection and of each stream on it.

use std::cell::Cell;
use std::net::{SocketAddr, TcpStream as StdStream};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Method, Request, Response, StatusCode};
use meshd_identity::SpiffeId;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;

use super::authorize::{self, Policy};
use super::env::Env;
use super::limits::Admission;
use super::report::Report;
use super::serve::Watch;
use super::worker::STREAM_TASK_MAX;
use super::{deliver, serve};
use crate::enrol::Delivery;
use crate::fault::Fault;
use crate::lifecycle::Stage;
use crate::telemetry::{Direction, Tls};
use crate::transport::dial::{tls_fault, tls_reason};
use crate::transport::mesh::{self, Server};
use crate::transport::secure_io::SecureIo;
use crate::transport::tls::{PeerCertificate, TlsState};
use crate::transport::wire::{self, HANDSHAKE_DEADLINE, Target, WireVersion};

/// A peer's connection, its certificate verified.
struct Peer {
    server: Server,
    facts: Rc<PeerFacts>,
    certificate: PeerCertificate,
    expires: SystemTime,
}

/// What every stream of the connection needs to know about it.
struct PeerFacts {
    id: SpiffeId,
    address: SocketAddr,
    /// Our own address as the peer dialled it.
    dialled: SocketAddr,
    presented: SpiffeId,
    /// The peer chose by SNI which identity it wanted to see.
    chosen: bool,
    version: WireVersion,
    /// Why the connection was cut, if it was: the peer is one no longer to be talked to.
    cut: Cell<Option<Fault>>,
}

impl PeerFacts {
    /// Whether the peer's trust domain is one of ours to deal with, for the identity it chose if it chose one. Each stream
    /// is asked for its own again.
    fn is_dealt_with(&self, tls: &TlsState) -> bool {
        let domain = self.id.trust_domain();
        if self.chosen { tls.deals(&self.presented, domain) } else { tls.knows(domain) }
    }
}

/// One peer connection, from handshake to its last stream.
pub(super) async fn connection(env: Rc<Env>, socket: StdStream, address: SocketAddr, mut admission: Admission) {
    let tls = env.shared.tls.load_full();
    let handshakes = &env.shared.telemetry.handshakes;
    let shaken = timeout(HANDSHAKE_DEADLINE, handshake(&tls, socket, address)).await;
    admission.shaken();
    match shaken {
        Ok(Ok(peer)) => {
            handshakes.accepted.fetch_add(1, Ordering::Relaxed);
            streams(env, &tls, peer).await;
        }
        Ok(Err(refusal)) => refuse_peer(&env, address, &refusal),
        Err(_) => refuse_peer(&env, address, &Refusal::of(Fault::TlsHandshake, "it did not finish in time")),
    }
}

/// Why a peer was turned away before it could ask for anything.
struct Refusal {
    fault: Fault,
    reason: String,
}

impl Refusal {
    fn of(fault: Fault, reason: impl ToString) -> Refusal {
        Refusal { fault, reason: reason.to_string() }
    }
}

/// Counted always, told once in a while per address: strangers must not fill the log.
fn refuse_peer(env: &Env, address: SocketAddr, refusal: &Refusal) {
    env.shared.telemetry.handshakes.accept_failed.fetch_add(1, Ordering::Relaxed);
    env.shared.telemetry.refused.count(Direction::Inbound, refusal.fault);
    if env.may_log(&address.ip().to_string()) {
        let remedy = match refusal.fault {
            Fault::CertExpired => "; look at `meshd check` on that host, and at both clocks",
            Fault::Banned => "; `meshd-pki deny list` says why",
            Fault::Unfederated => "; if its identities are to be believed: `meshd-pki federation add`",
            Fault::TlsHandshake => "; a host of another mesh, or something that is no meshd, dials this port",
            _ => "",
        };
        let (error, reason) = (refusal.fault.label(), &refusal.reason);
        tracing::warn!(%address, error, "refused a peer's handshake: {reason}{remedy}");
    }
}

async fn handshake(tls: &TlsState, socket: StdStream, address: SocketAddr) -> Result<Peer, Refusal> {
    let broken = |reason: &str| Refusal::of(Fault::TlsHandshake, reason);
    let socket = TcpStream::from_std(socket).map_err(|error| Refusal::of(Fault::Internal, error))?;
    let dialled = socket.local_addr().map_err(|error| Refusal::of(Fault::Internal, error))?;
    let accepting = TlsAcceptor::from(tls.server.clone()).accept(socket);
    let stream = accepting.await.map_err(|error| Refusal::of(tls_fault(&error), tls_reason(&error)))?;
    let (socket, session) = stream.into_inner();
    let version = WireVersion::from_alpn(session.alpn_protocol()).ok_or_else(|| broken("no common wire version"))?;
    let certificate = tls.peer(session.peer_certificates()).ok_or_else(|| broken("no SVID"))?;
    let (presented, chosen) = tls.presented(session.server_name()).ok_or_else(|| broken("no such identity here"))?;
    let (id, presented, cut) = (certificate.id.clone(), presented.clone(), Cell::new(None));
    let facts = PeerFacts { id, address, dialled, presented, chosen, version, cut };
    let own = tls.identity(&facts.presented).map_or(SystemTime::UNIX_EPOCH, |identity| identity.not_after);
    let server = mesh::server(SecureIo::new(socket, session.into()))
        .await
        .map_err(|error| Refusal::of(Fault::TlsHandshake, error))?;
    let expires = own.min(certificate.not_after);
    Ok(Peer { server, facts: Rc::new(facts), certificate, expires })
}

/// Accepts streams until the connection ends; told to go elsewhere at drain, rotation or expiry.
async fn streams(env: Rc<Env>, tls: &TlsState, mut peer: Peer) {
    let mut lifecycle = env.lifecycle.clone();
    let mut rotated = env.tls_changes.clone();
    let mut denied = tls.denied().clone();
    let mut renewed = env.tls_changes.clone();
    let domain = peer.facts.id.trust_domain().clone();
    let is_old = |_: &u64| env.shared.tls.load().generation(&domain) != tls.generation(&domain);
    let lifetime = peer.expires.duration_since(SystemTime::now()).unwrap_or_default();
    let mut farewell = false;
    let expiry = tokio::time::sleep_until(Instant::now() + lifetime);
    tokio::pin!(expiry);
    loop {
        let go_away = async {
            tokio::select! {
                () = lifecycle.reached(Stage::Draining) => {}
                _ = rotated.wait_for(is_old) => {}
                () = &mut expiry => {}
            }
        };
        tokio::select! {
            biased;
            // First: a peer that keeps us busy is cut all the same.
            () = denied.changed() => if denied.denies(&peer.certificate.marks) {
                return cut(&env, &peer, Fault::Banned);
            },
            Ok(()) = renewed.changed() => if !peer.facts.is_dealt_with(&env.shared.tls.load()) {
                return cut(&env, &peer, Fault::Unfederated);
            },
            incoming = peer.server.accept() => match incoming {
                Some(Ok((request, respond))) => spawn_stream(&env, &peer.facts, request, respond),
                Some(Err(error)) => {
                    tracing::debug!(address = %peer.facts.address, peer = %peer.facts.id, %error, "peer connection broke");
                    return;
                }
                None => return peer.server.close().await,
            },
            () = go_away, if !farewell => {
                farewell = true;
                peer.server.drain();
            }
        }
    }
}

/// Everything on the connection ends with it, at once: it is not served to its end for somebody who is denied, or not
/// believed any more.
fn cut(env: &Env, peer: &Peer, why: Fault) {
    peer.facts.cut.set(Some(why));
    env.shared.telemetry.handshakes.cut[Direction::Inbound as usize].fetch_add(1, Ordering::Relaxed);
    let (address, peer) = (peer.facts.address, &peer.facts.id);
    let reason = match why {
        Fault::Unfederated => "its trust domain is not federated any more",
        _ => "the peer is on the deny list",
    };
    tracing::warn!(%address, %peer, "closed a connection: {reason}");
}

fn spawn_stream(env: &Rc<Env>, facts: &Rc<PeerFacts>, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) {
    let Some(target) = target(facts.version, &request) else {
        return malformed(env, &mut respond);
    };
    let (env, facts, receive) = (env.clone(), facts.clone(), request.into_body());
    let working = env.work.begin();
    let task = async move {
        let _working = working;
        stream(&env, &facts, target, receive, respond).await;
    };
    debug_assert!(size_of_val(&task) <= STREAM_TASK_MAX, "an idle stream costs {} bytes", size_of_val(&task));
    tokio::task::spawn_local(task);
}

/// One stream: target, authorize, deliver, serve, report.
async fn stream(
    env: &Env,
    peer: &PeerFacts,
    target: Target,
    mut receive: RecvStream,
    mut respond: SendResponse<Bytes>,
) {
    let mut report = Box::new(Report::opened(&env.shared.telemetry, env.worker, Direction::Inbound, peer.address));
    report.peer_identity(&peer.id);
    report.own_identity(&peer.presented);
    // Boxed: connecting takes more memory than serving, and only for a moment.
    let outcome = match Box::pin(accept_target(env, peer, target, &mut report)).await {
        Ok(mut app) => serve_stream(env, &mut app, &mut receive, &mut respond, &report).await,
        Err(fault) => {
            refuse(&mut respond, fault);
            Err(fault)
        }
    };
    report.finish(outcome.map_err(|fault| peer.cut.get().unwrap_or(fault)));
}

/// None: not a CONNECT, or not one of this wire version.
fn target(version: WireVersion, request: &Request<RecvStream>) -> Option<Target> {
    if request.method() != Method::CONNECT {
        return None;
    }
    Target::parse(version, request.uri().authority()?.as_str())
}

async fn accept_target(env: &Env, peer: &PeerFacts, target: Target, report: &mut Report) -> Result<TcpStream, Fault> {
    let enrolment = env.shared.enrolment.load_full();
    let delivery = deliver::find(&enrolment, &target, peer.dialled, &peer.presented, peer.chosen)?;
    report.unit(&delivery.owner.unit);
    report.target(&delivery.service, delivery.port);
    let permit = authorize::check(Policy::default(), &env.shared.tls.load(), &peer.id, &delivery)?;
    let caller = deliver::Caller { id: &peer.id, address: peer.address };
    let delivered = deliver::connect(&env.dialer, &delivery, &caller, permit).await?;
    report.connected(delivery.deliver, Tls::Mutual);
    if let Some(why) = &delivered.hidden {
        tell_hidden(env, peer, &delivery, why);
    }
    Ok(delivered.app)
}

/// The application asked for the caller's address and cannot have it.
fn tell_hidden(env: &Env, peer: &PeerFacts, delivery: &Delivery, why: &deliver::Hidden) {
    env.shared.telemetry.hidden_callers.fetch_add(1, Ordering::Relaxed);
    if env.may_log(&format!("hidden caller of {}", delivery.deliver)) {
        let (caller, deliver, service) = (peer.address.ip(), delivery.deliver, &delivery.service);
        tracing::warn!(%service, %caller, %deliver, %why,
            "the application asked for its caller's address (`client_address = \"transparent\"`) and sees this host's; \
             `proxy-v2` shows every caller");
    }
}

async fn serve_stream(
    env: &Env,
    app: &mut TcpStream,
    receive: &mut RecvStream,
    respond: &mut SendResponse<Bytes>,
    report: &Report,
) -> Result<(), Fault> {
    let Ok(mut send) = respond.send_response(Response::new(()), false) else {
        // The peer has given the stream up: the application must see an abort, not an empty connection.
        serve::abort(app);
        return Err(Fault::PeerReset);
    };
    let watch = Watch {
        from_app: |bytes| report.count_down(bytes),
        to_app: |bytes| report.count_up(bytes),
        budget: &env.budget,
    };
    serve::opaque(app, &mut send, receive, Vec::new(), &watch).await
}

fn refuse(respond: &mut SendResponse<Bytes>, fault: Fault) {
    let status = StatusCode::from_u16(fault.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let mut response = Response::new(());
    *response.status_mut() = status;
    response.headers_mut().insert(wire::ERROR_HEADER, wire::error_header(fault));
    // Fails only when the peer has given up already.
    let _ = respond.send_response(response, true);
}

fn malformed(env: &Env, respond: &mut SendResponse<Bytes>) {
    env.shared.telemetry.refused.count(Direction::Inbound, Fault::UnknownTarget);
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::BAD_REQUEST;
    if respond.send_response(response, true).is_err() {
        respond.send_reset(Reason::PROTOCOL_ERROR);
    }
}
