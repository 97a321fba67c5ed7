//! CONNECT: the first candidate that answers, proven to be who its record says.
//!
//! A failed candidate is left at once for the next one, and what the application already said is kept
//! for it. One thing is never done: repeating bytes that an application may already have received.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Uri};
use meshd_discovery::{Endpoint, Transport};
use meshd_identity::SpiffeId;
use tokio::net::TcpStream;

use super::balance::{Candidate, Candidates, Failed};
use crate::enrol::Workload;
use crate::fault::{Fault, Side};
use crate::telemetry::Tls;
use crate::transport::chunk;
use crate::transport::dial::{Dialer, PoolKey};
use crate::transport::pool::{Pool, Slot};
use crate::transport::tls::TlsState;
use crate::transport::wire::{self, EARLY_DATA, WireVersion};

/// Connections tried per endpoint: each may be told to go away between the pool and its first frame, but a
/// peer that does so to fresh ones is leaving.
const OPEN_TRIES: usize = 3;

/// The far side, ready to exchange bytes.
pub(super) struct Connected {
    pub upstream: Upstream,
    pub endpoint: SocketAddr,
    pub candidate: Candidate,
    /// Read from the application already; `chunks` is what still has to be sent.
    pub early: Early,
}

pub(super) enum Upstream {
    /// The slot is given back when the stream is done with.
    Mesh {
        send: SendStream<Bytes>,
        receive: RecvStream,
        slot: Slot,
    },
    Plain(TcpStream),
}

impl Upstream {
    pub(super) fn tls(&self) -> Tls {
        match self {
            Upstream::Mesh { .. } => Tls::Mutual,
            Upstream::Plain(_) => Tls::Disabled,
        }
    }
}

/// What the application said before anybody answered, kept for the next candidate.
#[derive(Debug, Default)]
pub(super) struct Early {
    pub chunks: Vec<Bytes>,
    pub length: usize,
    /// The application has ended its side (and will say so again when it is read again).
    finished: bool,
}

impl Early {
    fn wants_more(&self) -> bool {
        !self.finished && self.length < EARLY_DATA
    }

    fn push(&mut self, chunk: Bytes) {
        self.finished = chunk.is_empty();
        self.length += chunk.len();
        if !self.finished {
            self.chunks.push(chunk);
        }
    }
}

/// What went wrong with one candidate, and whether the far application may have seen our bytes.
struct Failure {
    fault: Fault,
    delivered: bool,
    /// The connection was leaving, and another to the same endpoint may stay: it renewed its certificate, mostly.
    left: bool,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure { fault, delivered: false, left: false }
    }
}

/// How to reach candidates.
pub(super) struct Connector<'a> {
    pub pool: &'a Pool,
    pub dialer: &'a Dialer,
    pub tls: &'a TlsState,
}

pub(super) async fn first(
    connector: Connector<'_>,
    who: &Workload,
    mut candidates: Candidates<'_>,
    app: &mut TcpStream,
    mut probe: impl FnMut(Failed),
) -> Result<Connected, Fault> {
    let mut early = Early::default();
    let mut last = Fault::NoEndpoints;
    while let Some(candidate) = candidates.next(Instant::now()) {
        let started = Instant::now();
        match attempt(&connector, who, candidate.endpoint(), app, &mut early).await {
            Ok(upstream) => {
                let now = Instant::now();
                candidate.answered(now - started, now);
                let endpoint = candidate.endpoint().dial;
                return Ok(Connected { upstream, endpoint, candidate, early });
            }
            Err(failure) => {
                if failure.fault == Fault::AppReset {
                    return Err(failure.fault);
                }
                // What is our own doing, or a decision about the caller, says nothing of the endpoint; that it leads
                // back to us does.
                if (failure.fault.side() == Side::Peer || failure.fault == Fault::Loop)
                    && let Some(failed) = candidate.failed(connector.dialer.connect_timeout, Instant::now())
                {
                    probe(failed);
                }
                if failure.delivered || !failure.fault.retryable() {
                    return Err(failure.fault);
                }
                last = failure.fault;
            }
        }
    }
    Err(last)
}

async fn attempt(
    connector: &Connector<'_>,
    who: &Workload,
    endpoint: &Endpoint,
    app: &mut TcpStream,
    early: &mut Early,
) -> Result<Upstream, Failure> {
    let Some(key) = pool_key(&who.identity, endpoint) else {
        return Ok(Upstream::Plain(connector.dialer.tcp(endpoint.dial).await?));
    };
    let limit = connector.dialer.connect_timeout;
    for _ in 0..OPEN_TRIES {
        let slot = connector.pool.checkout(connector.dialer, connector.tls, &key).await?;
        // A connection that was told to go away since it was pooled is no fault of the endpoint's.
        match open_stream(&slot, endpoint, key.version) {
            Ok(opening) => {
                let may_send = key.version == WireVersion::Meshd1 && slot.lively(Instant::now());
                match answered(slot, opening, app, early, may_send, limit).await {
                    Err(failure) if failure.left => {}
                    answer => return answer,
                }
            }
            Err(_) => slot.retire(),
        }
    }
    Err(Fault::Drain.into())
}

