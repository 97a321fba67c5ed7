//! Every bundle there ever was, signed by the roots that hosts could know before it.

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, get, list, list_from, put};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredBundle {
    pub(crate) sequence: u64,
    /// The SPIFFE bundle document exactly as hashed and signed.
    pub(crate) jwks: String,
    /// Identifiers of the roots in it.
    pub(crate) roots: Vec<String>,
    pub(crate) signatures: Vec<Signature>,
    pub(crate) created_at: i64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Signature {
    pub(crate) root: String,
    /// `meshd-bundle+jws`
    pub(crate) jws: String,
}

/// Sequences are ordered as numbers where keys are ordered as text.
fn key(sequence: u64) -> String {
    format!("bundle/{sequence:020}")
}

pub(crate) fn put_bundle(records: &mut dyn Records, bundle: &StoredBundle) -> Result<(), DbError> {
    let digest = meshd_identity::sha256(bundle.jwks.as_bytes());
    put(records, &digest_key(&digest), &bundle.sequence)?;
    put(records, &key(bundle.sequence), bundle)
}

pub(crate) fn bundle(view: &mut dyn View, sequence: u64) -> Result<Option<StoredBundle>, DbError> {
    get(view, &key(sequence))
}

pub(crate) fn by_digest(view: &mut dyn View, digest: &[u8]) -> Result<Option<StoredBundle>, DbError> {
    match get(view, &digest_key(digest))? {
        Some(sequence) => bundle(view, sequence),
        None => Ok(None),
    }
}

/// In the order of their sequences.
pub(crate) fn all(view: &mut dyn View) -> Result<Vec<StoredBundle>, DbError> {
    let found: Vec<(String, StoredBundle)> = list(view, "bundle/")?;
    Ok(found.into_iter().map(|(_, bundle)| bundle).collect())
}

/// From this one on, in the order of their sequences.
pub(crate) fn from(view: &mut dyn View, sequence: u64) -> Result<Vec<StoredBundle>, DbError> {
    let found: Vec<(String, StoredBundle)> = list_from(view, "bundle/", &key(sequence))?;
    Ok(found.into_iter().map(|(_, bundle)| bundle).collect())
}

fn digest_key(digest: &[u8]) -> String {
    format!("bundle_digest/{}", data_encoding::HEXLOWER.encode(digest))
}
