//! First contact: a join token becomes a host.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use meshd_identity::{SpiffeId, TrustDomain, sha256};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;

use crate::audit::Event;
use crate::csr::Request;
use crate::issue::offset_ms;
use crate::pki::{Pki, trust_bundle};
use crate::refused::Refused;
use crate::signer::Signer;
use crate::store::hosts::{self, Host, HostState};
use crate::store::tokens::{self, Token, Use};
use crate::store::{DbError, Records, View, settings};
use crate::times::{rfc3339, unix, unix_ms};

impl Pki {
    pub fn enrol(&self, request: &v1::EnrollRequest, remote: &str) -> Result<v1::EnrollReply, Refused> {
        let Some(Attestation::JoinToken(proof)) = &request.attestation else {
            let text = "this PKI enrols hosts by join token only; make one with `meshd-pki token create --host ID`";
            return Err(Refused::Invalid(text.to_owned()));
        };
        let result = self.enrol_by_token(proof, request, remote);
        if let Err(refused) = &result {
            self.record_refusal(Event {
                event: "enrol",
                result: "refused",
                host: Some(excerpt(&request.host_id)).filter(|host| !host.is_empty()),
                token: Some(excerpt(&proof.id)),
                remote: Some(remote.to_owned()),
                detail: Some(refused.to_string()),
                ..Event::default()
            });
        }
        result
    }

    fn enrol_by_token(
        &self,
        proof: &v1::JoinTokenProof,
        request: &v1::EnrollRequest,
        remote: &str,
    ) -> Result<v1::EnrollReply, Refused> {
        self.refuse_while_frozen()?;
        let csr = Request::read(&request.csr).map_err(Refused::Invalid)?;
        let now = self.now();
        let signer = self.signer();
        let (host_id, svid) = self.state.database.transaction(|records| -> Result<_, Refused> {
            let token = check_token(records, proof, &request.host_id, &csr, unix(now))?;
            let id = host_identity(&self.trust_domain, &token.host_id)?;
            let (svid, issued) = signer.issue(&id, &csr.public_key, self.lifetimes.leaf, now)?;
            let (token_id, host_id) = (token.id.clone(), token.host_id.clone());
            admit(records, token, &csr, unix(now), offset_ms(request.host_time_unix_ms, unix_ms(now)))?;
            let event = Event {
                event: "enrol",
                result: "ok",
                host: Some(host_id.clone()),
                identity: Some(id.to_string()),
                serial: Some(issued.serial.clone()),
                authority: Some(issued.authority.clone()),
                not_after: Some(rfc3339(issued.not_after)),
                token: Some(token_id),
                remote: Some(remote.to_owned()),
                detail: None,
            };
            hosts::note_issued(records, &host_id, vec![issued], unix(now))?;
            // Nobody new comes in without a trace: the line is on disk before the host exists.
            self.record(&[event]).map_err(|_| {
                let text = "the PKI cannot write its audit log and enrols nobody until it can; see its disk and log";
                Refused::Unavailable(text.to_owned())
            })?;
            Ok((host_id, svid))
        })?;
        self.enrolled(host_id, svid, &signer)
    }

    /// What a host gets that has proved who it is.
    pub(crate) fn enrolled(
        &self,
        host_id: String,
        svid: v1::Svid,
        signer: &Signer,
    ) -> Result<v1::EnrollReply, Refused> {
        self.metrics.issued.inc();
        Ok(v1::EnrollReply {
            host_id,
            svid: Some(svid),
            bundle: Some(trust_bundle(signer)),
            server_time_unix_ms: self.now_ms(),
            recovery_keys: self.state.database.read(settings::recovery_keys)?,
            pki_addresses: self.advertise.clone(),
        })
    }
}

/// The token as it may be used now, by this key, for this host.
fn check_token(
    view: &mut dyn View,
    proof: &v1::JoinTokenProof,
    asked_host: &str,
    csr: &Request,
    now: i64,
) -> Result<Token, Refused> {
    let token = tokens::token(view, &proof.id)?;
    let secret_hash = sha256(&proof.secret);
    // One answer for an unknown id and a wrong secret: ids are not secret, but nothing is gained by telling.
    let known = token.filter(|token| verify_slices_are_equal(&token.secret_hash, &secret_hash).is_ok());
    let Some(token) = known else {
        let text = "the join token is not known to this PKI; make a new one with `meshd-pki token create --host ID`";
        return Err(Refused::Unauthenticated(text.to_owned()));
    };
    let host = &token.host_id;
    if token.expires_at <= now {
        let (id, ended) = (&token.id, rfc3339(token.expires_at));
        return Err(Refused::Forbidden(format!(
            "join token {id} for host `{host}` expired at {ended}; run `meshd-pki token create --host {host}`"
        )));
    }
    if !asked_host.is_empty() && asked_host != host {
        let asked = excerpt(asked_host);
        return Err(Refused::Forbidden(format!(
            "the host claims to be `{asked}`, the PKI permits this token `{host}`; join without a host id, or run \
             `meshd-pki token create --host {asked}`"
        )));
    }
    if let Some(used) = token.used.as_ref().filter(|used| used.key_id != csr.key_id) {
        let (id, used) = (&token.id, rfc3339(used.at));
        return Err(Refused::Forbidden(format!(
            "join token {id} was already used at {used} by another key, and serves only once; if that was not you, \
             somebody else enrolled as `{host}`: find out first, then run `meshd-pki token create --host {host}`"
        )));
    }
    if hosts::host(view, host)?.is_some_and(|known| known.state == HostState::Banned) {
        return Err(Refused::Forbidden(banned(host)));
    }
    Ok(token)
}

pub(crate) fn banned(host: &str) -> String {
    format!("host `{host}` is banned from this mesh")
}

fn admit(
    records: &mut dyn Records,
    mut token: Token,
    csr: &Request,
    now: i64,
    clock_offset_ms: i64,
) -> Result<(), DbError> {
    token.used.get_or_insert_with(|| Use { key_id: csr.key_id.to_vec(), at: now });
    tokens::put_token(records, &token)?;
    // A host that is known and enrols again has a new key; what it did before is not its own any more.
    let host = Host {
        id: token.host_id,
        state: HostState::Active,
        key_current: csr.key_id.to_vec(),
        public_key: csr.spki.clone(),
        enrolled_key: csr.spki.clone(),
        next: None,
        enrolled_at: now,
        last_seen: now,
        acked_sequence: 0,
        clock_offset_ms,
        roots_in_use: Vec::new(),
    };
    hosts::put_host(records, &host)?;
    for identity in &token.allow {
        hosts::permit(records, &host.id, identity, now)?;
    }
    Ok(())
}

pub(crate) fn host_identity(domain: &TrustDomain, host: &str) -> Result<SpiffeId, Refused> {
    SpiffeId::host(domain, host).map_err(|error| Refused::Invalid(error.to_string()))
}

/// Text from a peer, short and printable.
pub(crate) fn excerpt(text: &str) -> String {
    text.chars().take(100).flat_map(char::escape_debug).collect()
}