/// Which pooled connection leads to `endpoint`; None for one reached in clear.
pub(super) fn pool_key(source: &SpiffeId, endpoint: &Endpoint) -> Option<PoolKey> {
    let version = match endpoint.transport {
        Transport::Meshd => WireVersion::Meshd1,
        Transport::Hbone => WireVersion::Hbone,
        Transport::Plaintext => return None,
    };
    Some(PoolKey { source: source.clone(), expected: endpoint.identity.clone(), address: endpoint.dial, version })
}

type Opening = (h2::client::ResponseFuture, SendStream<Bytes>);

fn open_stream(slot: &Slot, endpoint: &Endpoint, version: WireVersion) -> Result<Opening, h2::Error> {
    let authority = match version {
        WireVersion::Meshd1 => format!("{}:{}", endpoint.service, endpoint.port),
        WireVersion::Hbone => endpoint.target.to_string(),
    };
    let mut parts = http::uri::Parts::default();
    parts.authority = authority.parse().ok();
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    slot.request().send_request(request, false)
}

/// Waits for the 200, passing on what the application says meanwhile.
async fn answered(
    slot: Slot,
    (response, mut send): Opening,
    app: &mut TcpStream,
    early: &mut Early,
    mut may_send: bool,
    limit: Duration,
) -> Result<Upstream, Failure> {
    let mut sent = 0;
    if may_send {
        for chunk in &early.chunks {
            send.send_data(chunk.clone(), false).map_err(|_| Fault::PeerReset)?;
            sent += 1;
        }
    }
    let mut response = pin!(response);
    let mut patience = pin!(tokio::time::sleep(limit));
    let outcome = poll_fn(|cx| {
        while early.wants_more() {
            match chunk::poll_chunk(app, cx, EARLY_DATA - early.length) {
                Poll::Ready(Ok(chunk)) => {
                    // Kept before it is sent: a refusal that comes in between must not cost the next candidate a byte.
                    early.push(chunk.clone());
                    if may_send && !chunk.is_empty() {
                        may_send = send.send_data(chunk, false).is_ok();
                        sent += usize::from(may_send);
                    }
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Outcome::AppGone),
                Poll::Pending => break,
            }
        }
        if let Poll::Ready(response) = response.as_mut().poll(cx) {
            return Poll::Ready(Outcome::Answer(response));
        }
        patience.as_mut().poll(cx).map(|()| Outcome::TimedOut)
    })
    .await;
    match outcome {
        Outcome::Answer(Ok(response)) if response.status() == http::StatusCode::OK => {
            early.chunks.drain(..sent);
            Ok(Upstream::Mesh { send, receive: response.into_body(), slot })
        }
        // A refusal is a promise that nothing was delivered.
        Outcome::Answer(Ok(response)) => Err(wire::refusal(response.status().as_u16(), response.headers()).into()),
        Outcome::Answer(Err(error)) => Err(broken(&slot, &error, sent > 0)),
        Outcome::TimedOut => {
            slot.suspect(Instant::now());
            Err(Failure { fault: Fault::ConnectTimeout, delivered: sent > 0, left: false })
        }
        Outcome::AppGone => Err(Fault::AppReset.into()),
    }
}

enum Outcome {
    Answer(Result<http::Response<RecvStream>, h2::Error>),
    TimedOut,
    AppGone,
}

/// GOAWAY and REFUSED_STREAM mean the stream was never looked at (RFC 9113, 8.7); anything else may
/// have happened after the far application got our bytes.
fn broken(slot: &Slot, error: &h2::Error, bytes_sent: bool) -> Failure {
    // Once the connection itself has broken, its last GOAWAY is reported for streams that were under way, too. One that
    // ended in order was done with those: what has no answer was not among them.
    let left = error.is_go_away() && error.is_remote() && !slot.broke();
    if let Some(fault) = slot.cut() {
        return Failure { fault, delivered: bytes_sent, left: false };
    }
    let untouched = left || error.reason() == Some(h2::Reason::REFUSED_STREAM);
    slot.retire();
    let fault = if untouched { Fault::Drain } else { Fault::ConnectRefused };
    Failure { fault, delivered: bytes_sent && !untouched, left }
}
