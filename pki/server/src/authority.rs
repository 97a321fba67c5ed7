//! Certificate profiles. Pure: `now` and public keys come in, certificates go out.

use std::time::{Duration, SystemTime};

use meshd_identity::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer;

use crate::keys::{KeyError, random};
use crate::lifetimes::{AUTHORITY_BACKDATE, LEAF_BACKDATE, Lifetimes};
use crate::times::{from_unix, unix};

/// X.520 serialNumber: what makes the subject of every authority unique.
const SERIAL_NUMBER_ATTRIBUTE: [u64; 4] = [2, 5, 4, 5];
const ROOT_NAME: &str = "meshd root";
/// RFC 5280 ub-organization-name.
const ORGANIZATION_LIMIT: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("cannot sign: {0}")]
    Sign(#[from] rcgen::Error),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("a bridge to root {id} would have another name or key identifier than it, and lead nowhere")]
    Bridge { id: String },
    #[error("authority {id} ends at {end}, too soon to issue under it; {remedy}")]
    Ending { id: String, end: String, remedy: &'static str },
}

/// A certificate authority that can sign.
pub struct Authority {
    pub id: String,
    pub certificate: Vec<u8>,
    pub not_after: SystemTime,
    /// Nothing it signs ends later than this long before its own end.
    skew: Duration,
    /// What to do when it has ended.
    remedy: &'static str,
    issuer: Issuer<'static, KeyPair>,
}

/// What an authority outside is asked to sign for us.
pub(crate) fn csr_params(domain: &TrustDomain, id: &str) -> Result<CertificateParams, AuthorityError> {
    // Start and end are of no meaning in a request.
    let any = SystemTime::UNIX_EPOCH + AUTHORITY_BACKDATE;
    let mut params = authority_params(domain, "meshd ca", id, BasicConstraints::Constrained(0), any, any)?;
    params.serial_number = None;
    params.use_authority_key_identifier_extension = false;
    Ok(params)
}

/// A certificate just signed.
pub struct Issued {
    pub certificate: Vec<u8>,
    pub serial: String,
    pub not_after: SystemTime,
}

impl Authority {
    pub fn new_root(domain: &TrustDomain, lifetimes: &Lifetimes, now: SystemTime) -> Result<Authority, AuthorityError> {
        let (id, key) = (new_id()?, KeyPair::generate()?);
        let not_after = whole_seconds(now + lifetimes.root);
        let params = authority_params(domain, ROOT_NAME, &id, BasicConstraints::Unconstrained, now, not_after)?;
        let certificate = params.self_signed(&key)?.der().to_vec();
        Authority::from_parts(id, certificate, key, not_after, lifetimes.skew)
    }

    pub fn new_intermediate(
        root: &Authority,
        domain: &TrustDomain,
        lifetimes: &Lifetimes,
        now: SystemTime,
    ) -> Result<Authority, AuthorityError> {
        let (id, key) = (new_id()?, KeyPair::generate()?);
        let not_after = root.clamp(now, now + lifetimes.intermediate)?;
        let params = authority_params(domain, "meshd ca", &id, BasicConstraints::Constrained(0), now, not_after)?;
        let certificate = params.signed_by(&key, &root.issuer)?.der().to_vec();
        Authority::from_parts(id, certificate, key, not_after, lifetimes.skew)
    }

    /// Certifies the key of another root under its own name: who believes this one then believes what that one signs.
    pub(crate) fn bridge_to(
        &self,
        root: (&str, &[u8]),
        domain: &TrustDomain,
        not_after: SystemTime,
        now: SystemTime,
    ) -> Result<Vec<u8>, AuthorityError> {
        let (id, certificate) = root;
        let unreadable = |error: &dyn std::fmt::Display| rcgen::Error::X509(error.to_string());
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|error| unreadable(&error))?;
        let key = SubjectPublicKeyInfo::from_der(parsed.public_key().raw)?;
        let end = self.clamp(now, not_after)?;
        // Intermediates and leaves below it, no further authority.
        let params = authority_params(domain, ROOT_NAME, id, BasicConstraints::Constrained(1), now, end)?;
        let made = params.signed_by(&key, &self.issuer)?.der().to_vec();
        let (_, bridge) = X509Certificate::from_der(&made).map_err(|error| unreadable(&error))?;
        let identifier = |of: &X509Certificate<'_>| {
            of.iter_extensions().find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(found) => Some(found.0.to_vec()),
                _ => None,
            })
        };
        // Another version may have named it otherwise; verifiers go from certificate to certificate by these.
        let leads_there = bridge.subject().as_raw() == parsed.subject().as_raw()
            && bridge.public_key().raw == parsed.public_key().raw
            && identifier(&bridge) == identifier(&parsed);
        if !leads_there {
            return Err(AuthorityError::Bridge { id: id.to_owned() });
        }
        Ok(made)
    }

    pub(crate) fn from_parts(
        id: String,
        certificate: Vec<u8>,
        key: KeyPair,
        not_after: SystemTime,
        skew: Duration,
    ) -> Result<Authority, AuthorityError> {
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(certificate.as_slice()), key)?;
        let remedy = "restore a newer backup or initialise a new PKI";
        Ok(Authority { id, certificate, not_after, skew, remedy, issuer })
    }

    /// It was signed by others.
    pub(crate) fn of_outside(self) -> Authority {
        let remedy = "it is from outside: bring the next by `meshd-pki import`, or where --upstream-chain reads it";
        Authority { remedy, ..self }
    }

    pub(crate) fn pkcs8(&self) -> Vec<u8> {
        self.issuer.key().serialize_der()
    }

    /// Signs a leaf. Only the public key comes from the requester; everything else is decided here.
    pub fn issue(
        &self,
        id: &SpiffeId,
        public_key: &impl PublicKeyData,
        life: Duration,
        now: SystemTime,
    ) -> Result<Issued, AuthorityError> {
        self.issue_named(id, &[], public_key, life, now)
    }

    /// The same, with names beside the identity: for clients that look at nothing else.
    pub(crate) fn issue_named(
        &self,
        id: &SpiffeId,
        names: &[SanType],
        public_key: &impl PublicKeyData,
        life: Duration,
        now: SystemTime,
    ) -> Result<Issued, AuthorityError> {
        let serial = new_serial()?;
        let not_after = self.clamp(now, now + life)?;
        let mut params = CertificateParams::default();
        // With an empty subject the name extension becomes critical, as X509-SVID wants.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.subject_alt_names.extend_from_slice(names);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial.to_vec().into());
        params.not_before = date(now - LEAF_BACKDATE);
        params.not_after = date(not_after);
        let certificate = params.signed_by(public_key, &self.issuer)?.der().to_vec();
        Ok(Issued { certificate, serial: data_encoding::HEXLOWER.encode(&serial), not_after })
    }

    /// Nothing outlives what signed it, less the skew of clocks.
    fn clamp(&self, now: SystemTime, wanted: SystemTime) -> Result<SystemTime, AuthorityError> {
        let end = wanted.min(self.not_after - self.skew);
        if end <= now {
            let end = crate::times::rfc3339(unix(self.not_after));
            return Err(AuthorityError::Ending { id: self.id.clone(), end, remedy: self.remedy });
        }
        Ok(whole_seconds(end))
    }
}

