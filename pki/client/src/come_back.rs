//! A host that was away, for as long as it may be: from the bundle it holds to the one in force, then back in by the
//! key it enrolled with. No token, and nobody who helps.

use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::SpiffeId;
use meshd_identity::signed;
use meshd_identity::statements::{BundleStatement, attestation_message};
use meshd_pki_api::v1;
use tonic::Code;

use crate::connect::{PkiClient, call, connect, unverified_tls, verified_tls};
use crate::error::RenewError;
use crate::inventory::is_rooted;
use crate::key::NewKey;
use crate::recovery::leads_to;
use crate::refusal_text;
use crate::reply::{newer_bundle, problem, read_svid};
use crate::state::{State, from_unix_ms, unix_ms};
use crate::surroundings::Clock;
use crate::transitions::{follow, named};

/// A statement that names a bundle, then the steps from there, then nothing more to do; and as much again.
const MOST_ROUNDS: usize = 6;

/// What comes back, and when.
pub(crate) struct Absent<'a> {
    pub(crate) state: &'a State,
    /// The certificate is not known to the PKI, whatever it looks like here.
    pub(crate) is_unknown: bool,
    pub(crate) now: SystemTime,
    pub(crate) clock: &'a Clock,
}

/// How far signatures lead, and what on the way was not believed.
struct CaughtUp {
    state: State,
    doubts: Vec<String>,
}

