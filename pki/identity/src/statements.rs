//! What the PKI says under a signature.

use serde::{Deserialize, Serialize};

use crate::signed::Statement;
use crate::{Bundle, SpiffeId, TrustDomain, sha256};

/// "This is the bundle of that sequence", signed by roots that were in force before it: who trusts one of them may go
/// on to this bundle, however long it was away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleStatement {
    pub trust_domain: TrustDomain,
    pub sequence: u64,
    /// Of the bundle document, lower-case hexadecimal.
    pub sha256: String,
}

impl Statement for BundleStatement {
    const TYPE: &'static str = "meshd-bundle+jws";
}

impl BundleStatement {
    pub fn about(bundle: &Bundle) -> BundleStatement {
        BundleStatement {
            trust_domain: bundle.trust_domain.clone(),
            sequence: bundle.sequence,
            sha256: data_encoding::HEXLOWER.encode(&bundle.digest()),
        }
    }
}

/// What the holder of the offline recovery key says: which bundle to trust now, and which recovery key comes next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryStatement {
    pub trust_domain: TrustDomain,
    /// Seconds since 1970; of two statements the later one holds.
    pub issued_at: i64,
    /// The bundle to trust from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<BundleStatement>,
    /// SubjectPublicKeyInfo of the next recovery key, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_key: Option<String>,
}

impl Statement for RecoveryStatement {
    const TYPE: &'static str = "meshd-recovery+jws";
}

/// Who is refused although their certificates are still valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenySet {
    pub trust_domain: TrustDomain,
    /// Rises with every change; a holder refuses to go back.
    pub sequence: u64,
    pub entries: Vec<Denied>,
}

impl Statement for DenySet {
    const TYPE: &'static str = "meshd-deny+jws";
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Denied {
    #[serde(flatten)]
    pub whom: Whom,
    /// Seconds since 1970: when the last certificate concerned has ended, and the entry may go.
    pub until: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whom {
    /// A certificate of one identity, wherever it is.
    Identity(SpiffeId),
    /// A certificate, by its serial in lower-case hexadecimal.
    Serial(String),
    /// Everything under one authority, by the SHA-256 of its SubjectPublicKeyInfo in lower-case hexadecimal.
    Authority(String),
}

/// What a host signs to prove that it holds its enrolled key.
pub fn attestation_message(domain: &TrustDomain, host_id: &str, nonce: &[u8], csr: &[u8]) -> Vec<u8> {
    let head = format!("meshd-pki attest v1\0{domain}\0{host_id}\0");
    [head.as_bytes(), nonce, &sha256(csr)].concat()
}

/// What a machine signs with the key of its certificate to become a host.
pub fn machine_message(domain: &TrustDomain, nonce: &[u8], csr: &[u8]) -> Vec<u8> {
    let head = format!("meshd-pki x509pop v1\0{domain}\0");
    [head.as_bytes(), nonce, &sha256(csr)].concat()
}

/// What the nonce of a machine certificate is asked for.
pub fn machine_challenge(leaf: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&sha256(leaf))
}