fn authority_params(
    domain: &TrustDomain,
    name: &str,
    id: &str,
    constraints: BasicConstraints,
    now: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, AuthorityError> {
    let organization: String = domain.as_str().chars().take(ORGANIZATION_LIMIT).collect();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, organization);
    subject.push(DnType::CommonName, name);
    let number = DnValue::PrintableString(id.try_into()?);
    subject.push(DnType::CustomDnType(SERIAL_NUMBER_ATTRIBUTE.to_vec()), number);

    let mut params = CertificateParams::default();
    params.distinguished_name = subject;
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{domain}").as_str().try_into()?)];
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(new_serial()?.to_vec().into());
    params.not_before = date(now - AUTHORITY_BACKDATE);
    params.not_after = date(not_after);
    Ok(params)
}

pub(crate) fn new_id() -> Result<String, KeyError> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    Ok(data_encoding::HEXLOWER.encode(&bytes))
}

/// 128 random bits, less two: a serial is positive, and of constant length.
fn new_serial() -> Result<[u8; 16], KeyError> {
    let mut bytes = [0; 16];
    random(&mut bytes)?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(bytes)
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    from_unix(unix(time))
}

fn date(time: SystemTime) -> OffsetDateTime {
    whole_seconds(time).into()
}

#[cfg(test)]
mod tests {
    use meshd_identity::inspect_svid;

    use super::*;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn now() -> SystemTime {
        from_unix(1_790_000_000)
    }

    fn chain(lifetimes: &Lifetimes) -> (Authority, Authority) {
        let root = Authority::new_root(&domain(), lifetimes, now()).unwrap();
        let intermediate = Authority::new_intermediate(&root, &domain(), lifetimes, now()).unwrap();
        (root, intermediate)
    }

