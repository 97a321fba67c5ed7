//! A new key for every certificate.

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

/// A fresh P-256 key with the request for a certificate over it. The request names nobody: the PKI decides that.
pub(crate) struct NewKey {
    key: KeyPair,
}

impl NewKey {
    pub(crate) fn generate() -> Result<NewKey, rcgen::Error> {
        Ok(NewKey { key: KeyPair::generate()? })
    }

    pub(crate) fn from_pkcs8(der: &[u8]) -> Result<NewKey, rcgen::Error> {
        Ok(NewKey { key: KeyPair::try_from(der)? })
    }

    pub(crate) fn request(&self) -> Result<Vec<u8>, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.key)?.der().to_vec())
    }

    pub(crate) fn pkcs8(&self) -> Vec<u8> {
        self.key.serialize_der()
    }

    /// Whether a certificate is over this key.
    pub(crate) fn matches(&self, certificate: &[u8]) -> bool {
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, parsed)| parsed.public_key().raw == self.key.subject_public_key_info())
    }
}
