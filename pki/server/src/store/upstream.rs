//! What is on its way from and to an authority outside.

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, base64, get, put};

const PENDING: &str = "upstream/pending";
const REFUSED: &str = "upstream/refused";

/// The key of a request that was not answered yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pending {
    pub(crate) id: String,
    #[serde(with = "base64")]
    pub(crate) wrapped_key: Vec<u8>,
    pub(crate) created_at: i64,
}

/// Why the files the operator gave are not used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Refused {
    pub(crate) at: i64,
    pub(crate) reason: String,
}

pub(crate) fn pending(view: &mut dyn View) -> Result<Option<Pending>, DbError> {
    get(view, PENDING)
}

pub(crate) fn put_pending(records: &mut dyn Records, pending: &Pending) -> Result<(), DbError> {
    put(records, PENDING, pending)
}

/// Its answer has come.
pub(crate) fn forget_pending(records: &mut dyn Records, id: &str) -> Result<(), DbError> {
    if pending(records)?.is_some_and(|pending| pending.id == id) {
        records.delete(PENDING)?;
    }
    Ok(())
}

pub(crate) fn refused(view: &mut dyn View) -> Result<Option<Refused>, DbError> {
    get(view, REFUSED)
}

pub(crate) fn set_refused(records: &mut dyn Records, refused: Option<&Refused>) -> Result<(), DbError> {
    match refused {
        Some(refused) => put(records, REFUSED, refused),
        None => records.delete(REFUSED).map(drop),
    }
}
