//! The one connection a host keeps to its PKI. Its conversation, its renewals and its tokens go over it together, so
//! that none of them costs a handshake of its own.

use std::error::Error;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tonic::{Code, Response, Status};

use crate::connect::{Connection, PkiClient, RPC_DEADLINE, Unusable, connect_anywhere, late, verified_tls};
use crate::error::RenewError;
use crate::surroundings::Clock;
use crate::{Credentials, Svid, refusal_text};

/// Whether a server that owes an answer lives is asked for so long: it answers that without a queue.
const PROOF_OF_LIFE: Duration = Duration::from_secs(3);
/// A server that was left is asked after all others for so long.
const AVOIDED: Duration = Duration::from_secs(60);
/// Of new connections in a row that the server ended before any answer: one may be a restart, more are our certificate.
const MOST_CUT: u32 = 1;

/// Clones share it.
#[derive(Clone, Default)]
pub struct Line(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Locked while somebody connects: whoever comes meanwhile shares what comes of it.
    slot: Mutex<Slot>,
    /// Attempts to connect that have ended.
    ended: AtomicU64,
    /// New connections in a row that ended before any answer.
    cut: AtomicU32,
}

#[derive(Default)]
struct Slot {
    open: Option<Open>,
    failed: Option<(MadeWith, Unusable)>,
    left: Option<(String, Instant)>,
}

/// Whoever wants the line, by what both ends prove themselves.
pub(crate) struct Caller<'a> {
    pub(crate) held: &'a Credentials,
    pub(crate) pki_time: SystemTime,
    pub(crate) clock: &'a Clock,
}

/// A connection is good for as long as it would be made the same again.
#[derive(Clone)]
struct MadeWith {
    host: Arc<Svid>,
    roots: Vec<Vec<u8>>,
}

impl MadeWith {
    fn of(held: &Credentials) -> MadeWith {
        MadeWith { host: held.host.clone(), roots: held.bundle.roots.clone() }
    }

    fn fits(&self, held: &Credentials) -> bool {
        Arc::ptr_eq(&self.host, &held.host) && self.roots == held.bundle.roots
    }
}

#[derive(Clone)]
pub(crate) struct Open {
    pub(crate) connection: Connection,
    made_with: MadeWith,
    number: u64,
    /// It was there already: it may have broken unnoticed.
    pub(crate) is_old: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error(transparent)]
    Unreachable(#[from] RenewError),
    #[error("the PKI refused: {}", refusal_text(.0))]
    Answered(Status),
    #[error("the connection to the PKI broke: {}", refusal_text(.status))]
    Broken {
        status: Status,
        /// So often before any answer that the server seems not to accept this host's certificate, which in TLS 1.3 it says
        /// after we believe the connection made.
        is_cut: bool,
    },
}

impl Line {
    /// One call. A connection that was there already is left for a new one if it breaks, or if no answer came within
    /// `patience` and its server does not prove to live: it may be gone without a word.
    pub(crate) async fn ask<T, F>(
        &self,
        caller: &Caller<'_>,
        patience: Duration,
        rpc: impl Fn(PkiClient) -> F,
    ) -> Result<T, Failed>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut open = self.open(caller).await?;
        // Others may have made the next one, and it may have broken as well.
        for _ in 0..2 {
            if !open.is_old {
                break;
            }
            match call_while_alive(&open.connection, patience, rpc(open.connection.pki())).await {
                Ok(reply) => return Ok(self.answered(reply)),
                // Another server may be better off.
                Err(status)
                    if is_answer(&status) && (status.code() != Code::Unavailable || caller.held.pki.len() < 2) =>
                {
                    return Err(Failed::Answered(self.answered(status)));
                }
                Err(status) => tracing::debug!(%status, "leaving the connection to the PKI for a new one"),
            }
            self.leave(&open).await;
            open = self.open(caller).await?;
        }
        match timeout(RPC_DEADLINE, rpc(open.connection.pki())).await.unwrap_or_else(|_| Err(late())) {
            Ok(reply) => Ok(self.answered(reply.into_inner())),
            Err(status) if is_answer(&status) => Err(Failed::Answered(self.answered(status))),
            Err(status) => {
                self.leave(&open).await;
                let cut = self.0.cut.fetch_add(1, Ordering::Relaxed);
                Err(Failed::Broken { is_cut: cut >= MOST_CUT && status.code() != Code::DeadlineExceeded, status })
            }
        }
    }

    fn answered<T>(&self, answer: T) -> T {
        self.0.cut.store(0, Ordering::Relaxed);
        answer
    }

    /// The connection there is, or a new one, to any server that proves to be the PKI.
    pub(crate) async fn open(&self, caller: &Caller<'_>) -> Result<Open, RenewError> {
        let held = caller.held;
        let ended_before = self.0.ended.load(Ordering::Relaxed);
        let mut slot = self.0.slot.lock().await;
        if let Some(open) = slot.open.as_ref().filter(|open| open.made_with.fits(held)) {
            return Ok(Open { is_old: true, ..open.clone() });
        }
        let ended = self.0.ended.load(Ordering::Relaxed);
        // Whether a certificate is believed depends on the time that the caller knows, too.
        if let Some((with, failed)) = &slot.failed
            && ended > ended_before
            && with.fits(held)
            && !failed.is_distrusted
        {
            return Err(failed.clone().into());
        }
        let tls = verified_tls(&held.bundle, Some(&held.host), caller.pki_time, caller.clock)?;
        let avoided = slot.left.as_ref().filter(|(_, at)| at.elapsed() < AVOIDED).map(|(address, _)| address.as_str());
        let connected = connect_anywhere(&held.pki, avoided, &tls).await;
        let made_with = MadeWith::of(held);
        let number = self.0.ended.fetch_add(1, Ordering::Relaxed);
        match connected {
            Ok(connection) => {
                let open = Open { connection, made_with, number, is_old: false };
                (slot.open, slot.failed) = (Some(open.clone()), None);
                Ok(open)
            }
            Err(failed) => {
                (slot.open, slot.failed) = (None, Some((made_with, failed.clone())));
                Err(failed.into())
            }
        }
    }

    /// Nobody is given this connection any more; those who use it still may.
    pub(crate) async fn leave(&self, open: &Open) {
        let mut slot = self.0.slot.lock().await;
        slot.left = Some((open.connection.address.clone(), Instant::now()));
        if slot.open.as_ref().is_some_and(|current| current.number == open.number) {
            slot.open = None;
        }
    }
}

/// Of a server with much to do the answer is waited for, for its place in the queue is worth more than a new connection.
async fn call_while_alive<T>(
    connection: &Connection,
    patience: Duration,
    rpc: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    let mut asked = pin!(timeout(RPC_DEADLINE, rpc));
    let answer = match timeout(patience, &mut asked).await {
        Ok(answer) => answer,
        Err(_) => tokio::select! {
            answer = &mut asked => answer,
            lives = timeout(PROOF_OF_LIFE.min(patience), connection.lives()) => match lives {
                Ok(true) => asked.await,
                _ => return Err(Status::deadline_exceeded("no answer yet, and no sign of life from the server")),
            },
        },
    };
    answer.unwrap_or_else(|_| Err(late())).map(Response::into_inner)
}

/// Said by the PKI. What a broken connection ends in has a cause, and a code that depends on how tonic was built.
fn is_answer(status: &Status) -> bool {
    status.source().is_none() && !matches!(status.code(), Code::Unknown | Code::Cancelled | Code::DeadlineExceeded)
}
