//! The one record that says what the trust domain trusts, so that every step of a rotation is one compare-and-set.

use super::{DbError, Records, View, get, put};
use crate::rotation::Trust;

const KEY: &str = "trust";

pub(crate) fn trust(view: &mut dyn View) -> Result<Trust, DbError> {
    let missing = || DbError::Record { key: KEY.to_owned(), detail: "it is missing".to_owned() };
    get(view, KEY)?.ok_or_else(missing)
}

pub(crate) fn put_trust(records: &mut dyn Records, trust: &Trust) -> Result<(), DbError> {
    put(records, KEY, trust)
}
