//! What is said once for the whole PKI.

use meshd_identity::TrustDomain;

use super::{DbError, Records, View, encode, get, put};

const TRUST_DOMAIN: &str = "setting/trust_domain";
const ADVERTISE: &str = "setting/advertise";
const LAST_GOOD: &str = "setting/last_good_time";
const BACKED_UP: &str = "setting/backed_up";
const RECOVERY_STATEMENTS: &str = "setting/recovery_statements";
const RECOVERED_AT: &str = "setting/recovered_at";
const RETURNED_AT: &str = "setting/returned_at";
const RECOVERY_KEYS: &str = "setting/recovery_keys";

pub(crate) fn set_trust_domain(records: &mut dyn Records, domain: &TrustDomain) -> Result<(), DbError> {
    put(records, TRUST_DOMAIN, &domain.as_str())
}

pub(crate) fn trust_domain(view: &mut dyn View) -> Result<Option<TrustDomain>, DbError> {
    let name: Option<String> = get(view, TRUST_DOMAIN)?;
    Ok(name.and_then(|name| name.parse().ok()))
}

/// `HOST:PORT` at which hosts reach this PKI, as `run --advertise` last said.
pub(crate) fn set_advertise(records: &mut dyn Records, addresses: &[String]) -> Result<(), DbError> {
    put(records, ADVERTISE, &addresses)
}

pub(crate) fn advertise(view: &mut dyn View) -> Result<Vec<String>, DbError> {
    Ok(get(view, ADVERTISE)?.unwrap_or_default())
}

/// Seconds since 1970 at which the clock was last known to be good.
pub(crate) fn set_last_good(records: &mut dyn Records, time: i64) -> Result<(), DbError> {
    put(records, LAST_GOOD, &time)
}

pub(crate) fn last_good(view: &mut dyn View) -> Result<Option<i64>, DbError> {
    get(view, LAST_GOOD)
}

/// The newest backup there was; each backup has its own name in it. So whoever lacks the name of one is from before it.
pub(crate) fn backed_up(view: &mut dyn View) -> Result<Option<String>, DbError> {
    get(view, BACKED_UP)
}

/// Never goes back, whatever the clock does.
pub(crate) fn set_backed_up(records: &mut dyn Records, name: &str) -> Result<(), DbError> {
    let newest = backed_up(records)?.filter(|known| known.as_str() > name);
    put(records, BACKED_UP, &newest.as_deref().unwrap_or(name))
}

/// As `set_backed_up`, among all records of a PKI of which no server runs; they are in the order of their keys.
pub(crate) fn mark_backed_up(records: &mut Vec<(String, Vec<u8>)>, name: &str) -> Result<(), DbError> {
    let value = encode(BACKED_UP, &name)?;
    match records.binary_search_by(|(key, _)| key.as_str().cmp(BACKED_UP)) {
        Ok(at) => records[at].1 = value,
        Err(at) => records.insert(at, (BACKED_UP.to_owned(), value)),
    }
    Ok(())
}

/// What the holders of recovery keys have said, oldest first: JWS of type `meshd-recovery+jws`.
pub(crate) fn recovery_statements(view: &mut dyn View) -> Result<Vec<String>, DbError> {
    Ok(get(view, RECOVERY_STATEMENTS)?.unwrap_or_default())
}

pub(crate) fn set_recovery_statements(records: &mut dyn Records, all: &[String]) -> Result<(), DbError> {
    put(records, RECOVERY_STATEMENTS, &all)
}

/// When hosts were first told to trust this PKI instead of one that was lost.
pub(crate) fn recovered_at(view: &mut dyn View) -> Result<Option<i64>, DbError> {
    get(view, RECOVERED_AT)
}

pub(crate) fn set_recovered_at(records: &mut dyn Records, time: i64) -> Result<(), DbError> {
    put(records, RECOVERED_AT, &time)
}

/// When the first host of the lost PKI reported here that may wait for the others.
pub(crate) fn returned_at(view: &mut dyn View) -> Result<Option<i64>, DbError> {
    get(view, RETURNED_AT)
}

pub(crate) fn note_return(records: &mut dyn Records, time: i64) -> Result<(), DbError> {
    match returned_at(records)? {
        Some(_) => Ok(()),
        None => put(records, RETURNED_AT, &time),
    }
}

/// SubjectPublicKeyInfo of each recovery key in base64, current first.
pub(crate) fn set_recovery_keys(records: &mut dyn Records, keys: &[Vec<u8>]) -> Result<(), DbError> {
    let keys: Vec<String> = keys.iter().map(|key| data_encoding::BASE64.encode(key)).collect();
    put(records, RECOVERY_KEYS, &keys)
}

pub(crate) fn recovery_keys(view: &mut dyn View) -> Result<Vec<Vec<u8>>, DbError> {
    let keys: Vec<String> = get(view, RECOVERY_KEYS)?.unwrap_or_default();
    let unreadable = |error: data_encoding::DecodeError| DbError::Record {
        key: RECOVERY_KEYS.to_owned(),
        detail: error.to_string(),
    };
    keys.iter().map(|key| data_encoding::BASE64.decode(key.as_bytes()).map_err(unreadable)).collect()
}
