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
        let mut authorities = Vec::new();
        let mut signed_by = vec![parsed.issuer().as_raw().to_vec()];
        for issuer in issuers {
            let (_, parsed) = X509Certificate::from_der(issuer).ok()?;
            authorities.push(sha256(parsed.public_key().raw));
            signed_by.push(parsed.issuer().as_raw().to_vec());
        }
        let roots = roots.into_iter().filter_map(|root| X509Certificate::from_der(root).ok());
        // Not that of the last alone: the peer may append what it likes.
        let signers = roots.filter(|(_, root)| signed_by.iter().any(|issuer| issuer == root.subject().as_raw()));
        authorities.extend(signers.map(|(_, root)| sha256(root.public_key().raw)));
        Some(Marks { id: info.id, serial: info.serial, authorities })
    }
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
}
