//! Private keys of authorities are stored encrypted; the key that opens them lives outside the database.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::{hmac, rand};

const KEK_BYTES: usize = 32;
/// The name of the systemd credential that replaces the file.
pub(crate) const CREDENTIAL: &str = "meshd-pki.kek";

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read the wrapping key {}: {source}; restore it from a backup, without it the PKI cannot sign", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot create {}: {source}; if an `init` that failed left it, remove it", path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("the wrapping key {} has {length} bytes, 32 are needed; restore it from a backup", path.display())]
    Length { path: PathBuf, length: usize },
    #[error("the key of authority {0} does not open with this wrapping key; restore database and key from one backup")]
    Unwrap(String),
    #[error("the cryptographic library failed; see the system's entropy and memory")]
    Library,
}

/// The key-encryption key.
pub(crate) struct Kek {
    seal: LessSafeKey,
    derive: hmac::Key,
}

impl Kek {
    pub(crate) fn load(path: &Path) -> Result<Kek, KeyError> {
        let bytes = fs::read(path).map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
        if bytes.len() != KEK_BYTES {
            return Err(KeyError::Length { path: path.to_owned(), length: bytes.len() });
        }
        Kek::from_bytes(&bytes)
    }

    pub(crate) fn create(path: &Path) -> Result<Kek, KeyError> {
        let mut bytes = [0; KEK_BYTES];
        random(&mut bytes)?;
        write_private(path, &bytes)?;
        Kek::from_bytes(&bytes)
    }

    fn from_bytes(bytes: &[u8]) -> Result<Kek, KeyError> {
        let key = UnboundKey::new(&AES_256_GCM, bytes).map_err(|_| KeyError::Library)?;
        Ok(Kek { seal: LessSafeKey::new(key), derive: hmac::Key::new(hmac::HMAC_SHA256, bytes) })
    }

    /// Another secret that all who hold this one can make, and nobody else.
    pub(crate) fn derived(&self, purpose: &str) -> Vec<u8> {
        hmac::sign(&self.derive, purpose.as_bytes()).as_ref().to_vec()
    }

    /// Encrypts a private key for one authority; the result opens for no other.
    pub(crate) fn wrap(&self, authority: &str, key: &[u8]) -> Result<Vec<u8>, KeyError> {
        let mut nonce = [0; NONCE_LEN];
        random(&mut nonce)?;
        let mut sealed = key.to_vec();
        let wrapped = Nonce::assume_unique_for_key(nonce);
        self.seal
            .seal_in_place_append_tag(wrapped, Aad::from(authority), &mut sealed)
            .map_err(|_| KeyError::Library)?;
        Ok([&nonce[..], &sealed].concat())
    }

    pub(crate) fn unwrap(&self, authority: &str, wrapped: &[u8]) -> Result<Vec<u8>, KeyError> {
        let failed = || KeyError::Unwrap(authority.to_owned());
        let (nonce, sealed) = wrapped.split_first_chunk::<NONCE_LEN>().ok_or_else(failed)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self.seal.open_in_place(nonce, Aad::from(authority), &mut sealed).map_err(|_| failed())?;
        Ok(opened.to_vec())
    }
}

pub(crate) fn random(bytes: &mut [u8]) -> Result<(), KeyError> {
    rand::fill(bytes).map_err(|_| KeyError::Library)
}

/// Creates a file only its owner can read, and never over an existing one.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> Result<(), KeyError> {
    let create = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    create().map_err(|source| KeyError::Create { path: path.to_owned(), source })
}

/// Writes a file only its owner can read, whole or not at all, over what was there.
pub(crate) fn replace_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_wrapped_key_opens_only_for_its_authority_and_wrapping_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        let kek = Kek::create(&path).unwrap();
        let wrapped = kek.wrap("a1", b"secret").unwrap();
        assert!(!wrapped.windows(6).any(|window| window == b"secret"));
        assert_eq!(Kek::load(&path).unwrap().unwrap("a1", &wrapped).unwrap(), b"secret");
        assert!(matches!(kek.unwrap("b2", &wrapped), Err(KeyError::Unwrap(_))));
        let other = Kek::create(&dir.path().join("other")).unwrap();
        assert!(matches!(other.unwrap("a1", &wrapped), Err(KeyError::Unwrap(_))));
        assert!(matches!(kek.unwrap("a1", &wrapped[..5]), Err(KeyError::Unwrap(_))));
    }

    #[test]
    fn a_wrapping_key_is_private_whole_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        Kek::create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Kek::create(&path), Err(KeyError::Create { .. })));
        fs::write(&path, "short").unwrap();
        assert!(matches!(Kek::load(&path), Err(KeyError::Length { length: 5, .. })));
    }
}
