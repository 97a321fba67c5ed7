//! Recovery keys and what their holders have said.

use data_encoding::{BASE64, HEXLOWER};
use meshd_identity::signed::{self, VerifyingKey};
use meshd_identity::statements::RecoveryStatement;
use meshd_identity::{Bundle, sha256};
use meshd_pki_api::admin as wire;

use super::{AdminError, Desk, done, time};
use crate::audit::Event;
use crate::store::{Records, View, bundles, settings};
use crate::times::unix;

impl Desk<'_> {
    pub(super) fn recovery_show(&self) -> Result<wire::Recovery, AdminError> {
        let (keys, statements) = self.state.database.read(|view| -> Result<_, AdminError> {
            Ok((settings::recovery_keys(view)?, settings::recovery_statements(view)?))
        })?;
        let statements = statements.iter().filter_map(|jws| content(jws)).map(|one| {
            let next_key_id = one.next_key.and_then(|key| BASE64.decode(key.as_bytes()).ok()).map(|key| id(&key));
            let bundle_sequence = one.bundle.map(|bundle| bundle.sequence);
            wire::RecoveryStatement { issued: time(one.issued_at), bundle_sequence, next_key_id }
        });
        Ok(wire::Recovery { key_ids: keys.iter().map(|key| id(key)).collect(), statements: statements.collect() })
    }

    pub(super) fn recovery_request(&self) -> Result<wire::RecoveryWish, AdminError> {
        let bundle = self.state.latest_bundle()?;
        let keys = self.state.database.read(settings::recovery_keys)?;
        let key = keys.first().ok_or_else(|| self.state.incomplete("its recovery key"))?;
        Ok(wire::RecoveryWish {
            trust_domain: self.state.trust_domain.to_string(),
            bundle_sequence: bundle.sequence,
            bundle_sha256: HEXLOWER.encode(&bundle.digest()),
            next_key: BASE64.encode(key),
        })
    }

    pub(super) fn recovery_import(&self, asked: &wire::RecoveryImport) -> Result<wire::Done, AdminError> {
        let invalid = |text: &str| AdminError::Invalid(text.to_owned());
        let signer = BASE64.decode(asked.signed_by.as_bytes()).ok();
        let signer = signer.ok_or_else(|| invalid("the key that signed the statement is not base64"))?;
        let key = VerifyingKey::from_spki(&signer).ok_or_else(|| invalid("the key that signed is not P-256"))?;
        let statement: RecoveryStatement = signed::verify(&asked.statement, &[key])
            .map_err(|error| AdminError::Invalid(format!("the statement is not taken over: {error}")))?;
        self.change(|records, told| {
            self.check_statement(records, &statement)?;
            let keys = settings::recovery_keys(records)?;
            match keys.iter().position(|known| *known == signer) {
                Some(position) => {
                    self.check_succession(records, &statement)?;
                    settings::set_recovery_keys(records, &succeeded(&keys[position..], &statement)?)?;
                }
                None => self.check_foreign(&statement, &keys)?,
            }
            let mut statements = settings::recovery_statements(records)?;
            statements.push(asked.statement.clone());
            settings::set_recovery_statements(records, &statements)?;
            if statement.bundle.is_some() && settings::recovered_at(records)?.is_none() {
                settings::set_recovered_at(records, unix(self.now))?;
            }
            let detail = Some(format!("signed by recovery key {}: {}", id(&signer), self.says(&asked.statement)));
            told.push(Event { event: "recovery_import", result: "ok", detail, ..Event::default() });
            Ok(())
        })?;
        let follows =
            "hosts that pin the key take it over when they report next, those that were away when they return";
        Ok(done(format!("the statement is served: {}", self.says(&asked.statement)), vec![follows.to_owned()]))
    }

    fn says(&self, jws: &str) -> String {
        let Some(statement) = content(jws) else { return String::new() };
        let bundle = statement.bundle.map(|bundle| format!("trust bundle {}", bundle.sequence));
        let next = statement.next_key.and_then(|key| BASE64.decode(key.as_bytes()).ok());
        let next = next.map(|key| format!("the next recovery key is {}", id(&key)));
        bundle.into_iter().chain(next).collect::<Vec<_>>().join("; ")
    }

    /// Hosts would refuse it, or it would lead them nowhere.
    fn check_statement(&self, records: &mut dyn Records, statement: &RecoveryStatement) -> Result<(), AdminError> {
        let invalid = |text: String| Err(AdminError::Invalid(text));
        let domain = &self.state.trust_domain;
        if statement.trust_domain != *domain {
            return invalid(format!("the statement is for `{}`, this PKI is `{domain}`", statement.trust_domain));
        }
        if statement.bundle.is_none() && statement.next_key.is_none() {
            return invalid("the statement says nothing: neither a bundle nor a next key".to_owned());
        }
        let (issued, now) = (statement.issued_at, unix(self.now));
        if issued > now + self.skew() {
            let (issued, now) = (time(issued), time(now));
            return invalid(format!(
                "the statement is from {issued}, it is {now} here: hosts would hear no later one until then; set the \
                 clock where it was signed, and sign again"
            ));
        }
        let earlier = settings::recovery_statements(records)?;
        let last = earlier.iter().filter_map(|jws| content(jws)).map(|one| one.issued_at).max();
        if let Some(last) = last.filter(|last| *last >= issued) {
            return invalid(format!(
                "the statement is from {}, one from {} is served already: hosts hear only later ones; sign again",
                time(issued),
                time(last)
            ));
        }
        if let Some(named) = &statement.bundle {
            let stored = bundles::bundle(records, named.sequence)?;
            let bundle = stored.and_then(|one| Bundle::from_jwks(domain.clone(), one.jwks.as_bytes()).ok());
            if bundle.is_none_or(|bundle| HEXLOWER.encode(&bundle.digest()) != named.sha256) {
                return invalid(format!(
                    "this PKI never had the bundle {} that the statement names; sign what `meshd-pki recovery request` \
                     of this PKI says",
                    named.sequence
                ));
            }
        }
        Ok(())
    }

    /// A running host is told the last statement alone: of two successions within a day it could miss the first, and
    /// would go on pinning the key before it.
    fn check_succession(&self, view: &mut dyn View, statement: &RecoveryStatement) -> Result<(), AdminError> {
        let heard_after = self.longest_leaf(view)?;
        let earlier = settings::recovery_statements(view)?;
        let last = earlier.iter().filter_map(|jws| content(jws)).rfind(|one| one.next_key.is_some());
        let Some(last) = last.filter(|last| statement.next_key.is_some() && last.next_key != statement.next_key) else {
            return Ok(());
        };
        let until = last.issued_at + heard_after;
        if until <= unix(self.now) {
            return Ok(());
        }
        Err(AdminError::NotNow(format!(
            "another recovery key was named at {}, and hosts that are away have not heard of it: import this statement \
             after {}",
            time(last.issued_at),
            time(until)
        )))
    }

    /// Signed with a key this PKI never had: that of one that was lost.
    fn check_foreign(&self, statement: &RecoveryStatement, keys: &[Vec<u8>]) -> Result<(), AdminError> {
        let own = keys.first().map(|key| BASE64.encode(key));
        if statement.bundle.is_some() && statement.next_key.is_some() && statement.next_key == own {
            return Ok(());
        }
        let why = "the statement is signed with a recovery key that this PKI does not know; of such, only one that names \
                   this PKI's bundle and recovery key is taken over: sign what `meshd-pki recovery request` says";
        Err(AdminError::Invalid(why.to_owned()))
    }
}

/// Whoever signed is the current key, and whom it names is next: as hosts have it. `from` begins with the signer.
fn succeeded(from: &[Vec<u8>], statement: &RecoveryStatement) -> Result<Vec<Vec<u8>>, AdminError> {
    let Some(next) = &statement.next_key else { return Ok(from.to_vec()) };
    let next = BASE64.decode(next.as_bytes()).ok().filter(|spki| VerifyingKey::from_spki(spki).is_some());
    let next = next.ok_or_else(|| AdminError::Invalid("the next key in the statement is no P-256 key".to_owned()))?;
    if next == from[0] {
        return Ok(from.to_vec());
    }
    Ok(vec![from[0].clone(), next])
}

/// Of a statement whose signature was verified when it was taken over.
fn content(jws: &str) -> Option<RecoveryStatement> {
    let payload = jws.split('.').nth(1)?;
    serde_json::from_slice(&data_encoding::BASE64URL_NOPAD.decode(payload.as_bytes()).ok()?).ok()
}

fn id(spki: &[u8]) -> String {
    HEXLOWER.encode(&sha256(spki))
}
