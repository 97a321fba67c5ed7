//! Reading certificate requests: only the key counts, and the proof that the sender holds it.

use meshd_identity::sha256;
use rcgen::SubjectPublicKeyInfo;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

/// A P-256 request is about 200 bytes; more is not looked at.
const MAX_BYTES: usize = 4096;

pub(crate) struct Request {
    pub(crate) public_key: SubjectPublicKeyInfo,
    /// SubjectPublicKeyInfo.
    pub(crate) spki: Vec<u8>,
    /// SHA-256 of it.
    pub(crate) key_id: [u8; 32],
}

impl Request {
    pub(crate) fn read(der: &[u8]) -> Result<Request, String> {
        if der.len() > MAX_BYTES {
            return Err(format!("the certificate request has {} bytes, {MAX_BYTES} are allowed", der.len()));
        }
        let (rest, csr) = X509CertificationRequest::from_der(der)
            .map_err(|error| format!("the certificate request is not PKCS#10: {error}"))?;
        if !rest.is_empty() {
            return Err("bytes follow the certificate request".to_owned());
        }
        let key = &csr.certification_request_info.subject_pki;
        if !is_p256(key) {
            return Err("the certificate request is over a key that is not P-256, the only kind issued".to_owned());
        }
        csr.verify_signature().map_err(|_| "the certificate request is not signed by its own key".to_owned())?;
        let public_key = SubjectPublicKeyInfo::from_der(key.raw).map_err(|error| format!("unusable key: {error}"))?;
        Ok(Request { public_key, spki: key.raw.to_vec(), key_id: sha256(key.raw) })
    }
}

fn is_p256(key: &ParsedKey<'_>) -> bool {
    let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    key.algorithm.algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY && curve.is_some_and(|oid| oid == OID_EC_P256)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn csr(key: &KeyPair) -> Vec<u8> {
        CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
    }

    fn refusal(der: &[u8]) -> String {
        Request::read(der).err().expect("the request is bad")
    }

    #[test]
    fn only_the_key_is_taken() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params.subject_alt_names.push(rcgen::SanType::URI("spiffe://a/ns/x/sa/root".try_into().unwrap()));
        let request = Request::read(params.serialize_request(&key).unwrap().der()).unwrap();
        assert_eq!(request.key_id, sha256(&rcgen::PublicKeyData::subject_public_key_info(&key)));
    }

    #[test]
    fn other_curves_bad_signatures_and_garbage_are_refused() {
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert!(refusal(&csr(&p384)).contains("P-256"));
        let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        assert!(refusal(&csr(&ed25519)).contains("P-256"));
        let mut stolen = csr(&KeyPair::generate().unwrap());
        let last = stolen.len() - 1;
        stolen[last] ^= 1;
        assert!(refusal(&stolen).contains("not signed by its own key"));
        assert!(refusal(b"hello").contains("PKCS#10"));
        assert!(refusal(&[0; MAX_BYTES + 1]).contains("allowed"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Request::read(&bytes).is_err());
        }

        // The name of the algorithm is not signed, what is taken is.
        #[test]
        fn a_changed_byte_never_brings_another_key(at in any::<prop::sample::Index>(), by in 1..=u8::MAX) {
            let key = KeyPair::generate().unwrap();
            let mut request = csr(&key);
            let at = at.index(request.len());
            request[at] ^= by;
            if let Ok(read) = Request::read(&request) {
                prop_assert_eq!(read.spki, rcgen::PublicKeyData::subject_public_key_info(&key), "byte {} by {}", at, by);
            }
        }
    }
}
