//! The roots and JWT keys of a trust domain, and the way each of them goes.

use serde::{Deserialize, Serialize};

use super::bridge::Bridge;
use crate::store::base64;

const RETIRED_KEPT: usize = 8;

/// Everything the bundle is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trust {
    /// Of the bundle in force.
    pub(crate) sequence: u64,
    pub(crate) refresh_hint_s: u64,
    /// In the order in which they were prepared.
    pub(crate) roots: Vec<Root>,
    #[serde(default)]
    pub(crate) jwt_keys: Vec<JwtKey>,
    /// The operator asked for a new root now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) urgent: Option<Urgency>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Root {
    pub(crate) id: String,
    pub(crate) state: RootState,
    #[serde(with = "base64")]
    pub(crate) certificate: Vec<u8>,
    /// Empty when it was destroyed, or never was here.
    #[serde(with = "base64", default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) wrapped_key: Vec<u8>,
    /// The first bundle with it, and when that came into force.
    pub(crate) published_sequence: u64,
    pub(crate) published_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) activated_at: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) removed_at: Option<i64>,
    /// Its key may be known to others: it goes as soon as nobody depends on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tainted_at: Option<i64>,
    pub(crate) not_after: i64,
    /// Its key is with an authority outside, which signed this for us.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) upstream: Option<Upstream>,
    /// For verifiers that know the root before it, and not yet this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bridge: Option<Bridge>,
}

/// An intermediate from outside: all servers sign with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Upstream {
    pub(crate) id: String,
    #[serde(with = "base64")]
    pub(crate) certificate: Vec<u8>,
    /// Empty when it signs no more.
    #[serde(with = "base64", default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) wrapped_key: Vec<u8>,
    /// The earlier end of it and its root.
    pub(crate) not_after: i64,
}

/// The way of a root. Every arrow is one transaction; there is no way back, but that an authority outside may bring
/// another intermediate under a root that is old or has left: then it is prepared again.
///
/// ```text
/// prepared ---> active ---> old ---> removed ---> retired
///     \ \___________________^ (*)        ^
///      \________________________________/  (tainted before it was ever used)
/// ```
///
/// (*) One of our own, while the active root is from outside: it only signs what hosts are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum RootState {
    /// In the bundle, signs nothing yet: it waits until every verifier is known to trust it.
    Prepared,
    /// Signs intermediates. At most one.
    Active,
    /// In the bundle, signs no certificates any more: some under it are still out there.
    Old,
    /// Not in the bundle. Its key has signed the bundle without it, for hosts that know nothing newer.
    Removed,
    /// Its key is destroyed.
    Retired,
}

impl RootState {
    pub(crate) fn is_in_bundle(self) -> bool {
        matches!(self, RootState::Prepared | RootState::Active | RootState::Old)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            RootState::Prepared => "prepared",
            RootState::Active => "active",
            RootState::Old => "old",
            RootState::Removed => "removed",
            RootState::Retired => "retired",
        }
    }
}

/// Not by the calendar: as soon as every live host has the new root, or without waiting for the last of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Urgency {
    pub(crate) since: i64,
    /// Hosts that do not have the new root yet are cut off until they fetch it.
    pub(crate) force: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JwtKey {
    pub(crate) kid: String,
    /// SubjectPublicKeyInfo.
    #[serde(with = "base64")]
    pub(crate) public_key: Vec<u8>,
    #[serde(with = "base64", default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) wrapped_key: Vec<u8>,
    pub(crate) published_at: i64,
    /// From when on it may sign.
    pub(crate) usable_at: i64,
    pub(crate) not_after: i64,
}

impl Trust {
    pub(crate) fn in_state(&self, state: RootState) -> Option<&Root> {
        self.roots.iter().find(|root| root.state == state)
    }

    pub(crate) fn active(&self) -> Option<&Root> {
        self.in_state(RootState::Active)
    }

    /// Whose key signs what hosts are told: the active root's, and while that is from outside the newest of our own.
    pub(crate) fn speaker(&self) -> Option<&Root> {
        let with_key = |root: &&Root| !root.wrapped_key.is_empty();
        let ours = || self.in_bundle().filter(with_key);
        let known = || ours().filter(|root| root.state != RootState::Prepared);
        let untainted = || known().filter(|root| root.tainted_at.is_none());
        self.active()
            .filter(with_key)
            .or_else(|| untainted().last().or_else(|| known().last()).or_else(|| ours().last()))
    }

    /// What hosts are told is signed by this root from now on; certificates are not.
    pub(crate) fn speak(&mut self, id: &str) {
        for root in self.roots.iter_mut().filter(|root| root.id == id) {
            root.state = RootState::Old;
        }
    }

    pub(crate) fn in_bundle(&self) -> impl Iterator<Item = &Root> {
        self.roots.iter().filter(|root| root.state.is_in_bundle())
    }

    /// The root signs from now on, and the one that did until now does not.
    pub(crate) fn activate(&mut self, id: &str, now: i64) {
        for root in &mut self.roots {
            if root.state == RootState::Active {
                root.state = RootState::Old;
                // It signs no more, and what it has signed verifies without.
                if let Some(given) = &mut root.upstream {
                    given.wrapped_key.clear();
                }
            }
            if root.id == id {
                root.state = RootState::Active;
                root.activated_at = Some(now);
            }
        }
        self.urgent = None;
    }

    pub(crate) fn remove(&mut self, id: &str, now: i64) {
        for root in self.roots.iter_mut().filter(|root| root.id == id) {
            root.state = RootState::Removed;
            root.removed_at = Some(now);
            root.upstream = None;
        }
    }

    /// Destroys the root's key. A few retired roots stay on record, to show what was.
    pub(crate) fn retire(&mut self, id: &str) {
        for root in self.roots.iter_mut().filter(|root| root.id == id) {
            root.state = RootState::Retired;
            root.wrapped_key.clear();
        }
        let is_retired = |root: &Root| root.state == RootState::Retired;
        let mut surplus = self.roots.iter().filter(|root| is_retired(root)).count().saturating_sub(RETIRED_KEPT);
        self.roots.retain(|root| {
            let goes = is_retired(root) && surplus > 0;
            surplus -= usize::from(goes);
            !goes
        });
    }

    /// The key that signs JWT-SVIDs now: the newest that everybody has had time to learn.
    pub(crate) fn jwt_signer(&self, now: i64) -> Option<&JwtKey> {
        let usable = self.jwt_keys.iter().filter(|key| key.usable_at <= now && now < key.not_after);
        usable.max_by_key(|key| key.usable_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_an_intermediate_from_outside_goes_when_its_root_signs_no_more() {
        let upstream =
            || Some(Upstream { id: "i".to_owned(), certificate: vec![1], wrapped_key: vec![2], not_after: 10 });
        let root = |id: &str, state| Root {
            id: id.to_owned(),
            state,
            certificate: vec![],
            wrapped_key: vec![],
            published_sequence: 1,
            published_at: 0,
            activated_at: None,
            removed_at: None,
            tainted_at: None,
            not_after: 10,
            upstream: upstream(),
            bridge: None,
        };
        let roots = vec![root("first", RootState::Active), root("second", RootState::Prepared)];
        let mut trust = Trust { roots, ..Trust::default() };
        trust.activate("second", 1);
        let keys: Vec<usize> =
            trust.roots.iter().filter_map(|root| Some(root.upstream.as_ref()?.wrapped_key.len())).collect();
        assert_eq!(keys, [0, 1], "the one in use has its key");
        trust.remove("first", 2);
        assert_eq!(trust.roots[0].upstream, None);
    }
}
