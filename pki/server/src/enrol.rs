//! First contact: a join token becomes a host.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use meshd_identity::{SpiffeId, TrustDomain, sha256};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;
use rusqlite::Connection;

use crate::audit::Event;
use crate::csr::Request;
use crate::db::authorities::{self, IssuedRow};
use crate::db::tokens::{self, TokenRow};
use crate::db::{DbError, hosts};
use crate::pki::Pki;
use crate::refused::Refused;
use crate::state_dir::StateDir;
use crate::times::{rfc3339, unix};

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
        let csr = Request::read(&request.csr).map_err(Refused::Invalid)?;
        let now = self.now();
        let signer = self.signer();
        let mut state = self.state();
        let StateDir { database, audit, .. } = &mut *state;
        let (host_id, svid) = database.transaction(|transaction| -> Result<_, Refused> {
            let token = check_token(transaction, proof, &request.host_id, &csr, unix(now))?;
            let id = host_identity(&self.trust_domain, &token.host_id)?;
            let leaf = signer.intermediate.issue(&id, &csr.public_key, self.lifetimes.leaf, now)?;
            admit(transaction, &token, &csr, unix(now))?;
            let row = IssuedRow {
                serial: &leaf.serial,
                spiffe_id: id.as_str(),
                host_id: &token.host_id,
                authority: &signer.intermediate.id,
                issued_at: unix(now),
                not_after: unix(leaf.not_after),
            };
            authorities::insert_issued(transaction, &row)?;
            let event = Event {
                event: "enrol",
                result: "ok",
                host: Some(token.host_id.clone()),
                identity: Some(id.to_string()),
                serial: Some(leaf.serial.clone()),
                authority: Some(signer.intermediate.id.clone()),
                not_after: Some(rfc3339(unix(leaf.not_after))),
                token: Some(token.id),
                remote: Some(remote.to_owned()),
                detail: None,
            };
            // Nobody new comes in without a trace: the line is on disk before the host exists.
            self.record(audit, &[event]).map_err(|_| {
                let text = "the PKI cannot write its audit log and enrols nobody until it can; see its disk and log";
                Refused::Unavailable(text.to_owned())
            })?;
            let chain = vec![leaf.certificate, signer.intermediate.certificate.clone()];
            Ok((token.host_id, v1::Svid { spiffe_id: id.to_string(), chain }))
        })?;
        let recovery_keys = authorities::recovery_keys(database.reader())?;
        drop(state);
        self.metrics.issued.inc();
        Ok(v1::EnrollReply {
            host_id,
            svid: Some(svid),
            bundle: Some(self.trust_bundle()),
            server_time_unix_ms: self.now_ms(),
            recovery_keys,
            pki_addresses: self.advertise.clone(),
        })
    }
}

/// The token as it may be used now, by this key, for this host.
fn check_token(
    connection: &Connection,
    proof: &v1::JoinTokenProof,
    asked_host: &str,
    csr: &Request,
    now: i64,
) -> Result<TokenRow, Refused> {
    let token = tokens::get(connection, &proof.id)?;
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
    if token.used_key.as_ref().is_some_and(|key| *key != csr.key_id) {
        let (id, used) = (&token.id, rfc3339(token.used_at.unwrap_or_default()));
        return Err(Refused::Forbidden(format!(
            "join token {id} was already used at {used} by another key, and serves only once; if that was not you, \
             somebody else enrolled as `{host}`: find out first, then run `meshd-pki token create --host {host}`"
        )));
    }
    refuse_if_banned(connection, host)?;
    Ok(token)
}

fn refuse_if_banned(connection: &Connection, host: &str) -> Result<(), Refused> {
    match hosts::get(connection, host)? {
        Some(row) if row.state != "active" => Err(Refused::Forbidden(format!("host `{host}` is {}", row.state))),
        _ => Ok(()),
    }
}

fn admit(connection: &Connection, token: &TokenRow, csr: &Request, now: i64) -> Result<(), DbError> {
    tokens::bind(connection, &token.id, &csr.key_id, now)?;
    hosts::enrol(connection, &token.host_id, &csr.key_id, now)?;
    for identity in token.allow.split_whitespace() {
        hosts::permit(connection, &token.host_id, identity, now)?;
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
