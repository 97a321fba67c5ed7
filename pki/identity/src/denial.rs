//! Holds a certificate against a deny set.

use std::collections::HashSet;

use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::statements::{DenySet, Whom};
use crate::{SpiffeId, inspect_svid, sha256};

/// What a chain that was verified can be denied by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    pub id: SpiffeId,
    /// Of the leaf, lower-case hexadecimal.
    pub serial: String,
    /// SHA-256 of the SubjectPublicKeyInfo of each authority, the root's included.
    pub authorities: Vec<[u8; 32]>,
}

impl Marks {
    /// `chain` is leaf first, without the root, which is found among `roots`. `None` for what is no X.509-SVID.
    pub fn read<'a>(chain: &[&[u8]], roots: impl IntoIterator<Item = &'a [u8]>) -> Option<Marks> {
        let (leaf, issuers) = chain.split_first()?;
        let info = inspect_svid(leaf).ok()?;
        let (_, parsed) = X509Certificate::from_der(leaf).ok()?;
        let roots = roots.into_iter().filter_map(|root| X509Certificate::from_der(root).ok()).map(|(_, root)| root);
        let roots: Vec<X509Certificate<'_>> = roots.collect();
        let mut authorities = Vec::new();
        let mut signed_by = vec![parsed.issuer().as_raw().to_vec()];
        for issuer in issuers {
            let (_, parsed) = X509Certificate::from_der(issuer).ok()?;
            authorities.push(sha256(parsed.public_key().raw));
            // A bridge to a root that is believed anyhow needs nobody above it.
            if !roots.iter().any(|root| is_same_authority(root, &parsed)) {
                signed_by.push(parsed.issuer().as_raw().to_vec());
            }
        }
        // Not that of the last alone: the peer may append what it likes.
        let signers = roots.iter().filter(|root| signed_by.iter().any(|issuer| issuer == root.subject().as_raw()));
        authorities.extend(signers.map(|root| sha256(root.public_key().raw)));
        Some(Marks { id: info.id, serial: info.serial, authorities })
    }
}

/// Name and key: whatever one of them has signed the other has.
fn is_same_authority(a: &X509Certificate<'_>, b: &X509Certificate<'_>) -> bool {
    a.subject().as_raw() == b.subject().as_raw() && a.public_key().raw == b.public_key().raw
}

/// A deny set, made for looking up.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct DenyIndex {
    pub sequence: u64,
    identities: HashSet<SpiffeId>,
    serials: HashSet<String>,
    authorities: HashSet<[u8; 32]>,
}

impl DenyIndex {
    /// Entries count until the PKI takes them out: whether their time is over is for the PKI's clock to say.
    pub fn of(set: &DenySet) -> DenyIndex {
        let mut index = DenyIndex { sequence: set.sequence, ..DenyIndex::default() };
        for entry in &set.entries {
            match &entry.whom {
                Whom::Identity(id) => _ = index.identities.insert(id.clone()),
                Whom::Serial(serial) => _ = index.serials.insert(serial.clone()),
                Whom::Authority(key) => {
                    let key = data_encoding::HEXLOWER.decode(key.as_bytes()).ok();
                    index.authorities.extend(key.and_then(|key| <[u8; 32]>::try_from(key).ok()));
                }
            }
        }
        index
    }

    pub fn denies(&self, marks: &Marks) -> bool {
        self.identities.contains(&marks.id) || self.denies_certificate(marks)
    }

    /// Whether this certificate is denied, be its identity what it is: with another the identity may be good.
    pub fn denies_certificate(&self, marks: &Marks) -> bool {
        self.serials.contains(&marks.serial) || marks.authorities.iter().any(|key| self.authorities.contains(key))
    }

    pub fn len(&self) -> usize {
        self.identities.len() + self.serials.len() + self.authorities.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
        SanType,
    };

    use super::*;
    use crate::statements::Denied;

    fn marks() -> Marks {
        let id = "spiffe://prod.example.org/ns/shop/sa/payments".parse().unwrap();
        Marks { id, serial: "0abc".to_owned(), authorities: vec![[1; 32], [2; 32]] }
    }

    fn index(whom: Whom) -> DenyIndex {
        let entries = vec![Denied { whom, until: 0 }];
        DenyIndex::of(&DenySet { trust_domain: "prod.example.org".parse().unwrap(), sequence: 5, entries })
    }

    #[test]
    fn identity_serial_and_every_authority_count() {
        let hex = |byte: u8| data_encoding::HEXLOWER.encode(&[byte; 32]);
        for whom in
            [Whom::Identity(marks().id), Whom::Serial(marks().serial), Whom::Authority(hex(1)), Whom::Authority(hex(2))]
        {
            assert!(index(whom.clone()).denies(&marks()), "{whom:?}");
        }
        let other = "spiffe://prod.example.org/ns/shop/sa/other".parse().unwrap();
        for whom in [Whom::Identity(other), Whom::Serial("0abd".to_owned()), Whom::Authority(hex(3))] {
            assert!(!index(whom.clone()).denies(&marks()), "{whom:?}");
        }
        assert!(!DenyIndex::default().denies(&marks()));
        assert_eq!(index(Whom::Authority("not hexadecimal".to_owned())).len(), 0);
    }

    fn named(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    /// The leaf of an intermediate under a root of this name, and that intermediate.
    fn under(root: &str, root_key: &KeyPair) -> [Vec<u8>; 2] {
        let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let ca = named("ca").signed_by(&ca_key, &Issuer::new(named(root), root_key)).unwrap();
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI(marks().id.as_str().try_into().unwrap())];
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = leaf.signed_by(&key, &Issuer::new(named("ca"), ca_key)).unwrap();
        [leaf.der().to_vec(), ca.der().to_vec()]
    }

    #[test]
    fn a_bridge_counts_only_where_the_root_it_leads_to_is_not_believed_anyhow() {
        let [old, new, impostor] = [(); 3].map(|()| KeyPair::generate().unwrap());
        let (old_root, new_root) = (named("old").self_signed(&old).unwrap(), named("new").self_signed(&new).unwrap());
        let bridge_to = |key: &KeyPair| named("new").signed_by(key, &Issuer::new(named("old"), &old)).unwrap();
        let key_of = |key: &KeyPair| sha256(&rcgen::PublicKeyData::subject_public_key_info(key));
        // Whether the old root is among the authorities above a chain.
        let is_under_old = |chain: [Vec<u8>; 2], above: &[u8], roots: &[&[u8]]| {
            let marks = Marks::read(&[&chain[0], &chain[1], above], roots.iter().copied()).unwrap();
            marks.authorities.contains(&key_of(&old))
        };
        let both: [&[u8]; 2] = [old_root.der(), new_root.der()];
        assert!(!is_under_old(under("new", &new), bridge_to(&new).der(), &both));
        assert!(is_under_old(under("new", &new), bridge_to(&new).der(), &both[..1]), "it is the only way");
        assert!(
            is_under_old(under("new", &impostor), bridge_to(&impostor).der(), &both),
            "a thief's, by the name alone"
        );
        assert!(
            is_under_old(under("old", &old), bridge_to(&new).der(), &both),
            "a thief's, with a true bridge appended"
        );
    }
}
