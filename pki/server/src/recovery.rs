//! The offline recovery key at work: statements signed where the key is, served by the PKI, believed by every host that
//! pins the key, whatever has become of the PKI.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use data_encoding::BASE64;
use meshd_identity::TrustDomain;
use meshd_identity::signed::{self, SignedError};
use meshd_identity::statements::{BundleStatement, RecoveryStatement};
use rcgen::{KeyPair, PublicKeyData};
use serde::{Deserialize, Serialize};

use crate::keys::{KeyError, write_private};
use crate::times::unix;

#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    #[error("cannot read the recovery key {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is no recovery key: {source}", path.display())]
    Key { path: PathBuf, source: rcgen::Error },
    #[error(transparent)]
    Write(#[from] KeyError),
    #[error("cannot make a key: {0}")]
    Make(#[from] rcgen::Error),
    #[error("cannot sign: {0}")]
    Sign(#[from] SignedError),
}

/// What is carried from where the key is to the PKI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedStatement {
    /// JWS, `meshd-recovery+jws`
    pub statement: String,
    /// SubjectPublicKeyInfo, base64.
    pub signed_by: String,
}

/// What is carried the other way: what a PKI wants the holder of the key to vouch for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub trust_domain: TrustDomain,
    pub bundle_sequence: u64,
    pub bundle_sha256: String,
    pub next_key: String,
}

/// "After this key comes that one." The next key is made, unless the file holds one already.
pub fn succeed(
    key: &Path,
    next: &Path,
    domain: &TrustDomain,
    now: SystemTime,
) -> Result<SignedStatement, RecoveryError> {
    let key = load(key)?;
    let next_key = if next.exists() {
        load(next)?
    } else {
        let made = KeyPair::generate()?;
        write_private(next, made.serialize_pem().as_bytes())?;
        made
    };
    let next_key = Some(BASE64.encode(&next_key.subject_public_key_info()));
    sign(&key, RecoveryStatement { trust_domain: domain.clone(), issued_at: unix(now), bundle: None, next_key })
}

/// "Trust that PKI from now on, and its recovery key after this one."
pub fn vouch(key: &Path, request: &Request, now: SystemTime) -> Result<SignedStatement, RecoveryError> {
    let bundle = BundleStatement {
        trust_domain: request.trust_domain.clone(),
        sequence: request.bundle_sequence,
        sha256: request.bundle_sha256.clone(),
    };
    let key = load(key)?;
    // The key of a PKI that was not lost vouches for it, and stays what it is.
    let is_other = request.next_key != BASE64.encode(&key.subject_public_key_info());
    sign(
        &key,
        RecoveryStatement {
            trust_domain: request.trust_domain.clone(),
            issued_at: unix(now),
            bundle: Some(bundle),
            next_key: is_other.then(|| request.next_key.clone()),
        },
    )
}

fn sign(key: &KeyPair, statement: RecoveryStatement) -> Result<SignedStatement, RecoveryError> {
    let signed_by = BASE64.encode(&key.subject_public_key_info());
    Ok(SignedStatement { statement: signed::sign(&key.serialize_der(), &statement)?, signed_by })
}

fn load(path: &Path) -> Result<KeyPair, RecoveryError> {
    let read = |source| RecoveryError::Read { path: path.to_owned(), source };
    let pem = std::fs::read_to_string(path).map_err(read)?;
    KeyPair::from_pem(&pem).map_err(|source| RecoveryError::Key { path: path.to_owned(), source })
}
