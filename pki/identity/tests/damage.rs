//! What strangers send, nearly right: valid inputs with a few bytes changed, cut or added. Nothing panics, and nothing
//! signed is believed once it was touched.

use meshd_identity::signed::{self, VerifyingKey};
use meshd_identity::statements::BundleStatement;
use meshd_identity::{Bundle, JoinToken, Secret, SpiffeId, TrustDomain, inspect_svid};
use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, PublicKeyData, SanType};

#[derive(Debug, Clone)]
enum Damage {
    Change(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Cut(prop::sample::Index),
    /// A stretch of it many times more, as nested input has.
    Repeat(prop::sample::Index, u8),
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let at = any::<prop::sample::Index>;
    let new = prop::collection::vec(any::<u8>(), 1..9);
    let one = prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Change(at, byte)),
        2 => (at(), new).prop_map(|(at, new)| Damage::Insert(at, new)),
        1 => at().prop_map(Damage::Cut),
        1 => (at(), 1..60_u8).prop_map(|(at, times)| Damage::Repeat(at, times)),
    ];
    prop::collection::vec(one, 1..6)
}

fn damaged(valid: &[u8], all: &[Damage]) -> Vec<u8> {
    let mut bytes = valid.to_vec();
    for one in all {
        if bytes.is_empty() {
            break;
        }
        match one {
            Damage::Change(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] ^= byte;
            }
            Damage::Insert(at, new) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, new.iter().copied());
            }
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Damage::Repeat(at, times) => {
                let at = at.index(bytes.len());
                let stretch = bytes[at..bytes.len().min(at + 16)].repeat(usize::from(*times));
                bytes.splice(at..at, stretch);
            }
        }
    }
    bytes
}

fn domain() -> TrustDomain {
    "prod.example.org".parse().unwrap()
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn certificate(key: &KeyPair) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://prod.example.org/ns/shop/sa/payments".try_into().unwrap())];
    params.self_signed(key).unwrap().der().to_vec()
}

fn bundle(key: &KeyPair) -> Bundle {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("spiffe://prod.example.org".try_into().unwrap())];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(key).unwrap().der().to_vec();
    Bundle::new(domain(), 7, 300, vec![root]).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_damaged_certificate_is_read_or_refused(damage in damage()) {
        let bytes = damaged(&certificate(&key()), &damage);
        _ = inspect_svid(&bytes);
        _ = VerifyingKey::from_certificate(&bytes);
    }

    #[test]
    fn a_damaged_bundle_is_read_or_refused(damage in damage()) {
        let read = Bundle::from_jwks(domain(), &damaged(&bundle(&key()).to_jwks(), &damage));
        prop_assert!(read.is_err() || read.is_ok_and(|bundle| bundle.trust_domain == domain()));
    }

    #[test]
    fn a_damaged_token_is_another_or_none(damage in damage()) {
        let token = JoinToken {
            id: "1234".to_owned(),
            secret: Secret([7; 32]),
            pki: vec!["10.0.0.1:15012".to_owned()],
            bundle_digest: [1; 32],
            recovery_key_id: [2; 32],
        };
        if let Ok(text) = String::from_utf8(damaged(token.to_string().as_bytes(), &damage))
            && let Ok(read) = text.parse::<JoinToken>()
        {
            prop_assert_eq!(read.to_string().parse::<JoinToken>().unwrap(), read);
        }
    }

    #[test]
    fn a_damaged_identity_is_refused_or_written_as_it_was_read(damage in damage()) {
        if let Ok(text) = String::from_utf8(damaged(b"spiffe://prod.example.org/ns/shop/sa/payments", &damage))
            && let Ok(id) = text.parse::<SpiffeId>()
        {
            prop_assert_eq!(id.to_string(), text);
        }
    }

    #[test]
    fn a_damaged_statement_says_what_it_said_or_is_not_believed(damage in damage()) {
        let key = key();
        let statement = BundleStatement::about(&bundle(&key));
        let text = signed::sign(&key.serialize_der(), &statement).unwrap();
        let keys = [VerifyingKey::from_spki(&key.subject_public_key_info()).unwrap()];
        if let Ok(text) = String::from_utf8(damaged(text.as_bytes(), &damage))
            && let Ok(read) = signed::verify::<BundleStatement>(&text, &keys)
        {
            prop_assert_eq!(read, statement);
        }
    }
}
