//! Join tokens. Only a hash of each secret is stored.

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, base64, get, list, put};

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Token {
    #[serde(skip)]
    pub(crate) id: String,
    #[serde(with = "base64")]
    pub(crate) secret_hash: Vec<u8>,
    pub(crate) host_id: String,
    /// SPIFFE IDs the host may hold.
    pub(crate) allow: Vec<String>,
    pub(crate) created_at: i64,
    pub(crate) expires_at: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) used: Option<Use>,
}

/// The first use binds a token to a key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Use {
    #[serde(with = "base64")]
    pub(crate) key_id: Vec<u8>,
    pub(crate) at: i64,
}

pub(crate) fn put_token(records: &mut dyn Records, token: &Token) -> Result<(), DbError> {
    put(records, &format!("token/{}", token.id), token)
}

pub(crate) fn token(view: &mut dyn View, id: &str) -> Result<Option<Token>, DbError> {
    let found: Option<Token> = get(view, &format!("token/{id}"))?;
    Ok(found.map(|token| Token { id: id.to_owned(), ..token }))
}

/// Tokens that can still enrol a new host, oldest first.
pub(crate) fn open(view: &mut dyn View, now: i64) -> Result<Vec<Token>, DbError> {
    let mut open: Vec<Token> =
        all(view)?.into_iter().filter(|token| token.used.is_none() && token.expires_at > now).collect();
    open.sort_by_key(|token| token.created_at);
    Ok(open)
}

/// Nobody can join with the host's tokens any more, not even with one that was used and may be repeated.
pub(crate) fn end_those_of(records: &mut dyn Records, host: &str, now: i64) -> Result<(), DbError> {
    for mut token in all(records)?.into_iter().filter(|token| token.host_id == host && token.expires_at > now) {
        token.expires_at = now;
        put_token(records, &token)?;
    }
    Ok(())
}

/// Forgets tokens that ended before `before`.
pub(crate) fn prune(records: &mut dyn Records, before: i64) -> Result<(), DbError> {
    for token in all(records)?.into_iter().filter(|token| token.expires_at < before) {
        records.delete(&format!("token/{}", token.id))?;
    }
    Ok(())
}

fn all(view: &mut dyn View) -> Result<Vec<Token>, DbError> {
    let found: Vec<(String, Token)> = list(view, "token/")?;
    Ok(found.into_iter().map(|(id, token)| Token { id, ..token }).collect())
}
