//! Whether an intermediate from outside can be used.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_identity::{SpiffeId, TrustDomain, digest_id, root_id};
use rcgen::KeyPair;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;

use crate::authority::Authority;
use crate::lifetimes::Lifetimes;
use crate::times::{from_unix, rfc3339, seconds, unix};

/// An intermediate has to have this many replacement intervals left: the time to notice, which the warning about its end
/// does not begin with, and to bring the next.
const INTERVALS_LEFT: u32 = 3;
const SMALLEST_RSA_BITS: usize = 2048;

/// Why it cannot be used. What is in force stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    #[error("{0}")]
    Unreadable(String),
    #[error("{0} certificates were given; two are needed: the intermediate, then the root that signed it")]
    Count(usize),
    #[error("the {which} {problem}")]
    Authority { which: &'static str, problem: String },
    #[error("the intermediate ends at {end}; at least {needed_s} s have to be left")]
    Ending { end: String, needed_s: u64 },
    #[error("the key does not belong to the intermediate")]
    Key,
    #[error("what it signs does not verify under the root: {0}")]
    Trial(String),
}

/// An intermediate and its root that work.
#[derive(Debug)]
pub(crate) struct Checked {
    pub(crate) root: Part,
    pub(crate) intermediate: Part,
    /// PKCS#8
    pub(crate) key: Vec<u8>,
    pub(crate) key_id: String,
}

#[derive(Debug)]
pub(crate) struct Part {
    /// Of a root what hosts call it. Of an intermediate one of its own for each certificate and each root it came with,
    /// for it may have the key of another.
    pub(crate) id: String,
    pub(crate) certificate: Vec<u8>,
    pub(crate) not_after: i64,
}

/// The certificates of a chain file, and further roots of another.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<Vec<u8>>, Unusable> {
    let found: Result<Vec<CertificateDer<'_>>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| Unusable::Unreadable(format!("the chain is not PEM: {error}")))?;
    Ok(found.into_iter().map(|certificate| certificate.to_vec()).collect())
}

/// PKCS#8 from a PEM file, whatever it holds the key in.
pub(crate) fn private_key(pem: &[u8]) -> Result<Vec<u8>, Unusable> {
    let unreadable = |text: String| Unusable::Unreadable(text);
    let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| unreadable(format!("the key is not PEM: {error}")))?;
    let key = KeyPair::try_from(&key).map_err(|error| unreadable(format!("the key cannot be used: {error}")))?;
    Ok(key.serialize_der())
}

/// What a request and its answer have in common.
pub(crate) fn id_of_key(spki: &[u8]) -> String {
    digest_id(spki)
}

pub(crate) fn check(
    chain: &[Vec<u8>],
    key: &[u8],
    domain: &TrustDomain,
    lifetimes: &Lifetimes,
    now: SystemTime,
) -> Result<Checked, Unusable> {
    let [intermediate, root] = chain else { return Err(Unusable::Count(chain.len())) };
    // It is used at once, and verifiers whose clocks are behind have to find it valid.
    let intermediate = part("intermediate", intermediate, now, lifetimes.skew)?;
    let root = part("root", root, now, Duration::ZERO)?;
    let not_after = intermediate.not_after.min(root.not_after);
    let needed = lifetimes.intermediate_every * INTERVALS_LEFT + lifetimes.skew;
    if from_unix(not_after) < now + needed {
        return Err(Unusable::Ending { end: rfc3339(not_after), needed_s: needed.as_secs() });
    }
    let id = digest_id(&[intermediate.certificate.as_slice(), &root.certificate].concat());
    let intermediate = Part { id, not_after, ..intermediate };
    let key_id = try_it(&intermediate, &root, key, domain, lifetimes.skew, now)?;
    Ok(Checked { root, intermediate, key: key.to_vec(), key_id })
}

