//! Certificates for an enrolled host and its workloads.

use meshd_identity::{SpiffeId, inspect_svid, sha256};
use meshd_pki_api::{MAX_BATCH, v1};
use rusqlite::Connection;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::audit::Event;
use crate::csr::Request;
use crate::db::authorities::{self, IssuedRow};
use crate::db::hosts::{self, HostRow, Sighting};
use crate::enrol::excerpt;
use crate::pki::Pki;
use crate::refused::Refused;
use crate::signer::Signer;
use crate::state_dir::StateDir;
use crate::times::{rfc3339, unix, unix_ms};

/// How many permitted identities a refusal lists.
const LISTED: usize = 10;

/// The host that sent a message, as its certificate and our records have it.
struct Caller {
    host: HostRow,
    id: SpiffeId,
    key_id: [u8; 32],
}

/// One item decided.
struct Decided {
    result: v1::IssueResult,
    event: Event,
}

impl Pki {
    /// `certificate` is the leaf that TLS verified. Certificate and host are judged anew for each message: the
    /// connection may be older than the certificate's end or a ban.
    pub fn issue_batch(
        &self,
        certificate: Option<&[u8]>,
        request: &v1::IssueBatchRequest,
        remote: &str,
    ) -> Result<v1::IssueBatchReply, Refused> {
        let result = self.issue_for_caller(certificate, request, remote);
        if let Err(refused) = &result {
            let identity = certificate.and_then(|der| inspect_svid(der).ok()).map(|info| info.id.to_string());
            self.record_refusal(Event {
                event: "issue",
                result: "refused",
                identity,
                remote: Some(remote.to_owned()),
                detail: Some(refused.to_string()),
                ..Event::default()
            });
        }
        result
    }

    fn issue_for_caller(
        &self,
        certificate: Option<&[u8]>,
        request: &v1::IssueBatchRequest,
        remote: &str,
    ) -> Result<v1::IssueBatchReply, Refused> {
        if request.items.len() > MAX_BATCH {
            let count = request.items.len();
            return Err(Refused::Invalid(format!("{count} certificates asked for at once; {MAX_BATCH} are allowed")));
        }
        let now = self.now();
        let signer = self.signer();
        let mut state = self.state();
        let StateDir { database, audit, .. } = &mut *state;
        let decided = database.transaction(|transaction| -> Result<_, Refused> {
            let caller = self.caller(transaction, certificate)?;
            note_caller(transaction, &caller, request, unix_ms(now))?;
            let permitted = hosts::permitted(transaction, &caller.host.id)?;
            let decide = |item| self.decide(transaction, &signer, &caller, &permitted, item, remote);
            request.items.iter().map(decide).collect::<Result<Vec<Decided>, Refused>>()
        })?;
        // Renewals go on when the audit disk is full: the alarm is raised, the fleet keeps working.
        let (results, events): (Vec<_>, Vec<_>) = decided.into_iter().map(|one| (one.result, one.event)).unzip();
        _ = self.record(audit, &events);
        drop(state);
        Ok(v1::IssueBatchReply {
            results,
            bundle: Some(self.trust_bundle()),
            server_time_unix_ms: self.now_ms(),
            pki_addresses: self.advertise.clone(),
        })
    }

