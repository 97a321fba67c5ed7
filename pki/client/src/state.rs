//! What a host remembers: credentials, pinned recovery keys, the last time the PKI told. JSON in schema 1.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use data_encoding::BASE64;
use meshd_identity::{Bundle, SpiffeId, TrustDomain, inspect_svid};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::federation::{self, Federation};
use crate::recovery::Pins;
use crate::{Credentials, Svid};

#[derive(Clone)]
pub(crate) struct State {
    pub(crate) credentials: Credentials,
    pub(crate) recovery: Pins,
    /// PKCS#8 of the key this host enrolled with. Kept for good: with it the host comes back from any snapshot. `None`
    /// in states written before there was such a thing.
    pub(crate) enrolled_key: Option<Vec<u8>>,
    /// The PKI's clock in its last reply.
    pub(crate) pki_time: SystemTime,
}

#[derive(Serialize, Deserialize)]
struct Document {
    trust_domain: TrustDomain,
    host_id: String,
    bundle: String,
    recovery_keys: Vec<String>,
    #[serde(default)]
    recovery_heard_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    enrolled_key: Option<String>,
    pki: Vec<String>,
    pki_time_unix_ms: u64,
    host: SvidDocument,
    workloads: Vec<SvidDocument>,
    refused: BTreeMap<SpiffeId, String>,
    #[serde(default)]
    selectors: BTreeMap<SpiffeId, Vec<String>>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    hints: BTreeMap<SpiffeId, String>,
    #[serde(default)]
    federation: federation::Document,
}

#[derive(Serialize, Deserialize)]
struct SvidDocument {
    issued_at_unix_ms: u64,
    chain: Vec<String>,
    key: String,
}

impl State {
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let held = &self.credentials;
        let document = Document {
            trust_domain: held.trust_domain.clone(),
            host_id: held.host_id.clone(),
            bundle: String::from_utf8(held.bundle.to_jwks()).expect("JSON is text"),
            recovery_keys: self.recovery.keys.iter().map(|key| BASE64.encode(key)).collect(),
            recovery_heard_at: self.recovery.heard_at,
            enrolled_key: self.enrolled_key.as_ref().map(|key| BASE64.encode(key)),
            pki: held.pki.clone(),
            pki_time_unix_ms: unix_ms(self.pki_time),
            host: svid_document(&held.host),
            workloads: held.workloads.values().map(|svid| svid_document(svid)).collect(),
            refused: held.refused.clone(),
            selectors: held.selectors.clone(),
            hints: held.hints.clone(),
            federation: held.federation.to_document(),
        };
        serde_json::to_vec(&document).expect("strings and numbers always serialise")
    }

    pub(crate) fn from_json(json: &[u8]) -> Result<State, String> {
        let document: Document = serde_json::from_slice(json).map_err(|e| e.to_string())?;
        let bundle = Bundle::from_jwks(document.trust_domain.clone(), document.bundle.as_bytes());
        let workloads = document.workloads.iter().map(|stored| svid(stored).map(|svid| (svid.id.clone(), svid)));
        let credentials = Credentials {
            trust_domain: document.trust_domain,
            host_id: document.host_id,
            bundle: bundle.map_err(|e| e.to_string())?,
            host: svid(&document.host)?,
            workloads: workloads.collect::<Result<_, String>>()?,
            refused: document.refused,
            selectors: document.selectors,
            hints: document.hints,
            // Told by the deny set, which has a file of its own.
            banned: false,
            federation: Federation::from_document(document.federation),
            pki: document.pki,
        };
        let keys = document.recovery_keys.iter().map(|key| decode(key)).collect::<Result<_, String>>()?;
        Ok(State {
            credentials,
            recovery: Pins { keys, heard_at: document.recovery_heard_at },
            enrolled_key: document.enrolled_key.as_deref().map(decode).transpose()?,
            pki_time: from_unix_ms(document.pki_time_unix_ms),
        })
    }
}

