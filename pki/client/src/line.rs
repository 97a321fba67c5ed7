//! The one connection a host keeps to its PKI. Its conversation, its renewals and its tokens go over it together, so
//! that none of them costs a handshake of its own.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::{Code, Response, Status};

use crate::connect::{PkiClient, Unusable, call, connect_anywhere, verified_tls};
use crate::error::RenewError;
use crate::surroundings::Clock;
use crate::{Credentials, Svid, refusal_text};

/// Clones share it.
#[derive(Clone, Default)]
pub struct Line(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Locked while somebody connects: whoever comes meanwhile shares what comes of it.
    slot: Mutex<Slot>,
    /// Attempts to connect that have ended.
    ended: AtomicU64,
}

#[derive(Default)]
struct Slot {
    open: Option<Open>,
    failed: Option<(MadeWith, Unusable)>,
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
    bundle_sequence: u64,
}

impl MadeWith {
    fn is(&self, other: &MadeWith) -> bool {
        Arc::ptr_eq(&self.host, &other.host) && self.bundle_sequence == other.bundle_sequence
    }
}

#[derive(Clone)]
pub(crate) struct Open {
    pub(crate) pki: PkiClient,
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
}

impl Line {
    /// One call. A connection that was there already and brings no answer within `patience` is left for a new one, for
    /// its server may be gone without a word.
    pub(crate) async fn ask<T, F>(
        &self,
        caller: &Caller<'_>,
        patience: Duration,
        rpc: impl Fn(PkiClient) -> F,
    ) -> Result<T, Failed>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let open = self.open(caller).await?;
        if open.is_old {
            match timeout(patience, rpc(open.pki.clone())).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) if is_answer(&status) => return Err(Failed::Answered(status)),
                _ => self.leave(&open).await,
            }
            return self.ask_once(self.open(caller).await?, rpc).await;
        }
        self.ask_once(open, rpc).await
    }

    async fn ask_once<T, F>(&self, open: Open, rpc: impl Fn(PkiClient) -> F) -> Result<T, Failed>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        match call(rpc(open.pki.clone())).await {
            Ok(reply) => Ok(reply),
            Err(status) => {
                if !is_answer(&status) {
                    self.leave(&open).await;
                }
                Err(Failed::Answered(status))
            }
        }
    }

    /// The connection there is, or a new one, to any server that proves to be the PKI.
    pub(crate) async fn open(&self, caller: &Caller<'_>) -> Result<Open, RenewError> {
        let held = caller.held;
        let made_with = MadeWith { host: held.host.clone(), bundle_sequence: held.bundle.sequence };
        let ended_before = self.0.ended.load(Ordering::Relaxed);
        let mut slot = self.0.slot.lock().await;
        if let Some(open) = slot.open.as_ref().filter(|open| open.made_with.is(&made_with)) {
            return Ok(Open { is_old: true, ..open.clone() });
        }
        let ended = self.0.ended.load(Ordering::Relaxed);
        if let Some((with, failed)) = &slot.failed
            && ended > ended_before
            && with.is(&made_with)
        {
            return Err(failed.clone().into());
        }
        let tls = verified_tls(&held.bundle, Some(&held.host), caller.pki_time, caller.clock)?;
        let connected = connect_anywhere(&held.pki, &tls).await;
        let number = self.0.ended.fetch_add(1, Ordering::Relaxed);
        match connected {
            Ok(pki) => {
                let open = Open { pki, made_with, number, is_old: false };
                *slot = Slot { open: Some(open.clone()), failed: None };
                Ok(open)
            }
            Err(failed) => {
                *slot = Slot { open: None, failed: Some((made_with, failed.clone())) };
                Err(failed.into())
            }
        }
    }

    /// Nobody is given this connection any more; those who use it still may.
    pub(crate) async fn leave(&self, open: &Open) {
        let mut slot = self.0.slot.lock().await;
        if slot.open.as_ref().is_some_and(|current| current.number == open.number) {
            slot.open = None;
        }
    }
}

/// An answer, whatever it is, needs no other connection; anything else may be about this one.
pub(crate) fn is_answer(status: &Status) -> bool {
    use Code::{InvalidArgument, NotFound, PermissionDenied, Unauthenticated};
    matches!(status.code(), Unauthenticated | PermissionDenied | InvalidArgument | NotFound)
}
