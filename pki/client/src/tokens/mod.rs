//! JWT-SVIDs of this host's workloads: asked of the PKI, kept while they are good.

mod cache;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use meshd_identity::SpiffeId;
use meshd_pki_api::v1;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::timeout;
use tonic::Code;

use crate::connect::PkiClient;
use crate::line::{Caller, Failed, Line};
use crate::schedule::patience;
use crate::state::from_unix_ms;
use crate::{Clock, Credentials, refusal_text};
use cache::{Cache, Found};

/// After the PKI could not be reached, everybody else is told so at once for this long.
const PAUSE: Duration = Duration::from_secs(5);
/// Whoever still has a valid token does not wait longer for a newer one.
const SHORT_WAIT: Duration = Duration::from_secs(2);

/// Where a host gets tokens.
pub struct Tokens {
    credentials: watch::Receiver<Arc<Credentials>>,
    clock: Clock,
    line: Line,
    cache: Mutex<Cache>,
    /// One question at a time: who waits finds the answer in the cache more often than not. When the PKI could last not
    /// be reached, and why.
    away: AsyncMutex<Option<(Instant, String)>>,
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

impl Tokens {
    /// `line` is the agent's, whose credentials these are.
    pub fn new(credentials: watch::Receiver<Arc<Credentials>>, line: Line) -> Tokens {
        let clock: Clock = Arc::new(SystemTime::now);
        Tokens { credentials, clock, line, cache: Mutex::default(), away: AsyncMutex::default() }
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
        let mut failed_before = self.away.lock().await;
        if let Found::Fresh(token) = self.cache().find(identity, &audience, (self.clock)()) {
            return Ok(token);
        }
        if let Some((at, reason)) = &*failed_before
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
        let caller = Caller { held: &held, pki_time: held.host.issued_at, clock: &self.clock };
        let rpc = |mut pki: PkiClient| {
            let request = request.clone();
            async move { pki.issue_jwt(request).await }
        };
        let asked = self.line.ask(&caller, patience(None), rpc).await;
        *failed_before = None;
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
                *failed_before = Some((Instant::now(), reason.clone()));
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
