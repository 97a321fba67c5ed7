//! Intermediates whose key may be known to others, for as long as something they have signed can be valid.

use super::{DbError, Records, View, list, put};

const PREFIX: &str = "tainted-intermediate/";

pub(crate) fn intermediates(view: &mut dyn View) -> Result<Vec<String>, DbError> {
    let found: Vec<(String, i64)> = list(view, PREFIX)?;
    Ok(found.into_iter().map(|(id, _)| id).collect())
}

pub(crate) fn taint(records: &mut dyn Records, id: &str, not_after: i64) -> Result<(), DbError> {
    put(records, &format!("{PREFIX}{id}"), &not_after)
}

/// Forgets those that have ended.
pub(crate) fn prune(records: &mut dyn Records, now: i64) -> Result<(), DbError> {
    let found: Vec<(String, i64)> = list(records, PREFIX)?;
    for (id, _) in found.into_iter().filter(|(_, not_after)| *not_after < now) {
        records.delete(&format!("{PREFIX}{id}"))?;
    }
    Ok(())
}
