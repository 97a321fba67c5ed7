//! Keys that outlive the PKI: what their holders say is believed even when nothing else can be.

use data_encoding::BASE64;
use meshd_identity::signed::{self, SignedError, VerifyingKey};
use meshd_identity::statements::{BundleStatement, RecoveryStatement};
use meshd_identity::{Bundle, TrustDomain};

/// The recovery keys this host believes, and how far it has heard them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pins {
    /// SubjectPublicKeyInfo of each, current first; at most two.
    pub(crate) keys: Vec<Vec<u8>>,
    /// When the newest statement that was taken over was made, in seconds since 1970.
    pub(crate) heard_at: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecoveryError {
    #[error("a recovery statement is not signed by a recovery key this host pins: {0}")]
    Signed(#[from] SignedError),
    #[error("a recovery statement is for the trust domain `{0}`, this host belongs to another")]
    Domain(TrustDomain),
    #[error("a recovery statement names a next key that is none")]
    NextKey,
}

impl Pins {
    pub(crate) fn new(keys: Vec<Vec<u8>>) -> Pins {
        Pins { keys, heard_at: 0 }
    }

    /// Reads a statement without believing it yet; `None` when it is older than what was heard.
    pub(crate) fn read(&self, jws: &str, domain: &TrustDomain) -> Result<Option<RecoveryStatement>, RecoveryError> {
        let keys: Vec<VerifyingKey> = self.keys.iter().filter_map(|spki| VerifyingKey::from_spki(spki)).collect();
        let statement: RecoveryStatement = signed::verify(jws, &keys)?;
        if statement.trust_domain != *domain {
            return Err(RecoveryError::Domain(statement.trust_domain));
        }
        Ok(Some(statement).filter(|statement| statement.issued_at > self.heard_at))
    }

    /// Takes over what a statement says about keys: whoever signed is the current key, and the one it names is next.
    pub(crate) fn hear(&mut self, jws: &str, statement: &RecoveryStatement) -> Result<(), RecoveryError> {
        let next = match &statement.next_key {
            Some(text) => Some(next_key(text)?),
            None => None,
        };
        let signer = self.keys.iter().position(|spki| {
            let key = VerifyingKey::from_spki(spki);
            key.is_some_and(|key| signed::verify::<RecoveryStatement>(jws, &[key]).is_ok())
        });
        self.keys.drain(..signer.unwrap_or(0));
        if let Some(next) = next.filter(|next| self.keys.first() != Some(next)) {
            self.keys.truncate(1);
            self.keys.push(next);
        }
        self.heard_at = statement.issued_at;
        Ok(())
    }
}

fn next_key(text: &str) -> Result<Vec<u8>, RecoveryError> {
    let spki = BASE64.decode(text.as_bytes()).map_err(|_| RecoveryError::NextKey)?;
    VerifyingKey::from_spki(&spki).ok_or(RecoveryError::NextKey)?;
    Ok(spki)
}

/// The bundle a statement leads to, when that is not where the host is already. Sequences are times in milliseconds: a
/// held one from the future was made by somebody who wanted to be the last, and does not stand against the statement.
pub(crate) fn leads_to<'a>(
    statement: &'a RecoveryStatement,
    held: &Bundle,
    now_ms: u64,
) -> Option<&'a BundleStatement> {
    const DAY_MS: u64 = 86_400_000;
    let is_absurd = held.sequence > now_ms.saturating_add(DAY_MS);
    statement.bundle.as_ref().filter(|named| named.sequence > held.sequence || is_absurd)
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PublicKeyData};

    use super::*;
    use crate::fake::FakeCa;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn statement(issued_at: i64, next: Option<&KeyPair>) -> RecoveryStatement {
        let next_key = next.map(|key| BASE64.encode(&key.subject_public_key_info()));
        RecoveryStatement { trust_domain: domain(), issued_at, bundle: None, next_key }
    }

    fn sign(key: &KeyPair, statement: &RecoveryStatement) -> String {
        signed::sign(&key.serialize_der(), statement).unwrap()
    }

    fn hear(pins: &mut Pins, key: &KeyPair, statement: &RecoveryStatement) -> Result<bool, RecoveryError> {
        let jws = sign(key, statement);
        match pins.read(&jws, &domain())? {
            Some(read) => pins.hear(&jws, &read).map(|()| true),
            None => Ok(false),
        }
    }

    #[test]
    fn a_key_is_succeeded_in_two_statements_and_the_first_is_then_worth_nothing() {
        let [first, second, third] = [(); 3].map(|()| KeyPair::generate().unwrap());
        let mut pins = Pins::new(vec![first.subject_public_key_info()]);
        assert!(hear(&mut pins, &first, &statement(10, Some(&second))).unwrap());
        assert_eq!(pins.keys, [first.subject_public_key_info(), second.subject_public_key_info()]);
        assert!(hear(&mut pins, &second, &statement(20, Some(&third))).unwrap());
        assert_eq!(pins.keys, [second.subject_public_key_info(), third.subject_public_key_info()]);
        let error = hear(&mut pins, &first, &statement(30, None)).unwrap_err().to_string();
        assert!(error.contains("not signed by a recovery key this host pins"), "{error}");
    }

    #[test]
    fn statements_are_heard_once_and_never_backwards() {
        let key = KeyPair::generate().unwrap();
        let mut pins = Pins::new(vec![key.subject_public_key_info()]);
        assert!(hear(&mut pins, &key, &statement(10, None)).unwrap());
        assert!(!hear(&mut pins, &key, &statement(10, None)).unwrap());
        assert!(!hear(&mut pins, &key, &statement(9, Some(&KeyPair::generate().unwrap()))).unwrap());
        assert_eq!(pins, Pins { keys: vec![key.subject_public_key_info()], heard_at: 10 });
    }

    #[test]
    fn strangers_other_domains_and_keys_that_are_none_are_refused() {
        let key = KeyPair::generate().unwrap();
        let mut pins = Pins::new(vec![key.subject_public_key_info()]);
        let before = pins.clone();
        assert!(hear(&mut pins, &KeyPair::generate().unwrap(), &statement(10, None)).is_err());
        let foreign = RecoveryStatement { trust_domain: "other".parse().unwrap(), ..statement(10, None) };
        assert!(matches!(hear(&mut pins, &key, &foreign), Err(RecoveryError::Domain(_))));
        let broken = RecoveryStatement { next_key: Some("AAAA".to_owned()), ..statement(10, None) };
        assert_eq!(hear(&mut pins, &key, &broken), Err(RecoveryError::NextKey));
        assert_eq!(pins, before);
    }

    #[test]
    fn a_statement_leads_forward_and_past_sequences_of_the_future() {
        let bundle = FakeCa::new(domain()).bundle();
        let naming = |sequence| RecoveryStatement {
            bundle: Some(BundleStatement { sequence, ..BundleStatement::about(&bundle) }),
            ..statement(10, None)
        };
        let mut held = bundle.clone();
        held.sequence = 100;
        assert!(leads_to(&naming(101), &held, 1000).is_some());
        assert!(leads_to(&naming(100), &held, 1000).is_none());
        held.sequence = u64::MAX;
        assert!(leads_to(&naming(101), &held, 1000).is_some());
    }
}
