//! An enrolled host whose certificate has ended comes back: it proves to hold the key that it enrolled.

use std::time::{Duration, SystemTime};

use aws_lc_rs::hmac;
use meshd_identity::TrustDomain;
use meshd_identity::signed::VerifyingKey;
use meshd_identity::statements::attestation_message;
use meshd_pki_api::v1;

use crate::adoption::check_time;
use crate::audit::Event;
use crate::csr::Request;
use crate::enrol::{check_standing, excerpt, host_identity};
use crate::issue::offset_ms;
use crate::pki::Pki;
use crate::refused::Refused;
use crate::store::View;
use crate::store::hosts::{self, Host, NextKey, Sighting};
use crate::times::{rfc3339, unix, unix_ms};

/// A round trip, a slow one.
const NONCE_LIFE: Duration = Duration::from_secs(60);
const TIME_BYTES: usize = 8;

/// Nonces without memory: the time, and a code over it and the host that only this PKI can make. Used twice within a
/// minute one gives the same host another certificate over the same key, which is worth nothing to anybody else.
pub(crate) struct Nonces(hmac::Key);

impl Nonces {
    pub(crate) fn new(secret: &[u8]) -> Nonces {
        Nonces(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    fn make(&self, host: &str, now: SystemTime) -> Vec<u8> {
        let time = unix_ms(now).to_be_bytes();
        let code = hmac::sign(&self.0, &[&time, host.as_bytes()].concat());
        [&time, code.as_ref()].concat()
    }

    pub(crate) fn check(&self, host: &str, nonce: &[u8], now: SystemTime) -> bool {
        let Some((time, code)) = nonce.split_first_chunk::<TIME_BYTES>() else {
            return false;
        };
        let age = unix_ms(now).checked_sub(u64::from_be_bytes(*time));
        let is_young = age.is_some_and(|age| Duration::from_millis(age) <= NONCE_LIFE);
        is_young && hmac::verify(&self.0, &[&time[..], host.as_bytes()].concat(), code).is_ok()
    }
}

impl Pki {
    /// Anybody may ask: a nonce is worth nothing without the key.
    pub fn challenge(&self, request: &v1::ChallengeRequest) -> Result<v1::ChallengeReply, Refused> {
        host_identity(&self.trust_domain, &request.host_id)?;
        Ok(v1::ChallengeReply { nonce: self.nonces.make(&request.host_id, self.now()) })
    }

    pub fn attest(&self, request: &v1::AttestRequest, remote: &str) -> Result<v1::EnrollReply, Refused> {
        let result = self.attest_by_key(request, remote);
        if let Err(refused) = &result {
            self.record_refusal(Event {
                event: "attest",
                result: "refused",
                host: Some(excerpt(&request.host_id)),
                remote: Some(remote.to_owned()),
                detail: Some(refused.to_string()),
                ..Event::default()
            });
        }
        result
    }

    fn attest_by_key(&self, request: &v1::AttestRequest, remote: &str) -> Result<v1::EnrollReply, Refused> {
        self.refuse_while_frozen()?;
        let now = self.now();
        let id = host_identity(&self.trust_domain, &request.host_id)?;
        if !self.nonces.check(&request.host_id, &request.nonce, now) {
            let text = "the nonce is not from this PKI or older than a minute; ask for another";
            return Err(Refused::Unauthenticated(text.to_owned()));
        }
        // Without a lock at first: strangers may knock as often as they like.
        self.state.database.read_latest(|view| prove(view, request, &self.trust_domain, unix(now)))?;
        let csr = Request::read(&request.csr).map_err(Refused::Invalid)?;
        let signer = self.signer();
        let (svid, event) = self.state.database.transaction(|records| -> Result<_, Refused> {
            let (mut host, used) = prove(records, request, &self.trust_domain, unix(now))?;
            Pki::refuse_denied_identity(records, &id)?;
            let is_adopted = host.adopted_until.take().is_some();
            let (svid, issued) = signer.issue(&id, &csr.public_key, self.lifetimes.leaf, now)?;
            host.used_key(&used);
            host.next = Some(NextKey { key_id: csr.key_id.to_vec(), public_key: csr.spki.clone() });
            host.saw(&Sighting {
                now: unix(now),
                acked_sequence: request.bundle_sequence,
                clock_offset_ms: offset_ms(request.host_time_unix_ms, unix_ms(now)),
                roots_in_use: None,
            });
            hosts::put_host(records, &host)?;
            let event = Event {
                event: "attest",
                result: "ok",
                host: Some(host.id.clone()),
                identity: Some(id.to_string()),
                serial: Some(issued.serial.clone()),
                authority: Some(issued.authority.clone()),
                not_after: Some(rfc3339(issued.not_after)),
                remote: Some(remote.to_owned()),
                detail: is_adopted.then(|| "adopted from the PKI before".to_owned()),
                ..Event::default()
            };
            hosts::note_issued(records, &host.id, vec![issued], unix(now))?;
            Ok((svid, event))
        })?;
        _ = self.record(&[event]);
        self.enrolled(request.host_id.clone(), svid, &signer)
    }
}

/// The host, and the key that it proved to hold.
fn prove(
    view: &mut dyn View,
    request: &v1::AttestRequest,
    domain: &TrustDomain,
    now: i64,
) -> Result<(Host, Vec<u8>), Refused> {
    let known = hosts::host(view, &request.host_id)?;
    let host = known.ok_or_else(|| not_enrolled(&request.host_id))?;
    // First, for an evicted host has no key left to prove: it is told why.
    check_standing(&host)?;
    check_time(&host, now)?;
    let used = proven_key(&host, request, domain)?;
    Ok((host, used))
}

fn not_enrolled(host: &str) -> Refused {
    let host = excerpt(host);
    Refused::Unauthenticated(format!(
        "host `{host}` is not enrolled here; make a token with `meshd-pki token create --host {host}` and run `meshd join`"
    ))
}

/// The key, by its SHA-256, to know the host by: the current one, or the one that was issued last and never seen since.
fn proven_key(host: &Host, request: &v1::AttestRequest, domain: &TrustDomain) -> Result<Vec<u8>, Refused> {
    let message = attestation_message(domain, &request.host_id, &request.nonce, &request.csr);
    let signed_with =
        |spki: &[u8]| VerifyingKey::from_spki(spki).is_some_and(|key| key.verify(&message, &request.signature));
    // A snapshot has the enrolled key; it is not the current one, which stays what the host is known by meanwhile.
    if signed_with(&host.public_key) || signed_with(&host.enrolled_key) {
        return Ok(host.key_current.clone());
    }
    match &host.next {
        Some(next) if signed_with(&next.public_key) => Ok(next.key_id.clone()),
        _ => Err(Refused::Unauthenticated(format!(
            "host `{0}` did not sign with the key it has enrolled; if it was installed anew, make a token with \
             `meshd-pki token create --host {0}` and run `meshd join`",
            host.id
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_good_for_a_minute_for_one_host_from_one_pki() {
        let (nonces, other) = (Nonces::new(b"one"), Nonces::new(b"other"));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let nonce = nonces.make("web", now);
        assert!(nonces.check("web", &nonce, now) && nonces.check("web", &nonce, now + NONCE_LIFE));
        assert!(!nonces.check("web", &nonce, now + NONCE_LIFE + Duration::from_millis(1)));
        assert!(!nonces.check("web", &nonce, now - Duration::from_millis(1)));
        assert!(!nonces.check("api", &nonce, now));
        assert!(!other.check("web", &nonce, now));
        assert!(!nonces.check("web", &nonce[..7], now) && !nonces.check("web", &[], now));
    }
}
