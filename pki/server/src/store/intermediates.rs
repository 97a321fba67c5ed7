//! Intermediates: each replica of the PKI signs with its own.

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, base64, decode, encode, list, put};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Intermediate {
    pub(crate) id: String,
    pub(crate) replica: String,
    /// The root that signed it.
    pub(crate) root: String,
    #[serde(with = "base64")]
    pub(crate) certificate: Vec<u8>,
    /// Destroyed when it is replaced: what it signed verifies without.
    #[serde(with = "base64", default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) wrapped_key: Vec<u8>,
    pub(crate) activated_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) replaced_at: Option<i64>,
    pub(crate) not_after: i64,
    /// The longest life a leaf under it can have, in seconds.
    pub(crate) longest_leaf_s: i64,
    /// The bundle its replica hands out, and since when it does.
    pub(crate) bundle_sequence: u64,
    pub(crate) joined_bundle_at: i64,
    /// Brought by the operator.
    #[serde(default)]
    pub(crate) from_outside: bool,
}

impl Intermediate {
    fn retire(&mut self, now: i64) {
        self.replaced_at = Some(now);
        self.wrapped_key.clear();
    }
}

fn key(one: &Intermediate) -> String {
    format!("intermediate/{}/{}", one.replica, one.id)
}

pub(crate) fn put_intermediate(records: &mut dyn Records, one: &Intermediate) -> Result<(), DbError> {
    put(records, &key(one), one)
}

/// Of all replicas, in the order of activation.
pub(crate) fn all(view: &mut dyn View) -> Result<Vec<Intermediate>, DbError> {
    let found: Vec<(String, Intermediate)> = list(view, "intermediate/")?;
    let mut all: Vec<Intermediate> = found.into_iter().map(|(_, one)| one).collect();
    all.sort_by_key(|one| one.activated_at);
    Ok(all)
}

/// What one replica signs with.
pub(crate) fn active(view: &mut dyn View, replica: &str) -> Result<Option<Intermediate>, DbError> {
    let mut of_replica = all(view)?.into_iter().filter(|one| one.replica == replica && one.replaced_at.is_none());
    Ok(of_replica.next_back())
}

/// Puts a new one in the place of all that its replica had.
pub(crate) fn replace(records: &mut dyn Records, new: &Intermediate) -> Result<(), DbError> {
    let before = all(records)?.into_iter().filter(|one| one.replica == new.replica && one.replaced_at.is_none());
    for mut old in before {
        old.retire(new.activated_at);
        put_intermediate(records, &old)?;
    }
    put_intermediate(records, new)
}

/// Nothing signs with what this replica had.
pub(crate) fn retire(records: &mut dyn Records, replica: &str, now: i64) -> Result<(), DbError> {
    for mut one in all(records)?.into_iter().filter(|one| one.replica == replica && one.replaced_at.is_none()) {
        one.retire(now);
        put_intermediate(records, &one)?;
    }
    Ok(())
}

/// Nothing signs with any of these: among all records of a PKI of which no server runs.
pub(crate) fn retire_all(records: &mut [(String, Vec<u8>)], now: i64) -> Result<(), DbError> {
    for (key, value) in records.iter_mut().filter(|(key, _)| key.starts_with("intermediate/")) {
        let mut one: Intermediate = decode(key, value)?;
        if one.replaced_at.is_none() {
            one.retire(now);
            *value = encode(key, &one)?;
        }
    }
    Ok(())
}

/// Forgets those that ended before `before`.
pub(crate) fn prune(records: &mut dyn Records, before: i64) -> Result<(), DbError> {
    // One transaction of etcd takes 128 changes; what is left goes the next time.
    for one in all(records)?.into_iter().filter(|one| one.not_after < before).take(50) {
        records.delete(&key(&one))?;
    }
    Ok(())
}
