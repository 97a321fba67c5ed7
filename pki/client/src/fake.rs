//! An authority in memory with the same certificate profile as the real one. For tests only: it permits everything.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_identity::{Bundle, SpiffeId, TrustDomain, inspect_svid};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::{Credentials, Federated, Federation, Svid};

const HOUR: Duration = Duration::from_secs(3600);

/// Root and intermediate of one trust domain. Two instances of one domain do not trust each other.
pub struct FakeCa {
    trust_domain: TrustDomain,
    root: CertificateDer<'static>,
    intermediate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl FakeCa {
    pub fn new(trust_domain: impl Borrow<TrustDomain>) -> FakeCa {
        let trust_domain = trust_domain.borrow().clone();
        let root_params = authority_params(&trust_domain, "root", BasicConstraints::Unconstrained);
        let root_key = KeyPair::generate().expect("a P-256 key can be made");
        let root = root_params.self_signed(&root_key).expect("a fixed profile can be signed");
        let root_issuer = Issuer::new(root_params, root_key);
        let params = authority_params(&trust_domain, "ca", BasicConstraints::Constrained(0));
        let key = KeyPair::generate().expect("a P-256 key can be made");
        let intermediate = params.signed_by(&key, &root_issuer).expect("a fixed profile can be signed");
        FakeCa {
            trust_domain,
            root: root.der().clone(),
            intermediate: intermediate.der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate valid for the next 24 hours.
    pub fn svid(&self, id: &SpiffeId) -> Arc<Svid> {
        let now = SystemTime::now();
        self.svid_between(id, now - HOUR, now + 24 * HOUR)
    }

    /// A certificate that ended an hour ago.
    pub fn expired_svid(&self, id: &SpiffeId) -> Arc<Svid> {
        let now = SystemTime::now();
        self.svid_between(id, now - 25 * HOUR, now - HOUR)
    }

    /// A certificate with the given life. The id may be of any trust domain: the fake checks nothing.
    pub fn svid_between(&self, id: &SpiffeId, not_before: SystemTime, not_after: SystemTime) -> Arc<Svid> {
        let key = KeyPair::generate().expect("a P-256 key can be made");
        let params = leaf_params(id, not_before, not_after);
        let leaf = params.signed_by(&key, &self.issuer).expect("a fixed profile can be signed");
        let info = inspect_svid(leaf.der()).expect("the fake follows the leaf profile");
        Arc::new(Svid {
            id: info.id,
            chain: vec![leaf.der().clone(), self.intermediate.clone()],
            key: Arc::new(PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()))),
            issued_at: info.not_before,
            not_before: info.not_before,
            not_after: info.not_after,
            serial: info.serial,
        })
    }

    pub fn bundle(&self) -> Bundle {
        Bundle::new(self.trust_domain.clone(), 1, 300, vec![self.root.to_vec()]).expect("one root is a bundle")
    }

    pub fn credentials(&self, host_id: &str, ids: &[SpiffeId]) -> Credentials {
        let host = SpiffeId::host(&self.trust_domain, host_id).expect("a test names a valid host id");
        Credentials {
            trust_domain: self.trust_domain.clone(),
            host_id: host_id.to_owned(),
            bundle: self.bundle(),
            host: self.svid(&host),
            workloads: ids.iter().map(|id| (id.clone(), self.svid(id))).collect(),
            refused: BTreeMap::new(),
            selectors: BTreeMap::new(),
            hints: BTreeMap::new(),
            banned: false,
            federation: Federation::default(),
            pki: vec!["127.0.0.1:15012".to_owned()],
        }
    }

    /// What a host is told whose identities `ids` have to do with this trust domain.
    pub fn federated_for(&self, ids: &[SpiffeId]) -> Federation {
        let identities = ids.iter().cloned().collect();
        let one = Federated { bundle: self.bundle(), identities, since: SystemTime::now() };
        Federation { revision: 1, domains: BTreeMap::from([(self.trust_domain.clone(), one)]), ..Federation::default() }
    }
}

fn authority_params(trust_domain: &TrustDomain, kind: &str, constraints: BasicConstraints) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.distinguished_name.push(DnType::CommonName, format!("fake {kind} {:016x}", fastrand::u64(..)));
    let id = format!("{:032x}", fastrand::u128(..));
    params.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 5]), id);
    params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))];
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial().into());
    params.not_before = (now - 60 * 24 * HOUR).into();
    params.not_after = (now + 365 * 24 * HOUR).into();
    params
}

fn leaf_params(id: &SpiffeId, not_before: SystemTime, not_after: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![uri(id.as_str())];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial().into());
    params.not_before = not_before.into();
    params.not_after = not_after.into();
    params
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("SPIFFE IDs are ASCII"))
}

fn serial() -> Vec<u8> {
    // The top bit stays clear: a serial is a positive integer.
    (fastrand::u128(..) >> 1 | 1 << 126).to_be_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_hold_what_was_asked_for() {
        let domain: TrustDomain = "prod.example.org".parse().unwrap();
        let ca = FakeCa::new(&domain);
        let id = SpiffeId::workload(&domain, "shop", "payments").unwrap();
        let credentials = ca.credentials("web", std::slice::from_ref(&id));
        assert_eq!(credentials.host.id.short(), "ns/meshd-system/sa/web");
        let svid = &credentials.workloads[&id];
        assert_eq!(inspect_svid(&svid.chain[0]).unwrap().id, id);
        assert!(svid.not_after > SystemTime::now());
        assert!(ca.expired_svid(&id).not_after < SystemTime::now());
    }
}
