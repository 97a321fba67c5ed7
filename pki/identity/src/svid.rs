use std::time::{Duration, SystemTime};

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::{IdError, SpiffeId};

/// What a leaf certificate says about its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SvidInfo {
    pub id: SpiffeId,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Lower-case hexadecimal, as `openssl x509 -serial` shows it.
    pub serial: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SvidError {
    #[error("the certificate is not valid DER X.509: {0}; replace the file or ask its issuer")]
    NotX509(String),
    #[error("the certificate has {0} URI names; an X.509-SVID has exactly one, ask its issuer for a proper one")]
    UriCount(usize),
    #[error("the certificate carries a name that is not valid text; ask its issuer for a proper one")]
    NameEncoding,
    #[error("the certificate's URI name is no identity of the mesh: {0}")]
    Id(#[from] IdError),
    #[error("the certificate's {extension} {problem}; an X.509-SVID leaf {rule}")]
    Profile { extension: &'static str, problem: &'static str, rule: &'static str },
}

/// Reads the identity out of a leaf and checks the X.509-SVID profile. Does not check signatures or time.
///
/// Names are counted on the raw extension: TLS libraries skip URIs they cannot decode, which would let a
/// certificate with two names pass as one with one.
pub fn inspect_svid(der: &[u8]) -> Result<SvidInfo, SvidError> {
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|e| SvidError::NotX509(e.to_string()))?;
    if !rest.is_empty() {
        return Err(SvidError::NotX509(format!("{} bytes follow the certificate", rest.len())));
    }
    certificate.extensions_map().map_err(|_| SvidError::NotX509("an extension occurs twice".to_owned()))?;
    check_profile(&certificate)?;
    let id = only_uri(&certificate)?.parse()?;
    Ok(SvidInfo {
        id,
        not_before: system_time(certificate.validity().not_before),
        not_after: system_time(certificate.validity().not_after),
        serial: data_encoding::HEXLOWER.encode(certificate.raw_serial()),
    })
}

fn check_profile(certificate: &X509Certificate<'_>) -> Result<(), SvidError> {
    let fail = |extension, problem, rule| Err(SvidError::Profile { extension, problem, rule });
    let unreadable = |extension| SvidError::Profile { extension, problem: "is unreadable", rule: "needs it whole" };

    let constraints = certificate.basic_constraints().map_err(|_| unreadable("basicConstraints"))?;
    match constraints {
        None => return fail("basicConstraints", "is missing", "says CA:FALSE"),
        Some(found) if found.value.ca => return fail("basicConstraints", "says CA:TRUE", "says CA:FALSE"),
        Some(_) => {}
    }
    let usage = certificate.key_usage().map_err(|_| unreadable("keyUsage"))?;
    match usage {
        None => return fail("keyUsage", "is missing", "has it critical with digitalSignature"),
        Some(found) if !found.critical => return fail("keyUsage", "is not critical", "has it critical"),
        Some(found) if !found.value.digital_signature() => {
            return fail("keyUsage", "lacks digitalSignature", "has digitalSignature");
        }
        Some(found) if found.value.key_cert_sign() || found.value.crl_sign() => {
            return fail("keyUsage", "allows signing certificates", "never has keyCertSign or cRLSign");
        }
        Some(_) => {}
    }
    let purposes = certificate.extended_key_usage().map_err(|_| unreadable("extendedKeyUsage"))?;
    match purposes {
        Some(found) if !(found.value.server_auth && found.value.client_auth) => {
            fail("extendedKeyUsage", "names one side only", "names both serverAuth and clientAuth")
        }
        _ => Ok(()),
    }
}

fn only_uri<'a>(certificate: &'a X509Certificate<'_>) -> Result<&'a str, SvidError> {
    let mut uris = Vec::new();
    for extension in certificate.extensions() {
        if let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() {
            for name in &names.general_names {
                match name {
                    GeneralName::URI(uri) => uris.push(*uri),
                    GeneralName::Invalid(..) => return Err(SvidError::NameEncoding),
                    _ => {}
                }
            }
        }
    }
    match uris[..] {
        [uri] => Ok(uri),
        _ => Err(SvidError::UriCount(uris.len())),
    }
}

fn system_time(time: ASN1Time) -> SystemTime {
    let seconds = time.timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { SystemTime::UNIX_EPOCH - distance } else { SystemTime::UNIX_EPOCH + distance }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
        SanType,
    };

    use super::*;

    const ID: &str = "spiffe://prod.example.org/ns/shop/sa/payments";

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn params() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![uri(ID)];
        params
    }

    fn inspect(params: &CertificateParams) -> Result<SvidInfo, SvidError> {
        let key = KeyPair::generate().unwrap();
        inspect_svid(params.self_signed(&key).unwrap().der())
    }

    #[test]
    fn reads_identity_life_and_serial() {
        let mut params = params();
        params.not_before = time::OffsetDateTime::from_unix_timestamp(1_700_000_000).unwrap();
        params.not_after = time::OffsetDateTime::from_unix_timestamp(1_700_086_400).unwrap();
        params.serial_number = Some(vec![0x0a, 0xbc].into());
        params.subject_alt_names.push(SanType::DnsName("payments.shop".try_into().unwrap()));
        let info = inspect(&params).unwrap();
        assert_eq!(info.id.as_str(), ID);
        assert_eq!(info.serial, "0abc");
        assert_eq!(info.not_after.duration_since(info.not_before).unwrap(), Duration::from_secs(86_400));
        assert_eq!(info.not_before, SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    }

    #[test]
    fn exactly_one_uri_name_is_needed() {
        let mut none = params();
        none.subject_alt_names = vec![SanType::DnsName("a.example".try_into().unwrap())];
        assert_eq!(inspect(&none), Err(SvidError::UriCount(0)));
        let mut two = params();
        two.subject_alt_names.push(uri("spiffe://prod.example.org/ns/shop/sa/other"));
        assert_eq!(inspect(&two), Err(SvidError::UriCount(2)));
    }

    #[test]
    fn a_second_uri_hidden_by_bad_encoding_is_seen() {
        let mut params = params();
        params.subject_alt_names.clear();
        // SEQUENCE of two [6] names, the second not valid text: a lenient reader would count one.
        let mut names = vec![0x86, ID.len() as u8];
        names.extend_from_slice(ID.as_bytes());
        names.extend_from_slice(&[0x86, 2, 0xff, 0xfe]);
        let mut content = vec![0x30, names.len() as u8];
        content.extend_from_slice(&names);
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], content)];
        assert_eq!(inspect(&params), Err(SvidError::NameEncoding));
    }

    #[test]
    fn the_leaf_profile_is_enforced() {
        let profile = |params: &CertificateParams| match inspect(params) {
            Err(SvidError::Profile { extension, .. }) => extension,
            other => panic!("expected a profile error, got {other:?}"),
        };
        let mut unconstrained = params();
        unconstrained.is_ca = IsCa::NoCa;
        assert_eq!(profile(&unconstrained), "basicConstraints");
        let mut authority = params();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        assert_eq!(profile(&authority), "basicConstraints");
        let mut signs = params();
        signs.key_usages.push(KeyUsagePurpose::KeyCertSign);
        assert_eq!(profile(&signs), "keyUsage");
        let mut silent = params();
        silent.key_usages.clear();
        assert_eq!(profile(&silent), "keyUsage");
        let mut wrong = params();
        wrong.key_usages = vec![KeyUsagePurpose::KeyAgreement];
        assert_eq!(profile(&wrong), "keyUsage");
        let mut server_only = params();
        server_only.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        assert_eq!(profile(&server_only), "extendedKeyUsage");
    }

    #[test]
    fn foreign_uris_and_garbage_are_refused() {
        let mut params = params();
        params.subject_alt_names = vec![uri("https://example.org/ns/shop/sa/payments")];
        assert!(matches!(inspect(&params), Err(SvidError::Id(_))));
        assert!(matches!(inspect_svid(b"not a certificate"), Err(SvidError::NotX509(_))));
        let key = KeyPair::generate().unwrap();
        let mut trailing = self::params().self_signed(&key).unwrap().der().to_vec();
        trailing.push(0);
        assert!(matches!(inspect_svid(&trailing), Err(SvidError::NotX509(_))));
    }
}
