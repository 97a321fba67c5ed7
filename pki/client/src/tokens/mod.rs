//! JWT-SVIDs of this host's workloads: asked of the PKI, kept while they are good.

mod cache;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use meshd_identity::SpiffeId;
use meshd_pki_api::v1;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::connect::{PkiClient, call, connect_anywhere, verified_tls};
use crate::error::RenewError;
use crate::state::from_unix_ms;
use crate::{Clock, Credentials, Svid, refusal_text};
use cache::{Cache, Found};

/// After the PKI could not be reached, everybody else is told so at once for this long.
const PAUSE: Duration = Duration::from_secs(5);
/// Whoever still has a valid token does not wait longer for a newer one.
const SHORT_WAIT: Duration = Duration::from_secs(2);

/// Where a host gets tokens.
pub struct Tokens {
    credentials: watch::Receiver<Arc<Credentials>>,
    clock: Clock,
    cache: Mutex<Cache>,
    /// One question at a time: who waits finds the answer in the cache more often than not.
    line: AsyncMutex<Line>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenIssueError {
    /// The PKI does not permit this host the identity.
    #[error("{0}")]
    Refused(String),
    /// The question makes no sense to the PKI.
    #[error("{0}")]
    Invalid(String),
    #[error("no token of {identity} can be had now: {reason}; those handed out before are good until they end")]
    Away { identity: SpiffeId, reason: String },
}

#[derive(Default)]
struct Line {
    open: Option<Open>,
    /// When the PKI could last not be reached, and why.
    failed: Option<(Instant, String)>,
}

/// A connection, and the certificate it was made with: the PKI judges that at every message.
struct Open {
    host: Arc<Svid>,
    pki: PkiClient,
}

impl Tokens {
    pub fn new(credentials: watch::Receiver<Arc<Credentials>>) -> Tokens {
        let clock: Clock = Arc::new(SystemTime::now);
        Tokens { credentials, clock, cache: Mutex::default(), line: AsyncMutex::default() }
    }

    /// A token of `identity` for `audience`, in JWS compact form.
    pub async fn issue(
        self: &Arc<Tokens>,
        identity: &SpiffeId,
        audience: &[String],
    ) -> Result<String, TokenIssueError> {
        if self.credentials.borrow().banned {
            self.cache().forget(identity);
            return Err(TokenIssueError::Refused(self.credentials.borrow().why_banned()));
        }
        let audience: BTreeSet<String> = audience.iter().cloned().collect();
        let found = self.cache().find(identity, &audience, (self.clock)());
        if let Found::Fresh(token) = found {
            return Ok(token);
        }
        let (tokens, id) = (self.clone(), identity.clone());
        // A task: whoever gives up waiting does not cut short what others wait for, too.
        let asking = tokio::spawn(async move { tokens.ask(&id, audience).await });
        let broken = |error: tokio::task::JoinError| Err(away(identity, error.to_string()));
        match found {
            Found::Stale(token) => match timeout(SHORT_WAIT, asking).await {
                Ok(Ok(Err(TokenIssueError::Away { .. }))) | Err(_) => Ok(token),
                Ok(answer) => answer.unwrap_or_else(broken),
            },
            _ => asking.await.unwrap_or_else(broken),
        }
    }

    async fn ask(&self, identity: &SpiffeId, audience: BTreeSet<String>) -> Result<String, TokenIssueError> {
        let mut line = self.line.lock().await;
        if let Found::Fresh(token) = self.cache().find(identity, &audience, (self.clock)()) {
            return Ok(token);
        }
        if let Some((at, reason)) = &line.failed
            && at.elapsed() < PAUSE
        {
            return Err(away(identity, reason.clone()));
        }
        let request = v1::IssueJwtRequest {
            spiffe_id: identity.to_string(),
            audience: audience.iter().cloned().collect(),
            ttl_s: 0,
        };
        let held = self.credentials.borrow().clone();
        let asked = line.ask(&held, request, &self.clock).await;
        line.failed = None;
        match asked {
            Ok(reply) => {
                let not_after = from_unix_ms(u64::try_from(reply.not_after_unix).unwrap_or(0).saturating_mul(1000));
                let (token, now) = (reply.token, (self.clock)());
                self.cache().keep(identity, audience, token.clone(), now, not_after);
                Ok(token)
            }
            Err(Failed::Answered(status)) if status.code() == Code::PermissionDenied => {
                self.cache().forget(identity);
                Err(TokenIssueError::Refused(refusal_text(&status)))
            }
            Err(Failed::Answered(status)) if status.code() == Code::InvalidArgument => {
                Err(TokenIssueError::Invalid(refusal_text(&status)))
            }
            Err(failed) => {
                let reason = failed.to_string();
                line.failed = Some((Instant::now(), reason.clone()));
                Err(away(identity, reason))
            }
        }
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn away(identity: &SpiffeId, reason: String) -> TokenIssueError {
    TokenIssueError::Away { identity: identity.clone(), reason }
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Unreachable(#[from] RenewError),
    #[error("the PKI refused: {}", refusal_text(.0))]
    Answered(Status),
}

impl Line {
    async fn ask(
        &mut self,
        held: &Credentials,
        request: v1::IssueJwtRequest,
        clock: &Clock,
    ) -> Result<v1::IssueJwtReply, Failed> {
        if let Some(open) = self.open.as_mut().filter(|open| Arc::ptr_eq(&open.host, &held.host)) {
            match call(open.pki.issue_jwt(request.clone())).await {
                Ok(reply) => return Ok(reply),
                // An answer, whatever it is, needs no other connection; anything else may be about this one.
                Err(status) if is_answer(&status) => return Err(Failed::Answered(status)),
                Err(_) => self.open = None,
            }
        }
        let tls = verified_tls(&held.bundle, Some(&held.host), held.host.issued_at, clock).map_err(RenewError::from)?;
        let mut pki = connect_anywhere(&held.pki, &tls).await?;
        let reply = call(pki.issue_jwt(request)).await.map_err(Failed::Answered)?;
        self.open = Some(Open { host: held.host.clone(), pki });
        Ok(reply)
    }
}

fn is_answer(status: &Status) -> bool {
    matches!(status.code(), Code::PermissionDenied | Code::InvalidArgument | Code::Unauthenticated)
}