/// Puts a chain and its key together, with the facts read from the certificates themselves.
pub(crate) fn assemble(chain: Vec<Vec<u8>>, key: Vec<u8>, issued_at: SystemTime) -> Result<Svid, String> {
    let leaf = chain.first().ok_or("the chain is empty")?;
    let info = inspect_svid(leaf).map_err(|e| e.to_string())?;
    let mut not_after = info.not_after;
    for certificate in &chain[1..] {
        not_after = not_after.min(end_of(certificate)?);
    }
    Ok(Svid {
        id: info.id,
        chain: chain.into_iter().map(CertificateDer::from).collect(),
        key: Arc::new(PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key))),
        issued_at: issued_at.clamp(info.not_before, info.not_after),
        not_before: info.not_before,
        not_after,
        serial: info.serial,
    })
}

fn end_of(certificate: &[u8]) -> Result<SystemTime, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| format!("unreadable intermediate: {e}"))?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

fn svid_document(svid: &Svid) -> SvidDocument {
    SvidDocument {
        issued_at_unix_ms: unix_ms(svid.issued_at),
        chain: svid.chain.iter().map(|certificate| BASE64.encode(certificate)).collect(),
        key: BASE64.encode(svid.key.secret_der()),
    }
}

fn svid(document: &SvidDocument) -> Result<Arc<Svid>, String> {
    let chain = document.chain.iter().map(|certificate| decode(certificate)).collect::<Result<_, String>>()?;
    assemble(chain, decode(&document.key)?, from_unix_ms(document.issued_at_unix_ms)).map(Arc::new)
}

fn decode(text: &str) -> Result<Vec<u8>, String> {
    BASE64.decode(text.as_bytes()).map_err(|e| format!("bad base64: {e}"))
}

pub(crate) fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Times from the wire are capped at the year 9999, beyond which arithmetic could overflow.
pub(crate) fn from_unix_ms(milliseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds.min(253_402_300_799_000))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fake::FakeCa;

    pub(crate) fn sample(host_id: &str) -> State {
        let domain: TrustDomain = "prod.example.org".parse().unwrap();
        let id = SpiffeId::workload(&domain, "shop", "payments").unwrap();
        let mut credentials = FakeCa::new(&domain).credentials(host_id, &[id]);
        credentials.refused.insert(SpiffeId::workload(&domain, "shop", "other").unwrap(), "not permitted".to_owned());
        let foreign = FakeCa::new("other.example".parse::<TrustDomain>().unwrap());
        credentials.federation = foreign.federated_for(&[credentials.host.id.clone()]);
        State {
            credentials,
            recovery: Pins { keys: vec![vec![1, 2, 3], vec![4]], heard_at: 5 },
            enrolled_key: Some(vec![6, 7]),
            pki_time: from_unix_ms(1_700_000_000_123),
        }
    }

    #[test]
    fn everything_survives_the_disk_form() {
        let state = sample("web");
        let read = State::from_json(&state.to_json()).unwrap();
        assert_eq!(read.to_json(), state.to_json());
        assert_eq!((&read.recovery, &read.enrolled_key), (&state.recovery, &state.enrolled_key));
        let (a, b) = (&read.credentials.host, &state.credentials.host);
        assert_eq!((a.not_after, &a.serial, a.key.secret_der()), (b.not_after, &b.serial, b.key.secret_der()));
    }

    #[test]
    fn a_state_from_before_enrolled_keys_is_read() {
        let mut json: serde_json::Value = serde_json::from_slice(&sample("web").to_json()).unwrap();
        for field in ["enrolled_key", "recovery_heard_at", "federation"] {
            json.as_object_mut().unwrap().remove(field).unwrap();
        }
        let read = State::from_json(json.to_string().as_bytes()).unwrap();
        assert_eq!((read.enrolled_key, read.recovery.heard_at), (None, 0));
    }

    #[test]
    fn not_after_is_the_earliest_of_the_chain() {
        let domain: TrustDomain = "prod.example.org".parse().unwrap();
        let ca = FakeCa::new(&domain);
        let id = SpiffeId::workload(&domain, "shop", "payments").unwrap();
        let short = ca.svid(&id);
        let long = ca.svid_between(&id, short.not_before, short.not_after + Duration::from_secs(1000));
        let chain = vec![long.chain[0].to_vec(), short.chain[0].to_vec()];
        let svid = assemble(chain, long.key.secret_der().to_vec(), long.not_before).unwrap();
        assert_eq!(svid.not_after, short.not_after);
    }
}
