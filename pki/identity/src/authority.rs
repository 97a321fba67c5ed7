//! The one name a root has everywhere: in the records of the PKI, in what hosts report, in what they are told.

use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::FromDer;
use x509_parser::x509::X509Name;

use crate::sha256;

/// X.520 serialNumber: in the subject of our own authorities, their identifier.
const SERIAL_NUMBER: [u64; 4] = [2, 5, 4, 5];
/// 128 bits in hexadecimal.
const ID_LENGTH: usize = 32;

/// The identifier of a root: the serialNumber of its subject when that is one of ours, else the SHA-256 of the
/// certificate, cut to the same length. Not of the key: an authority outside may be certified again with the key it has.
pub fn root_id(certificate: &[u8]) -> String {
    let parsed = X509Certificate::from_der(certificate).ok();
    let own = parsed.and_then(|(_, parsed)| own_identifier(parsed.subject()));
    own.unwrap_or_else(|| digest_id(certificate))
}

/// An identifier for what has none of its own.
pub fn digest_id(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(&sha256(bytes)[..ID_LENGTH / 2])
}

fn own_identifier(name: &X509Name<'_>) -> Option<String> {
    let wanted = Oid::from(&SERIAL_NUMBER).ok()?;
    let found = name.iter_by_oid(&wanted).next()?.as_str().ok()?;
    let is_ours = found.len() == ID_LENGTH && found.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_ours.then(|| found.to_owned())
}

/// The roots among `roots` (oldest first) that may have signed this certificate. Of those that have the same name and
/// key, which verify the same, the newest.
pub fn roots_of<'a>(certificate: &[u8], roots: impl IntoIterator<Item = &'a [u8]>) -> Vec<&'a [u8]> {
    let Ok((_, signed)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let mut named: Vec<(&[u8], X509Certificate<'_>)> = Vec::new();
    for der in roots {
        let Ok((_, root)) = X509Certificate::from_der(der) else { continue };
        if root.subject().as_raw() == signed.issuer().as_raw() {
            named.retain(|(_, older)| older.public_key().raw != root.public_key().raw);
            named.push((der, root));
        }
    }
    let wanted = signing_key_identifier(&signed);
    let is_other = |root: &X509Certificate<'_>| match (wanted, key_identifier(root)) {
        (Some(wanted), Some(found)) => wanted != found,
        _ => false,
    };
    // Key identifiers are a hint: where none fits, names have to do.
    if named.iter().any(|(_, root)| !is_other(root)) {
        named.retain(|(_, root)| !is_other(root));
    }
    named.into_iter().map(|(der, _)| der).collect()
}

fn signing_key_identifier<'a>(certificate: &X509Certificate<'a>) -> Option<&'a [u8]> {
    use x509_parser::extensions::ParsedExtension;
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(found) => found.key_identifier.as_ref().map(|id| id.0),
        _ => None,
    })
}

fn key_identifier<'a>(certificate: &X509Certificate<'a>) -> Option<&'a [u8]> {
    use x509_parser::extensions::ParsedExtension;
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(found) => Some(found.0),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

    use super::*;

    fn params(name: &str, number: Option<&str>) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(number) = number {
            params.distinguished_name.push(DnType::CustomDnType(SERIAL_NUMBER.to_vec()), number);
        }
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.use_authority_key_identifier_extension = true;
        params
    }

    fn root(name: &str, number: Option<&str>, key: &KeyPair, serial: u64) -> Vec<u8> {
        let mut params = params(name, number);
        params.serial_number = Some(serial.into());
        params.self_signed(key).unwrap().der().to_vec()
    }

    fn signed_by(name: &str, key: KeyPair) -> Vec<u8> {
        let issuer = Issuer::new(params(name, None), key);
        let key = KeyPair::generate().unwrap();
        params("intermediate", None).signed_by(&key, &issuer).unwrap().der().to_vec()
    }

    #[test]
    fn a_root_of_ours_is_named_in_its_subject_and_any_other_by_its_certificate() {
        let key = KeyPair::generate().unwrap();
        let number = "0123456789abcdef0123456789abcdef";
        assert_eq!(root_id(&root("ours", Some(number), &key, 1)), number);
        for other in [None, Some("DE-4711"), Some("0123456789ABCDEF0123456789ABCDEF")] {
            let (first, again) = (root("other", other, &key, 1), root("other", other, &key, 2));
            assert_eq!(root_id(&first).len(), number.len());
            assert_ne!(Some(root_id(&first).as_str()), other);
            assert_ne!(root_id(&first), root_id(&again), "certified again with the same key");
        }
    }

    #[test]
    fn a_certificate_is_under_the_root_of_its_issuers_name_and_key() {
        let [key, other_key] = [(); 2].map(|()| KeyPair::generate().unwrap());
        let roots = [
            root("company", None, &key, 1),
            root("company", None, &other_key, 2),
            root("company", None, &key, 3),
            root("elsewhere", None, &key, 4),
        ];
        let all = || roots.iter().map(Vec::as_slice);
        assert_eq!(roots_of(&signed_by("company", key), all()), [roots[2].as_slice()], "the newest of one key");
        assert_eq!(roots_of(&signed_by("company", other_key), all()), [roots[1].as_slice()]);
        assert!(roots_of(&signed_by("nowhere", KeyPair::generate().unwrap()), all()).is_empty());
    }
}
