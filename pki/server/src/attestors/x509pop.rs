//! Machines that hold a certificate of an authority the operator has named, and prove that they hold its key.

use std::sync::Arc;
use std::time::SystemTime;

use meshd_identity::TrustDomain;
use meshd_identity::statements::machine_message;
use meshd_pki_api::v1;
use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::config::{Becomes, X509pop};
use super::{Attested, remote_is_allowed};
use crate::refused::Refused;

/// Leaf, two intermediates and a cross-signed one.
const MOST_CERTIFICATES: usize = 4;
const MOST_BYTES: usize = 16 * 1024;
pub(super) const NAMES: [&str; 4] = ["cn", "dns", "serial", "fingerprint"];

pub(super) struct Authority {
    pub(super) name: String,
    becomes: Becomes,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Authority {
    pub(super) fn read(
        config: &X509pop,
        pem: &[u8],
        domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Authority, String> {
        let file = config.ca_file.display();
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| format!("{file}: {error}"))?;
            // What verifies chains does not look whether a root has ended.
            if is_in_force(&certificate, now) {
                roots.add(certificate).map_err(|error| format!("{file}: {error}"))?;
            }
        }
        if roots.is_empty() {
            return Err(format!("{file}: no certificate that is valid now; give the authority's in PEM"));
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        Ok(Authority {
            name: config.name.clone(),
            becomes: config.becomes(domain, &NAMES)?,
            verifier: verifier.map_err(|error| format!("{file}: {error}"))?,
        })
    }

    fn verifies(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), rustls::Error> {
        let (leaf, rest) = chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        self.verifier.verify_client_cert(leaf, rest, now).map(drop)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn is_in_force(certificate: &CertificateDer<'_>, now: SystemTime) -> bool {
    let now = crate::times::unix(now);
    X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| {
        (parsed.validity().not_before.timestamp()..=parsed.validity().not_after.timestamp()).contains(&now)
    })
}

/// The nonce was checked: it is for this leaf.
pub(super) fn attest(
    authorities: &[Arc<Authority>],
    proof: &v1::MachineCertificateProof,
    csr: &[u8],
    domain: &TrustDomain,
    remote: &str,
    now: SystemTime,
) -> Result<Attested, Refused> {
    check_size(proof)?;
    let chain: Vec<CertificateDer<'_>> = proof.chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut reasons = Vec::new();
    let mut found = None;
    for authority in authorities {
        match authority.verifies(&chain, UnixTime::since_unix_epoch(since)) {
            Ok(()) => {
                found = Some(authority);
                break;
            }
            Err(error) => reasons.push(format!("{}: {error}", authority.name)),
        }
    }
    let Some(authority) = found else {
        let reasons = if reasons.is_empty() { "none is configured".to_owned() } else { reasons.join("; ") };
        return Err(Refused::Unauthenticated(format!(
            "the machine certificate verifies with no [[x509pop]] of this PKI ({reasons}); see --attestors"
        )));
    };
    let invalid = |error: x509_parser::nom::Err<x509_parser::error::X509Error>| Refused::Invalid(error.to_string());
    let (_, leaf) = X509Certificate::from_der(&proof.chain[0]).map_err(invalid)?;
    let message = machine_message(domain, &proof.nonce, csr);
    if !is_signed(&leaf, proof, &message) {
        let text = "the machine does not hold the key of the certificate it shows; check which key `--x509pop` names";
        return Err(Refused::Unauthenticated(text.to_owned()));
    }
    let way = format!("x509pop:{}", authority.name);
    remote_is_allowed(&way, &authority.becomes.from, remote)?;
    let host_id = authority.becomes.host.fill(|name| value(&leaf, &proof.chain[0], name));
    let host_id =
        host_id.map_err(|why| Refused::Forbidden(format!("the machine certificate cannot be a host: {why}")))?;
    Ok(Attested::new(way, host_id, &authority.becomes))
}

fn check_size(proof: &v1::MachineCertificateProof) -> Result<(), Refused> {
    let (count, bytes) = (proof.chain.len(), proof.chain.iter().map(Vec::len).sum::<usize>());
    if !(1..=MOST_CERTIFICATES).contains(&count) || bytes > MOST_BYTES {
        return Err(Refused::Invalid(format!(
            "{count} certificates with {bytes} bytes; 1 to {MOST_CERTIFICATES} with {MOST_BYTES} bytes are allowed, leaf \
             first, without the root"
        )));
    }
    Ok(())
}

fn is_signed(leaf: &X509Certificate<'_>, proof: &v1::MachineCertificateProof, message: &[u8]) -> bool {
    let algorithms = provider().signature_verification_algorithms.mapping;
    let of_scheme = algorithms.iter().find(|(scheme, _)| u32::from(u16::from(*scheme)) == proof.scheme);
    let key = &leaf.public_key().subject_public_key.data;
    of_scheme.is_some_and(|(_, algorithms)| {
        algorithms.iter().any(|one| one.verify_signature(key, message, &proof.signature).is_ok())
    })
}

fn value(leaf: &X509Certificate<'_>, der: &[u8], name: &str) -> Option<String> {
    match name {
        "cn" => leaf.subject().iter_common_name().next()?.as_str().ok().map(str::to_owned),
        "dns" => leaf.subject_alternative_name().ok()??.value.general_names.iter().find_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        }),
        "serial" => Some(data_encoding::HEXLOWER.encode(leaf.raw_serial())),
        _ => Some(meshd_identity::statements::machine_challenge(der)),
    }
}
