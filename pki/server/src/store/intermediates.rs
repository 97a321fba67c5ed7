//! Intermediates: each replica of the PKI signs with its own.

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, base64, list, put};

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
        old.replaced_at = Some(new.activated_at);
        old.wrapped_key.clear();
        put_intermediate(records, &old)?;
    }
    put_intermediate(records, new)
}

/// Forgets those that ended before `before`.
pub(crate) fn prune(records: &mut dyn Records, before: i64) -> Result<(), DbError> {
    for one in all(records)?.into_iter().filter(|one| one.not_after < before) {
        records.delete(&key(&one))?;
    }
    Ok(())
}
