//! First contact: whoever proves to be invited becomes a host.

use std::collections::BTreeMap;

use meshd_identity::{SpiffeId, TrustDomain};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;

use crate::attestors::Attested;
use crate::audit::Event;
use crate::csr::Request;
use crate::issue::offset_ms;
use crate::join_token;
use crate::pki::{Pki, trust_bundle};
use crate::refused::Refused;
use crate::signer::Signer;
use crate::store::hosts::{self, Host, HostState};
use crate::store::{DbError, Records, settings};
use crate::times::{rfc3339, unix, unix_ms};

impl Pki {
    pub fn enrol(&self, request: &v1::EnrollRequest, remote: &str) -> Result<v1::EnrollReply, Refused> {
        let result = self.enrol_by_proof(request, remote);
        if let Err(refused) = &result {
            self.record_refusal(Event {
                event: "enrol",
                result: "refused",
                host: Some(excerpt(&request.host_id)).filter(|host| !host.is_empty()),
                token: token_id(request).map(excerpt),
                remote: Some(remote.to_owned()),
                detail: Some(refused.to_string()),
                ..Event::default()
            });
        }
        result
    }

    fn enrol_by_proof(&self, request: &v1::EnrollRequest, remote: &str) -> Result<v1::EnrollReply, Refused> {
        self.refuse_while_frozen()?;
        let csr = Request::read(&request.csr).map_err(Refused::Invalid)?;
        let now = self.now();
        let signer = self.signer();
        let proof = self.proof(request, remote)?;
        let (host_id, svid) = self.state.database.transaction(|records| -> Result<_, Refused> {
            let invited = match &proof {
                Proof::Token(proof) => join_token::invite(records, proof, request, &csr, remote, unix(now))?,
                Proof::Attested(attested) => attested.invite(records, &request.host_id)?,
            };
            if hosts::host(records, &invited.host_id)?.is_some_and(|known| known.state == HostState::Banned) {
                return Err(Refused::Forbidden(banned(&invited.host_id)));
            }
            let id = host_identity(&self.trust_domain, &invited.host_id)?;
            Pki::refuse_denied_identity(records, &id)?;
            let (svid, issued) = signer.issue(&id, &csr.public_key, self.lifetimes.leaf, now)?;
            let host_id = invited.host_id.clone();
            admit(records, invited, &csr, unix(now), offset_ms(request.host_time_unix_ms, unix_ms(now)))?;
            let event = Event {
                event: "enrol",
                result: "ok",
                host: Some(host_id.clone()),
                identity: Some(id.to_string()),
                serial: Some(issued.serial.clone()),
                authority: Some(issued.authority.clone()),
                not_after: Some(rfc3339(issued.not_after)),
                token: token_id(request).map(str::to_owned),
                remote: Some(remote.to_owned()),
                detail: match &proof {
                    Proof::Token(_) => None,
                    Proof::Attested(attested) => Some(format!("by {}", attested.way)),
                },
                ..Event::default()
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
            pki_addresses: self.addresses(),
        })
    }
}

pub(crate) fn banned(host: &str) -> String {
    format!("host `{host}` is banned from this mesh")
}

/// An enrolled host that may have something.
pub(crate) fn check_standing(host: &Host) -> Result<(), Refused> {
    match host.state {
        HostState::Active => Ok(()),
        HostState::Banned => Err(Refused::Forbidden(banned(&host.id))),
        HostState::Evicted => Err(Refused::Unauthenticated(format!(
            "host `{0}` was evicted; make a token with `meshd-pki token create --host {0}` and run `meshd join`",
            host.id
        ))),
    }
}

/// What a request proves, as far as that can be said without the records.
enum Proof<'a> {
    Token(&'a v1::JoinTokenProof),
    Attested(Attested),
}

impl Pki {
    fn proof<'a>(&self, request: &'a v1::EnrollRequest, remote: &str) -> Result<Proof<'a>, Refused> {
        match &request.attestation {
            Some(Attestation::JoinToken(proof)) => Ok(Proof::Token(proof)),
            Some(Attestation::MachineCertificate(proof)) => {
                self.attest_machine(proof, &request.csr, remote).map(Proof::Attested)
            }
            Some(Attestation::KubernetesToken(proof)) => self.attest_pod(proof, remote).map(Proof::Attested),
            None => {
                let text = "the request proves nothing this PKI knows; join by a token (`meshd-pki token create --host \
                            ID`), a machine certificate or a Kubernetes token";
                Err(Refused::Invalid(text.to_owned()))
            }
        }
    }
}

fn token_id(request: &v1::EnrollRequest) -> Option<&str> {
    match &request.attestation {
        Some(Attestation::JoinToken(proof)) => Some(&proof.id),
        _ => None,
    }
}

/// Who may come in now, and as what.
#[derive(Debug, Clone, Default)]
pub(crate) struct Invited {
    pub(crate) host_id: String,
    /// SPIFFE IDs it may hold.
    pub(crate) allow: Vec<String>,
    pub(crate) labels: BTreeMap<String, String>,
    /// Empty for a join token.
    pub(crate) enrolled_by: String,
}

fn admit(
    records: &mut dyn Records,
    invited: Invited,
    csr: &Request,
    now: i64,
    clock_offset_ms: i64,
) -> Result<(), DbError> {
    // What may be out there of it is, whoever it is now.
    let unrecorded_until = hosts::host(records, &invited.host_id)?.and_then(|known| known.unrecorded_until);
    // A host that is known and enrols again has a new key; what it did before is not its own any more.
    let host = Host {
        id: invited.host_id,
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
        labels: invited.labels,
        enrolled_by: invited.enrolled_by,
        adopted_until: None,
        unrecorded_until,
    };
    hosts::put_host(records, &host)?;
    for identity in &invited.allow {
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
