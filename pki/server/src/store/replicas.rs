//! The servers of a PKI, where there are several.

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, get, glance, put};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replica {
    #[serde(skip)]
    pub(crate) id: String,
    /// `HOST:PORT` at which hosts reach it.
    pub(crate) addresses: Vec<String>,
    pub(crate) started_at: i64,
}

pub(crate) const PREFIX: &str = "replica/";

fn key(id: &str) -> String {
    format!("{PREFIX}{id}")
}

pub(crate) fn put_replica(records: &mut dyn Records, replica: &Replica) -> Result<(), DbError> {
    put(records, &key(&replica.id), replica)
}

pub(crate) fn replica(view: &mut dyn View, id: &str) -> Result<Option<Replica>, DbError> {
    let found: Option<Replica> = get(view, &key(id))?;
    Ok(found.map(|replica| Replica { id: id.to_owned(), ..replica }))
}

pub(crate) fn replicas(view: &mut dyn View) -> Result<Vec<Replica>, DbError> {
    let found: Vec<(String, Replica)> = glance(view, PREFIX)?;
    Ok(found.into_iter().map(|(id, replica)| Replica { id, ..replica }).collect())
}

/// Whether there was one.
pub(crate) fn forget(records: &mut dyn Records, id: &str) -> Result<bool, DbError> {
    records.delete(&key(id))
}

/// Of all replicas, each once.
pub(crate) fn addresses(view: &mut dyn View) -> Result<Vec<String>, DbError> {
    let mut all: Vec<String> = replicas(view)?.into_iter().flat_map(|replica| replica.addresses).collect();
    all.sort();
    all.dedup();
    Ok(all)
}
