//! Certificates for an enrolled host and its workloads.

use std::collections::BTreeMap;

use meshd_identity::{SpiffeId, SvidInfo, inspect_svid, sha256};
use meshd_pki_api::{MAX_BATCH, v1};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::adoption::check_time;
use crate::audit::Event;
use crate::csr::Request;
use crate::enrol::{check_standing, excerpt};
use crate::lifetimes::LEAF_BACKDATE;
use crate::pki::{Pki, trust_bundle};
use crate::refused::Refused;
use crate::signer::Signer;
use crate::store::grants::{self, Terms};
use crate::store::hosts::{self, Host, HostState, Issued, NextKey, Sighting};
use crate::store::{DbError, View};
use crate::times::{rfc3339, unix, unix_ms};

/// How many permitted identities a refusal lists.
const LISTED: usize = 10;

/// The host that sent a message, as its certificate and our records have it.
pub(crate) struct Caller {
    pub(crate) host: Host,
    pub(crate) id: SpiffeId,
    pub(crate) certificate: SvidInfo,
    pub(crate) key_id: [u8; 32],
}

/// One item decided.
struct Decided {
    result: v1::IssueResult,
    event: Event,
    issued: Option<Issued>,
    /// Of the host itself, when it was given a new certificate.
    next_key: Option<NextKey>,
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
        self.record_outcome("issue", certificate, &result, remote);
        result
    }

    /// Writes that a caller was refused, if it was.
    pub(crate) fn record_outcome<T>(
        &self,
        event: &'static str,
        certificate: Option<&[u8]>,
        result: &Result<T, Refused>,
        remote: &str,
    ) {
        let Err(refused) = result else { return };
        let identity = certificate.and_then(|der| inspect_svid(der).ok()).map(|info| info.id.to_string());
        self.record_refusal(Event {
            event,
            result: "refused",
            identity,
            remote: Some(remote.to_owned()),
            detail: Some(refused.to_string()),
            ..Event::default()
        });
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
        self.refuse_while_frozen()?;
        let now = self.now();
        let signer = self.signer();
        let (caller, granted, federation) = self.state.database.read_latest(|view| -> Result<_, Refused> {
            let caller = self.caller(view, certificate)?;
            let granted = grants::granted(view, &caller.host.id)?;
            self.wait_for_others(view, &caller, &granted)?;
            let permitted: Vec<String> = granted.keys().cloned().collect();
            let federation = self.federation_for(view, &permitted)?;
            Ok((caller, granted, federation))
        })?;
        let decide = |item| self.decide(&signer, &caller, &granted, item, remote);
        let mut decided = request.items.iter().map(decide).collect::<Result<Vec<Decided>, Refused>>()?;
        self.heard_of_bundle(&caller.host.id, request.bundle_sequence);
        match self.note(&caller, request, &mut decided, unix_ms(now)) {
            // Shut out while these were signed: they are on record nowhere, so they must not leave.
            Ok(Some(host)) => check_standing(&host)?,
            Ok(None) => {}
            // Renewals go on when disk or database refuse to write: the alarm is raised, the fleet keeps working.
            Err(error) => {
                self.metrics.note_failures.inc();
                tracing::error!(%error, host = %caller.host.id, "certificates were issued but are not on record");
            }
        }
        let (results, events): (Vec<_>, Vec<_>) = decided.into_iter().map(|one| (one.result, one.event)).unzip();
        _ = self.record(&events);
        Ok(v1::IssueBatchReply {
            results,
            bundle: Some(trust_bundle(&signer)),
            server_time_unix_ms: self.now_ms(),
            pki_addresses: self.addresses(),
            tainted_roots: signer.tainted.clone(),
            tainted_intermediates: self.tainted_intermediates(),
            federation: federation.unless_known(request.federation_revision),
        })
    }

    /// Notes what the host told, what it was given, and that it holds the key it connected with. Nothing of a host that
    /// was shut out meanwhile. Returns the host as it is now.
    fn note(
        &self,
        caller: &Caller,
        request: &v1::IssueBatchRequest,
        decided: &mut [Decided],
        now_ms: u64,
    ) -> Result<Option<Host>, DbError> {
        let now = i64::try_from(now_ms / 1000).unwrap_or(i64::MAX);
        let sighting = Sighting {
            now,
            acked_sequence: request.bundle_sequence,
            clock_offset_ms: offset_ms(request.host_time_unix_ms, now_ms),
            roots_in_use: request.inventory.as_ref().map(|inventory| inventory.roots.as_slice()),
        };
        let issued: Vec<Issued> = decided.iter_mut().filter_map(|one| one.issued.take()).collect();
        let next = decided.iter_mut().find_map(|one| one.next_key.take());
        self.state.database.transaction(|records| {
            let Some(mut host) = hosts::host(records, &caller.host.id)? else {
                return Ok(None);
            };
            if host.state != HostState::Active {
                return Ok(Some(host));
            }
            host.saw(&sighting);
            host.used_key(&caller.key_id);
            if !issued.is_empty() {
                host.adopted_until = None;
            }
            if next.is_some() {
                host.next.clone_from(&next);
            }
            hosts::put_host(records, &host)?;
            hosts::note_issued(records, &host.id, issued.clone(), now)?;
            Ok(Some(host))
        })
    }

    /// Who sent a message: a host whose certificate is valid now, that is enrolled and not banned.
    pub(crate) fn caller(&self, view: &mut dyn View, certificate: Option<&[u8]>) -> Result<Caller, Refused> {
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
        let Some(host) = hosts::host(view, name)? else {
            return unknown(format!("host `{name}` is not enrolled here; run `meshd-pki token create --host {name}`"));
        };
        check_standing(&host)?;
        check_time(&host, unix(self.now()))?;
        // Whoever stole an earlier one would else renew it for ever.
        if unix(info.not_before + LEAF_BACKDATE) < host.enrolled_at {
            return unknown(format!(
                "the certificate is from before host `{name}` joined again; use the one it was given then"
            ));
        }
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| Refused::Unauthenticated(format!("unreadable certificate: {error}")))?;
        let key_id = sha256(parsed.public_key().raw);
        Ok(Caller { host, id: info.id.clone(), certificate: info, key_id })
    }

    fn decide(
        &self,
        signer: &Signer,
        caller: &Caller,
        granted: &BTreeMap<String, Terms>,
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
        let checked = match self.denied(&item.spiffe_id) {
            Some(message) => Err((v1::refusal::Code::NotPermitted, message)),
            None => check_item(caller, granted, item, unix(self.now())),
        };
        let (id, csr) = match checked {
            Ok(checked) => checked,
            Err((code, message)) => {
                self.metrics.items_refused.inc();
                self.count_renewal(item.spiffe_id == caller.id.as_str(), "refused");
                let refusal = v1::Refusal { code: code.into(), message: message.clone() };
                let outcome = Some(v1::issue_result::Outcome::Refusal(refusal));
                let spiffe_id = item.spiffe_id.clone();
                let result = v1::IssueResult { spiffe_id, outcome, ..v1::IssueResult::default() };
                let event = Event { result: "refused", detail: Some(message), ..event };
                return Ok(Decided { result, event, issued: None, next_key: None });
            }
        };
        let now = self.now();
        let terms = granted.get(id.as_str()).cloned().unwrap_or_default();
        let life = terms.life(self.lifetimes.leaf, unix(now));
        let (svid, issued) = signer.issue_named(&id, &terms.dns_names, &csr.public_key, life, now)?;
        let is_host = id == caller.id;
        let next_key = is_host.then(|| NextKey { key_id: csr.key_id.to_vec(), public_key: csr.spki.clone() });
        self.metrics.issued.inc();
        self.count_renewal(is_host, "ok");
        let event = Event {
            serial: Some(issued.serial.clone()),
            authority: Some(issued.authority.clone()),
            not_after: Some(rfc3339(issued.not_after)),
            ..event
        };
        let outcome = Some(v1::issue_result::Outcome::Svid(svid));
        let (spiffe_id, Terms { selectors, hint, .. }) = (item.spiffe_id.clone(), terms);
        let result = v1::IssueResult { spiffe_id, outcome, selectors, hint };
        Ok(Decided { result, event, issued: Some(issued), next_key })
    }
}

