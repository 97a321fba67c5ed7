//! Tokens of the PKI this host has joined.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::jwt::verify_svid;
use meshd_identity::{SpiffeId, TrustDomain, jwks_of_jwt_keys};
use meshd_pki_client::{Credentials, TokenIssueError, Tokens};
use tokio::sync::watch;

use super::jwt::{IssueError, Issued, JwtSource, Verified};

pub struct PkiTokens {
    credentials: watch::Receiver<Arc<Credentials>>,
    tokens: Arc<Tokens>,
}

impl PkiTokens {
    pub fn new(credentials: watch::Receiver<Arc<Credentials>>) -> PkiTokens {
        let tokens = Arc::new(Tokens::new(credentials.clone()));
        PkiTokens { credentials, tokens }
    }
}

impl JwtSource for PkiTokens {
    fn issue(&self, identity: SpiffeId, audience: Vec<String>) -> Issued {
        let tokens = self.tokens.clone();
        Box::pin(async move {
            tokens.issue(&identity, &audience).await.map_err(|error| match error {
                TokenIssueError::Refused(words) => IssueError::Refused(words),
                TokenIssueError::Invalid(words) => IssueError::Invalid(words),
                away @ TokenIssueError::Away { .. } => IssueError::Away(away.to_string()),
            })
        })
    }

    fn keys(&self) -> BTreeMap<TrustDomain, Vec<u8>> {
        let held = self.credentials.borrow();
        BTreeMap::from([(held.trust_domain.clone(), jwks_of_jwt_keys(&held.bundle.jwt_keys))])
    }

    fn verify(&self, token: &str, audience: &str) -> Result<Verified, String> {
        let held = self.credentials.borrow().clone();
        let keys_of = |domain: &TrustDomain| (*domain == held.trust_domain).then_some(&held.bundle.jwt_keys[..]);
        let svid = verify_svid(token, audience, keys_of, SystemTime::now()).map_err(|error| error.to_string())?;
        Ok(Verified { spiffe_id: svid.spiffe_id, claims: svid.claims })
    }
}
