//! Statements signed with P-256, in JWS compact form (RFC 7515). The type in the header keeps one kind of statement
//! from being taken for another.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, UnparsedPublicKey};
use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

pub const ALGORITHM: &str = "ES256";
/// A deny set of 10,000 entries stays below this.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// A kind of statement.
pub trait Statement: Serialize + DeserializeOwned {
    /// `typ` of the header.
    const TYPE: &'static str;
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignedError {
    #[error("the signing key is unusable")]
    Key,
    #[error("not a signed statement of this kind: {0}")]
    Form(&'static str),
    #[error("the signature does not verify with any key that is trusted")]
    Signature,
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    typ: String,
}

/// The public half of a P-256 key, as an uncompressed point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyingKey(Vec<u8>);

impl VerifyingKey {
    pub fn from_spki(spki: &[u8]) -> Option<VerifyingKey> {
        let (_, key) = SubjectPublicKeyInfo::from_der(spki).ok()?;
        VerifyingKey::from_point(&key.subject_public_key.data)
    }

    /// `None` for certificates over other kinds of keys: what they sign is not verified this way.
    pub fn from_certificate(der: &[u8]) -> Option<VerifyingKey> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        VerifyingKey::from_point(&certificate.public_key().subject_public_key.data)
    }

    fn from_point(point: &[u8]) -> Option<VerifyingKey> {
        (point.len() == 65).then(|| VerifyingKey(point.to_vec()))
    }

    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.0).verify(message, signature).is_ok()
    }
}

/// Signs bytes with a P-256 key in PKCS#8; r and s, 64 bytes.
pub fn sign_bytes(pkcs8: &[u8], message: &[u8]) -> Result<Vec<u8>, SignedError> {
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8).map_err(|_| SignedError::Key)?;
    let signature = key.sign(&SystemRandom::new(), message).map_err(|_| SignedError::Key)?;
    Ok(signature.as_ref().to_vec())
}

pub fn sign<S: Statement>(pkcs8: &[u8], statement: &S) -> Result<String, SignedError> {
    compact(pkcs8, &Header { alg: ALGORITHM.to_owned(), typ: S::TYPE.to_owned() }, statement)
}

/// A JWS in compact form over any header and payload.
pub fn compact(pkcs8: &[u8], header: &impl Serialize, payload: &impl Serialize) -> Result<String, SignedError> {
    let text = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
    let json = |value: Result<Vec<u8>, serde_json::Error>| value.map_err(|_| SignedError::Form("it is no JSON"));
    let signed = format!("{}.{}", text(&json(serde_json::to_vec(header))?), text(&json(serde_json::to_vec(payload))?));
    let signature = sign_bytes(pkcs8, signed.as_bytes())?;
    Ok(format!("{signed}.{}", text(&signature)))
}

/// Reads a statement that one of the keys has signed.
pub fn verify<S: Statement>(text: &str, keys: &[VerifyingKey]) -> Result<S, SignedError> {
    if text.len() > MAX_BYTES {
        return Err(SignedError::Form("it is too long"));
    }
    let parts: Vec<&str> = text.split('.').collect();
    let [header, payload, signature] = parts[..] else {
        return Err(SignedError::Form("it has not three parts"));
    };
    let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| SignedError::Form("it is not base64url"));
    let found: Header = serde_json::from_slice(&decode(header)?).map_err(|_| SignedError::Form("bad header"))?;
    if found.alg != ALGORITHM || found.typ != S::TYPE {
        return Err(SignedError::Form("another algorithm or type"));
    }
    let signature = decode(signature)?;
    let signed = &text[..header.len() + 1 + payload.len()];
    if !keys.iter().any(|key| key.verify(signed.as_bytes(), &signature)) {
        return Err(SignedError::Signature);
    }
    serde_json::from_slice(&decode(payload)?).map_err(|_| SignedError::Form("its content is unreadable"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{KeyPair, PublicKeyData};

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Greeting(String);
    impl Statement for Greeting {
        const TYPE: &'static str = "greeting";
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Order(String);
    impl Statement for Order {
        const TYPE: &'static str = "order";
    }

    fn key() -> (KeyPair, VerifyingKey) {
        let pair = KeyPair::generate().unwrap();
        let public = VerifyingKey::from_spki(&pair.subject_public_key_info()).unwrap();
        (pair, public)
    }

    #[test]
    fn a_statement_verifies_with_its_key_only_and_as_its_own_kind_only() {
        let ((pair, public), (_, other)) = (key(), key());
        let text = sign(&pair.serialize_der(), &Greeting("hello".to_owned())).unwrap();
        assert_eq!(verify::<Greeting>(&text, &[other.clone(), public.clone()]).unwrap().0, "hello");
        assert_eq!(verify::<Greeting>(&text, &[other]), Err(SignedError::Signature));
        assert_eq!(verify::<Greeting>(&text, &[]), Err(SignedError::Signature));
        assert!(matches!(verify::<Order>(&text, &[public]), Err(SignedError::Form(_))));
    }

    #[test]
    fn a_changed_statement_does_not_verify() {
        let (pair, public) = key();
        let text = sign(&pair.serialize_der(), &Greeting("hello".to_owned())).unwrap();
        let forged = sign(&KeyPair::generate().unwrap().serialize_der(), &Greeting("bye".to_owned())).unwrap();
        let (good, bad): (Vec<&str>, Vec<&str>) = (text.split('.').collect(), forged.split('.').collect());
        let mixed = format!("{}.{}.{}", good[0], bad[1], good[2]);
        assert_eq!(verify::<Greeting>(&mixed, &[public]), Err(SignedError::Signature));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[ -~]{0,80}(\\.[A-Za-z0-9_-]{0,40}){0,4}") {
            let (_, public) = key();
            prop_assert!(verify::<Greeting>(&text, &[public]).is_err());
        }
    }
}