    fn caller(&self, connection: &Connection, certificate: Option<&[u8]>) -> Result<Caller, Refused> {
        let unknown = |text: String| Err(Refused::Unauthenticated(text));
        let Some(certificate) = certificate else {
            return unknown("a host certificate is needed for this call; run `meshd join` first".to_owned());
        };
        let info = inspect_svid(certificate).map_err(|error| Refused::Unauthenticated(error.to_string()))?;
        if info.id.trust_domain() != &self.trust_domain || !info.id.is_system() {
            let (id, domain) = (info.id, &self.trust_domain);
            return unknown(format!("the certificate is for {id}; a host of `{domain}` is needed, use the host's own"));
        }
        if info.not_after <= self.now() {
            let (id, ended) = (info.id, rfc3339(unix(info.not_after)));
            return unknown(format!("the certificate of {id} ended at {ended}; run `meshd join` with a new token"));
        }
        let name = info.id.name();
        let Some(host) = hosts::get(connection, name)? else {
            return unknown(format!("host `{name}` is not enrolled here; run `meshd-pki token create --host {name}`"));
        };
        if host.state != "active" {
            return Err(Refused::Forbidden(format!("host `{name}` is {}", host.state)));
        }
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| Refused::Unauthenticated(format!("unreadable certificate: {error}")))?;
        Ok(Caller { host, id: info.id, key_id: sha256(parsed.public_key().raw) })
    }

    fn decide(
        &self,
        connection: &Connection,
        signer: &Signer,
        caller: &Caller,
        permitted: &[String],
        item: &v1::IssueItem,
        remote: &str,
    ) -> Result<Decided, Refused> {
        let event = Event {
            event: "issue",
            result: "ok",
            host: Some(caller.host.id.clone()),
            identity: Some(excerpt(&item.spiffe_id)),
            remote: Some(remote.to_owned()),
            ..Event::default()
        };
        let (id, csr) = match check_item(caller, permitted, item) {
            Ok(checked) => checked,
            Err((code, message)) => {
                self.metrics.items_refused.inc();
                let refusal = v1::Refusal { code: code.into(), message: message.clone() };
                let outcome = Some(v1::issue_result::Outcome::Refusal(refusal));
                let result = v1::IssueResult { spiffe_id: item.spiffe_id.clone(), outcome };
                return Ok(Decided { result, event: Event { result: "refused", detail: Some(message), ..event } });
            }
        };
        let now = self.now();
        let leaf = signer.intermediate.issue(&id, &csr.public_key, self.lifetimes.leaf, now)?;
        let row = IssuedRow {
            serial: &leaf.serial,
            spiffe_id: id.as_str(),
            host_id: &caller.host.id,
            authority: &signer.intermediate.id,
            issued_at: unix(now),
            not_after: unix(leaf.not_after),
        };
        authorities::insert_issued(connection, &row)?;
        if id == caller.id {
            hosts::set_next_key(connection, &caller.host.id, &csr.key_id)?;
        }
        self.metrics.issued.inc();
        let event = Event {
            serial: Some(leaf.serial),
            authority: Some(signer.intermediate.id.clone()),
            not_after: Some(rfc3339(unix(leaf.not_after))),
            ..event
        };
        let chain = vec![leaf.certificate, signer.intermediate.certificate.clone()];
        let svid = v1::Svid { spiffe_id: id.to_string(), chain };
        let outcome = Some(v1::issue_result::Outcome::Svid(svid));
        Ok(Decided { result: v1::IssueResult { spiffe_id: item.spiffe_id.clone(), outcome }, event })
    }
}

/// Notes what the host told, and that it holds the key it connected with.
fn note_caller(
    connection: &Connection,
    caller: &Caller,
    request: &v1::IssueBatchRequest,
    now_ms: u64,
) -> Result<(), Refused> {
    let host_ms = i64::try_from(request.host_time_unix_ms).unwrap_or(i64::MAX);
    let pki_ms = i64::try_from(now_ms).unwrap_or(i64::MAX);
    let sighting = Sighting {
        host_id: &caller.host.id,
        now: pki_ms / 1000,
        acked_sequence: request.bundle_sequence,
        clock_offset_ms: host_ms.saturating_sub(pki_ms),
    };
    hosts::seen(connection, &sighting)?;
    if caller.host.key_next.as_deref() == Some(caller.key_id.as_slice()) {
        hosts::promote_next_key(connection, &caller.host.id)?;
    }
    Ok(())
}

type ItemRefusal = (v1::refusal::Code, String);

/// An item that may be signed: the host itself, or an identity the PKI permits it.
fn check_item(caller: &Caller, permitted: &[String], item: &v1::IssueItem) -> Result<(SpiffeId, Request), ItemRefusal> {
    let invalid = |text: String| (v1::refusal::Code::Invalid, text);
    let id: SpiffeId = item.spiffe_id.parse().map_err(|error: meshd_identity::IdError| invalid(error.to_string()))?;
    if id != caller.id && !permitted.iter().any(|allowed| allowed == id.as_str()) {
        return Err((v1::refusal::Code::NotPermitted, not_permitted(caller, &id, permitted)));
    }
    let csr = Request::read(&item.csr).map_err(invalid)?;
    Ok((id, csr))
}

fn not_permitted(caller: &Caller, id: &SpiffeId, permitted: &[String]) -> String {
    let host = &caller.host.id;
    let domain = caller.id.trust_domain();
    if id.trust_domain() != domain {
        return format!("host `{host}` claims {id}, this PKI serves the trust domain `{domain}` only");
    }
    let short = id.short();
    if id.is_system() {
        return format!(
            "host `{host}` claims {short}, the PKI permits no host an identity of meshd-system but its own"
        );
    }
    let mut listed: Vec<&str> = permitted.iter().take(LISTED).map(|allowed| shorten(allowed)).collect();
    if permitted.len() > LISTED {
        listed.push("...");
    }
    let listed = if listed.is_empty() { "none".to_owned() } else { listed.join(", ") };
    format!(
        "host `{host}` claims {short}, the PKI permits it: {listed}; run `meshd-pki entry add --host {host} {short}` \
         on the PKI, or enrol it with `meshd-pki token create --host {host} --allow {short}`"
    )
}

/// `ns/a/sa/b` of a full SPIFFE ID.
pub(crate) fn shorten(spiffe_id: &str) -> &str {
    spiffe_id.find("/ns/").map_or(spiffe_id, |start| &spiffe_id[start + 1..])
}