    #[test]
    fn a_leaf_follows_the_svid_profile_and_lives_as_asked() {
        let (_, intermediate) = chain(&Lifetimes::default());
        let id = SpiffeId::workload(&domain(), "shop", "payments").unwrap();
        let key = KeyPair::generate().unwrap();
        let issued = intermediate.issue(&id, &key, Duration::from_secs(86_400), now()).unwrap();
        let info = inspect_svid(&issued.certificate).unwrap();
        assert_eq!((&info.id, &info.serial), (&id, &issued.serial));
        assert_eq!(info.not_before, now() - Duration::from_secs(3600));
        assert_eq!(info.not_after, now() + Duration::from_secs(86_400));
        let (_, parsed) = X509Certificate::from_der(&issued.certificate).unwrap();
        assert_eq!(parsed.subject().as_raw(), [0x30, 0], "the subject is empty");
        assert!(parsed.subject_alternative_name().unwrap().unwrap().critical);
        assert_eq!(parsed.raw_serial().len(), 16);
    }

    #[test]
    fn authorities_have_unique_subjects_and_key_identifiers() {
        let (root, intermediate) = chain(&Lifetimes::default());
        let (_, root_parsed) = X509Certificate::from_der(&root.certificate).unwrap();
        let (_, parsed) = X509Certificate::from_der(&intermediate.certificate).unwrap();
        let subject = parsed.subject().to_string();
        assert!(subject.contains(&intermediate.id) && subject.contains("prod.example.org"), "{subject}");
        assert_eq!(parsed.issuer().as_raw(), root_parsed.subject().as_raw());
        assert_eq!(parsed.basic_constraints().unwrap().unwrap().value.path_len_constraint, Some(0));
        assert_eq!(root_parsed.basic_constraints().unwrap().unwrap().value.path_len_constraint, None);
        let (other, _) = chain(&Lifetimes::default());
        let (_, other_parsed) = X509Certificate::from_der(&other.certificate).unwrap();
        assert_ne!(other_parsed.subject().as_raw(), root_parsed.subject().as_raw());
    }

    #[test]
    fn a_bridge_has_name_and_key_of_the_root_it_leads_to() {
        let lifetimes = Lifetimes::default();
        let (before, next) = (chain(&lifetimes).0, chain(&lifetimes).0);
        let end = now() + lifetimes.bridge;
        let bridge = before.bridge_to((&next.id, &next.certificate), &domain(), end, now()).unwrap();
        let [(_, bridge), (_, before), (_, next)] =
            [&bridge, &before.certificate, &next.certificate].map(|der| X509Certificate::from_der(der).unwrap());
        assert_eq!(bridge.subject().as_raw(), next.subject().as_raw());
        assert_eq!(bridge.public_key().raw, next.public_key().raw);
        assert_eq!(bridge.issuer().as_raw(), before.subject().as_raw());
        bridge.verify_signature(Some(before.public_key())).unwrap();
        assert_eq!(bridge.validity().not_after.timestamp(), unix(end));
        let constraints = bridge.basic_constraints().unwrap().unwrap().value;
        assert_eq!((constraints.ca, constraints.path_len_constraint), (true, Some(1)));
        assert!(bridge.key_usage().unwrap().unwrap().value.key_cert_sign());
        assert_ne!(bridge.raw_serial(), next.raw_serial());
    }

    #[test]
    fn there_is_no_bridge_to_a_root_of_another_name() {
        let lifetimes = Lifetimes::default();
        let (before, next) = (chain(&lifetimes).0, chain(&lifetimes).0);
        let end = now() + lifetimes.bridge;
        let made = before.bridge_to(("another", &next.certificate), &domain(), end, now());
        assert!(matches!(made, Err(AuthorityError::Bridge { .. })));
    }

    #[test]
    fn nothing_outlives_its_issuer() {
        let lifetimes = Lifetimes::default();
        let (root, intermediate) = chain(&lifetimes);
        let key = KeyPair::generate().unwrap();
        let id = SpiffeId::pki(&domain());
        let late = intermediate.not_after - Duration::from_secs(3600);
        let issued = intermediate.issue(&id, &key, Duration::from_secs(86_400), late).unwrap();
        assert_eq!(issued.not_after, intermediate.not_after - lifetimes.skew);
        let gone = intermediate.issue(&id, &key, Duration::from_secs(60), intermediate.not_after - lifetimes.skew);
        assert!(matches!(gone, Err(AuthorityError::Ending { .. })));
        let near_the_end = root.not_after - Duration::from_secs(86_400);
        let short = Authority::new_intermediate(&root, &domain(), &Lifetimes::default(), near_the_end).unwrap();
        assert_eq!(short.not_after, root.not_after - lifetimes.skew);
    }
}
