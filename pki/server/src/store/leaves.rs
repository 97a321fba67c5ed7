//! The newest certificate of every host and workload: what is in use out there, without its history.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::hosts::{Issued, KEEP_ENDED_S};
use super::{DbError, Records, View, get, list, put};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Leaf {
    pub(crate) serial: String,
    pub(crate) authority: String,
    pub(crate) issued_at: i64,
    pub(crate) not_after: i64,
}

/// By SPIFFE ID.
pub(crate) type Leaves = BTreeMap<String, Leaf>;

/// Each takes the place of the one before; what ended long ago is forgotten.
pub(crate) fn note(records: &mut dyn Records, host: &str, new: &[Issued], now: i64) -> Result<(), DbError> {
    let key = format!("leaves/{host}");
    let mut held: Leaves = get(records, &key)?.unwrap_or_default();
    held.retain(|_, leaf| leaf.not_after > now - KEEP_ENDED_S);
    for one in new {
        let leaf = Leaf {
            serial: one.serial.clone(),
            authority: one.authority.clone(),
            issued_at: one.issued_at,
            not_after: one.not_after,
        };
        held.insert(one.spiffe_id.clone(), leaf);
    }
    put(records, &key, &held)
}

/// By host.
pub(crate) fn all(view: &mut dyn View) -> Result<Vec<(String, Leaves)>, DbError> {
    list(view, "leaves/")
}