impl Absent<'_> {
    /// Tries each server; the first that proves to be this host's PKI decides.
    pub(crate) async fn come_back(&self) -> Result<State, RenewError> {
        let mut addresses = self.state.credentials.pki.clone();
        fastrand::shuffle(&mut addresses);
        let mut reasons = Vec::new();
        for address in addresses {
            match self.come_back_at(&address).await {
                Ok(state) => return Ok(state),
                Err(error) => reasons.push(format!("{address}: {error}")),
            }
        }
        Err(RenewError::Unreachable(reasons.join("; ")))
    }

    async fn come_back_at(&self, address: &str) -> Result<State, RenewError> {
        // Whoever answers: nothing secret is sent, and only what is signed is believed.
        let mut anybody = connect(address, unverified_tls()?).await?;
        let CaughtUp { mut state, doubts } = self.catch_up(&mut anybody).await?;
        let held = &state.credentials;
        let needs_certificate =
            self.is_unknown || held.host.not_after <= self.now || !is_rooted(&held.host, &held.bundle);
        let tls = verified_tls(&held.bundle, None, state.pki_time, self.clock)?;
        let mut pki = connect(address, tls).await.map_err(|connect| match doubts.is_empty() {
            true => RenewError::Connect(connect),
            false => RenewError::NoWay { connect, doubts: doubts.join("; ") },
        })?;
        if needs_certificate {
            self.attest(&mut pki, &mut state).await?;
        }
        Ok(state)
    }

    async fn catch_up(&self, pki: &mut PkiClient) -> Result<CaughtUp, RenewError> {
        let mut state = self.state.clone();
        let mut doubts = Vec::new();
        for _ in 0..MOST_ROUNDS {
            let held = &state.credentials.bundle;
            let request = v1::TransitionsRequest { sequence: held.sequence };
            let reply = call(pki.transitions(request)).await.map_err(|status| refused(&status))?;
            if let Some(statement) = self.hear(&mut state, &reply.recovery, &mut doubts) {
                let offered = fetch_named(pki, &statement).await?;
                state.credentials.bundle = named(&state.credentials.bundle, &statement, &offered)?;
                tracing::warn!(sequence = statement.sequence, "a recovery key names the bundle to trust from now on");
            } else if reply.steps.is_empty() {
                let newest = reply.bundle.map_or(0, |bundle| bundle.sequence);
                if newest > state.credentials.bundle.sequence {
                    let held = state.credentials.bundle.sequence;
                    doubts.push(format!("there is no signed way from bundle {held} held here to bundle {newest}"));
                }
                return Ok(CaughtUp { state, doubts });
            } else {
                state.credentials.bundle = follow(&state.credentials.bundle, reply.steps)?;
            }
        }
        Err(problem("its steps from bundle to bundle do not end").into())
    }

    /// Takes over recovery statements, oldest first, up to one that leads to another bundle.
    fn hear(&self, state: &mut State, statements: &[String], doubts: &mut Vec<String>) -> Option<BundleStatement> {
        let domain = state.credentials.trust_domain.clone();
        doubts.clear();
        for jws in statements {
            let heard = state.recovery.read(jws, &domain).and_then(|statement| {
                let Some(statement) = statement else { return Ok(None) };
                state.recovery.hear(jws, &statement)?;
                Ok(leads_to(&statement, &state.credentials.bundle, unix_ms(self.now)).cloned())
            });
            match heard {
                Ok(Some(bundle)) => return Some(bundle),
                Ok(None) => {}
                // Perhaps signed with a key that was succeeded long ago; the others are still to be heard.
                Err(error) => doubts.push(error.to_string()),
            }
        }
        None
    }

    async fn attest(&self, pki: &mut PkiClient, state: &mut State) -> Result<(), RenewError> {
        let held = state.credentials.host.key.secret_der().to_vec();
        let mut last = None;
        // The enrolled key outlives every snapshot; a PKI that does not know it knows the one used last.
        for key in state.enrolled_key.clone().into_iter().chain([held]) {
            match self.attest_with(&key, pki, state).await {
                Err(RenewError::Unknown(text)) => _ = last.get_or_insert(RenewError::Unknown(text)),
                other => return other,
            }
        }
        Err(last.expect("one key was tried"))
    }

    async fn attest_with(&self, key: &[u8], pki: &mut PkiClient, state: &mut State) -> Result<(), RenewError> {
        let held = &mut state.credentials;
        let challenge = v1::ChallengeRequest { host_id: held.host_id.clone() };
        let nonce = call(pki.challenge(challenge)).await.map_err(|status| refused(&status))?.nonce;
        let new = NewKey::generate()?;
        let csr = new.request()?;
        let message = attestation_message(&held.trust_domain, &held.host_id, &nonce, &csr);
        let request = v1::AttestRequest {
            host_id: held.host_id.clone(),
            signature: signed::sign_bytes(key, &message)?,
            nonce,
            csr,
            host_time_unix_ms: unix_ms((self.clock)()),
            bundle_sequence: held.bundle.sequence,
        };
        let reply = call(pki.attest(request)).await.map_err(|status| refused(&status))?;
        let expected = SpiffeId::host(&held.trust_domain, &held.host_id).map_err(|error| problem(error.to_string()))?;
        let pki_time = from_unix_ms(reply.server_time_unix_ms);
        held.bundle = newer_bundle(reply.bundle, &held.bundle)?;
        let svid = reply.svid.unwrap_or_default();
        held.host = Arc::new(read_svid(svid, &expected, &new, &held.bundle, pki_time)?);
        if !reply.pki_addresses.is_empty() {
            held.pki = reply.pki_addresses;
        }
        state.pki_time = pki_time;
        tracing::info!(host = %state.credentials.host_id, "back in the mesh by the enrolled key");
        Ok(())
    }
}

/// The document of a bundle, from somebody who need not be trusted: whoever asks knows its digest.
async fn fetch_named(pki: &mut PkiClient, statement: &BundleStatement) -> Result<v1::TrustBundle, RenewError> {
    let digest = data_encoding::HEXLOWER.decode(statement.sha256.as_bytes());
    let sha256 = digest.map_err(|_| problem("a recovery statement names a bundle by a digest that is none"))?;
    let reply = call(pki.bundle(v1::BundleRequest { sha256 })).await.map_err(|status| refused(&status))?;
    Ok(reply.bundle.unwrap_or_default())
}

pub(crate) fn refused(status: &tonic::Status) -> RenewError {
    match status.code() {
        // `Unknown` is what a connection ends in whose client certificate the server did not accept.
        Code::Unauthenticated | Code::Unknown => RenewError::Unknown(refusal_text(status)),
        _ => RenewError::Refused(refusal_text(status)),
    }
}