/// A certificate that has been valid for `settled`.
fn part(which: &'static str, der: &[u8], now: SystemTime, settled: Duration) -> Result<Part, Unusable> {
    let bad = |problem: String| Unusable::Authority { which, problem };
    let (_, parsed) = X509Certificate::from_der(der).map_err(|error| bad(format!("is not X.509: {error}")))?;
    if !parsed.is_ca() {
        return Err(bad("is not an authority (CA:TRUE is missing)".to_owned()));
    }
    let usage = parsed.key_usage().map_err(|error| bad(format!("has an unreadable keyUsage: {error}")))?;
    // A root need not restrict its key (RFC 5280 4.2.1.3 speaks of authorities that do).
    if !usage.map_or(which == "root", |usage| usage.value.key_cert_sign()) {
        return Err(bad("may not sign certificates (keyCertSign is missing)".to_owned()));
    }
    let is_constrained = parsed.name_constraints().map_err(|error| bad(error.to_string()))?.is_some();
    if is_constrained {
        return Err(bad("has name constraints, under which TLS libraries refuse SPIFFE IDs".to_owned()));
    }
    check_key(parsed.public_key().parsed()).map_err(bad)?;
    let (starts, ends) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
    match unix(now) {
        now if now >= ends => return Err(bad(format!("ended at {}", rfc3339(ends)))),
        now if now < starts => return Err(bad(format!("is not valid before {}", rfc3339(starts)))),
        now if now < starts + seconds(settled) => {
            let at = rfc3339(starts + seconds(settled));
            return Err(bad(format!(
                "is valid since a moment ago, and clocks of hosts may be behind: bring it at {at}"
            )));
        }
        _ => {}
    }
    Ok(Part { id: root_id(der), certificate: der.to_vec(), not_after: ends })
}

fn check_key<E>(key: Result<PublicKey<'_>, E>) -> Result<(), String> {
    match key {
        Ok(PublicKey::EC(point)) if [65, 97].contains(&point.data().len()) => Ok(()),
        Ok(PublicKey::RSA(rsa)) if rsa.key_size() >= SMALLEST_RSA_BITS => Ok(()),
        Ok(PublicKey::RSA(rsa)) => {
            Err(format!("has an RSA key of {} bits; {SMALLEST_RSA_BITS} are the least", rsa.key_size()))
        }
        _ => Err("has a key that is neither P-256, P-384 nor RSA".to_owned()),
    }
}

/// What a verifier will do with every leaf, done once before anybody has one. It finds a foreign key, a path length that
/// does not allow leaves, a root that did not sign. Returns what the key is called.
fn try_it(
    intermediate: &Part,
    root: &Part,
    key: &[u8],
    domain: &TrustDomain,
    skew: Duration,
    now: SystemTime,
) -> Result<String, Unusable> {
    use rcgen::PublicKeyData;
    let key =
        KeyPair::try_from(key).map_err(|error| Unusable::Unreadable(format!("the key cannot be used: {error}")))?;
    let failed = |error: String| Unusable::Trial(error);
    let (_, parsed) =
        X509Certificate::from_der(&intermediate.certificate).map_err(|error| failed(error.to_string()))?;
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err(Unusable::Key);
    }
    let key_id = id_of_key(parsed.public_key().raw);
    let (id, der, end) = (intermediate.id.clone(), intermediate.certificate.clone(), from_unix(intermediate.not_after));
    let authority = Authority::from_parts(id, der, key, end, skew).map_err(|error| failed(error.to_string()))?;
    let leaf_key = KeyPair::generate().map_err(|error| failed(error.to_string()))?;
    let leaf = authority.issue(&SpiffeId::pki(domain), &leaf_key, Duration::from_secs(60), now);
    let leaf = CertificateDer::from(leaf.map_err(|error| failed(error.to_string()))?.certificate);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(root.certificate.as_slice())).map_err(|error| failed(error.to_string()))?;
    let parsed = ParsedCertificate::try_from(&leaf).map_err(|error| failed(error.to_string()))?;
    let since = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    let above = [CertificateDer::from(intermediate.certificate.as_slice())];
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &roots,
        &above,
        since,
        provider.signature_verification_algorithms.all,
    )
    .map_err(|error| failed(error.to_string()))?;
    // An authority may be good for one side only.
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    let clients = clients.map_err(|error| failed(error.to_string()))?;
    let as_client = clients.verify_client_cert(&leaf, &above, since);
    as_client.map_err(|error| failed(format!("as a client: {error}")))?;
    Ok(key_id)
}
