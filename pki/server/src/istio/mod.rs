//! The API by which proxies of Istio get their certificates (`istio.v1.auth.IstioCertificateService`), so that a ztunnel
//! uses this PKI as it would istiod. Off unless --attestors has `[istio]`.

mod decide;
pub(crate) mod grants;
mod service;

use std::time::Duration;

use meshd_identity::inspect_svid;
use meshd_pki_api::istio::{IstioCertificateRequest, IstioCertificateResponse, Kind};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;

pub(crate) use self::service::IstioService;
use crate::audit::Event;
use crate::csr::Request;
use crate::enrol::excerpt;
use crate::pki::Pki;
use crate::refused::Refused;
use crate::signer::Signer;
use crate::store::hosts::Issued;
use crate::store::{deny, istio};
use crate::times::{rfc3339, unix};
use decide::Caller;
use grants::Grants;

const IMPERSONATED: &str = "ImpersonatedIdentity";

/// What a caller shows of itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    /// The token, without `Bearer`.
    pub(crate) token: Option<String>,
    /// The leaf that TLS verified.
    pub(crate) certificate: Option<Vec<u8>>,
}

/// Signed, and for whom.
struct Given {
    caller: Caller,
    reply: IstioCertificateResponse,
    issued: Issued,
}

impl Pki {
    pub(crate) fn create_certificate(
        &self,
        shown: &Shown,
        request: &IstioCertificateRequest,
        remote: &str,
    ) -> Result<IstioCertificateResponse, Refused> {
        let event = Event { event: "istio_issue", remote: Some(remote.to_owned()), ..Event::default() };
        let Given { caller, reply, issued } = match self.give(shown, request) {
            Ok(given) => given,
            Err(refused) => {
                let asked = impersonated(request);
                self.record_refusal(Event {
                    result: "refused",
                    identity: Some(excerpt(asked)).filter(|asked| !asked.is_empty()),
                    detail: Some(refused.to_string()),
                    ..event
                });
                return Err(refused);
            }
        };
        let now = unix(self.now());
        let noted =
            self.state.database.transaction(|records| istio::note(records, &caller.holder(), issued.clone(), now));
        if let Err(error) = noted {
            // As for hosts: what is valid is worth more than the record of it.
            self.metrics.note_failures.inc();
            tracing::error!(%error, identity = issued.spiffe_id, "a certificate was issued but is not on record");
        }
        self.metrics.issued.inc();
        _ = self.record(&[Event {
            result: "ok",
            identity: Some(issued.spiffe_id),
            serial: Some(issued.serial),
            authority: Some(issued.authority),
            not_after: Some(rfc3339(issued.not_after)),
            detail: Some(format!("by {caller}")),
            ..event
        }]);
        Ok(reply)
    }

    fn give(&self, shown: &Shown, request: &IstioCertificateRequest) -> Result<Given, Refused> {
        let off = "this PKI has nothing for proxies of Istio; see [istio] in its file --attestors";
        let grants = self.attestors.istio().ok_or_else(|| Refused::NotFound(off.to_owned()))?;
        self.refuse_while_frozen()?;
        let caller = self.istio_caller(&grants, shown)?;
        let id = decide::identity(&grants, &self.trust_domain, &caller, impersonated(request))?;
        let its_own = caller.identity(&self.trust_domain)?;
        if let Some(message) = self.denied(id.as_str()).or_else(|| self.denied(its_own.as_str())) {
            return Err(Refused::Forbidden(message));
        }
        let csr = read_csr(&request.csr)?;
        let signer = self.signer();
        let (svid, issued) = signer.issue(&id, &csr.public_key, self.life(request.validity_duration), self.now())?;
        let reply = IstioCertificateResponse { cert_chain: as_istiod_answers(&svid.chain, &signer) };
        Ok(Given { caller, reply, issued })
    }

    /// A token counts before a certificate, as proxies have it that start with both.
    fn istio_caller(&self, grants: &Grants, shown: &Shown) -> Result<Caller, Refused> {
        if let Some(token) = &shown.token {
            return Ok(Caller::Pod(self.attestors.pod(grants, token, self.now())?));
        }
        let unknown = |text: String| Err(Refused::Unauthenticated(text));
        let Some(certificate) = &shown.certificate else {
            return unknown(format!("show a Kubernetes token for `{}` as bearer", grants.audience));
        };
        if !grants.renew_by_certificate {
            return unknown("certificates do not count here ([istio] renew_by_certificate); show a token".to_owned());
        }
        let info = inspect_svid(certificate).map_err(|error| Refused::Unauthenticated(error.to_string()))?;
        // The connection may be older than its end or a denial.
        if info.not_after <= self.now() {
            return unknown(format!("the certificate of {} ended at {}", info.id, rfc3339(unix(info.not_after))));
        }
        if self.state.database.read_latest(deny::deny)?.names(info.id.as_str(), &info.serial) {
            return unknown(format!("the certificate of {} is denied in this mesh", info.id));
        }
        Ok(Caller::Certificate(info.id))
    }

    fn life(&self, asked_s: i64) -> Duration {
        match u64::try_from(asked_s) {
            Ok(asked @ 1..) => self.lifetimes.leaf.min(Duration::from_secs(asked)),
            _ => self.lifetimes.leaf,
        }
    }
}

fn impersonated(request: &IstioCertificateRequest) -> &str {
    let fields = request.metadata.as_ref().map(|metadata| &metadata.fields);
    match fields.and_then(|fields| fields.get(IMPERSONATED)?.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text,
        _ => "",
    }
}

fn read_csr(pem: &str) -> Result<Request, Refused> {
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes());
    let der = der.map_err(|error| Refused::Invalid(format!("the certificate request is not PEM: {error}")))?;
    Request::read(&der).map_err(Refused::Invalid)
}

/// One certificate in each element, and in the last all roots: ztunnel believes what is there, and only that. So a new
/// root is believed before it signs anything.
fn as_istiod_answers(chain: &[Vec<u8>], signer: &Signer) -> Vec<String> {
    let roots: String = signer.bundle.roots.iter().map(|root| pem(root)).collect();
    chain.iter().map(|one| pem(one)).chain([roots]).collect()
}

fn pem(der: &[u8]) -> String {
    let text = data_encoding::BASE64.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}