/// How far the host's clock is ahead of the PKI's.
pub(crate) fn offset_ms(host_ms: u64, pki_ms: u64) -> i64 {
    let number = |milliseconds: u64| i64::try_from(milliseconds).unwrap_or(i64::MAX);
    number(host_ms).saturating_sub(number(pki_ms))
}

type ItemRefusal = (v1::refusal::Code, String);

/// An item that may be signed: the host itself, or an identity the PKI permits it.
fn check_item(
    caller: &Caller,
    granted: &BTreeMap<String, Terms>,
    item: &v1::IssueItem,
    now: i64,
) -> Result<(SpiffeId, Request), ItemRefusal> {
    let invalid = |text: String| (v1::refusal::Code::Invalid, text);
    let id = parse_id(&item.spiffe_id).map_err(invalid)?;
    if id != caller.id && !granted.contains_key(id.as_str()) {
        let permitted: Vec<String> = granted.keys().cloned().collect();
        return Err((v1::refusal::Code::NotPermitted, not_permitted(caller, &id, &permitted)));
    }
    if let Some(terms) = granted.get(id.as_str()).filter(|terms| terms.has_ended(now)) {
        return Err((v1::refusal::Code::NotPermitted, entry_ended(caller, &id, terms)));
    }
    let csr = Request::read(&item.csr).map_err(invalid)?;
    Ok((id, csr))
}

pub(crate) fn parse_id(text: &str) -> Result<SpiffeId, String> {
    text.parse().map_err(|error: meshd_identity::IdError| error.to_string())
}

pub(crate) fn entry_ended(caller: &Caller, id: &SpiffeId, terms: &Terms) -> String {
    let (host, short, end) = (&caller.host.id, id.short(), rfc3339(terms.expires_at.unwrap_or_default()));
    format!(
        "host `{host}` claims {short}, the PKI's entry for it ended at {end}; if it is still wanted, run `meshd-pki entry \
         add --host {host} {short}` with the terms of `meshd-pki entry list` and a later end"
    )
}

pub(crate) fn not_permitted(caller: &Caller, id: &SpiffeId, permitted: &[String]) -> String {
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
