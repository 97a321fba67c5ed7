//! Join tokens. Only a hash of each secret is stored.

use std::collections::BTreeMap;

use data_encoding::HEXLOWER;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, base64, decode, encode, get, glance, list, put};

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
    /// How many keys it serves; with more than one `host_id` is what the hosts' ids begin with.
    #[serde(default = "one")]
    pub(crate) max_uses: u32,
    /// How many it has served, when it may serve several.
    #[serde(default)]
    pub(crate) uses: u32,
    /// Where it may be used; empty is everywhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) from: Vec<IpNet>,
    /// Of the hosts it makes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) labels: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

impl Token {
    /// Whether it makes hosts of this name, not hosts whose names begin with it.
    pub(crate) fn is_for(&self, host: &str) -> bool {
        self.max_uses == 1 && self.host_id == host
    }

    /// Whether it can still enrol a new host.
    fn is_open(&self, now: i64) -> bool {
        self.used.is_none() && self.uses < self.max_uses && self.expires_at > now
    }
}

/// Which host a key has become by a token for several.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Seat {
    pub(crate) host: String,
    pub(crate) at: i64,
}

fn seats(token: &str) -> String {
    format!("token-seat/{token}/")
}

pub(crate) fn seat(view: &mut dyn View, token: &str, key_id: &[u8]) -> Result<Option<Seat>, DbError> {
    get(view, &format!("{}{}", seats(token), HEXLOWER.encode(key_id)))
}

pub(crate) fn put_seat(records: &mut dyn Records, token: &str, key_id: &[u8], seat: &Seat) -> Result<(), DbError> {
    put(records, &format!("{}{}", seats(token), HEXLOWER.encode(key_id)), seat)
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
    let mut open: Vec<Token> = all(view)?.into_iter().filter(|token| token.is_open(now)).collect();
    open.sort_by_key(|token| token.created_at);
    Ok(open)
}

/// Nobody can join with the host's tokens any more, not even with one that was used and may be repeated.
pub(crate) fn end_those_of(records: &mut dyn Records, host: &str, now: i64) -> Result<(), DbError> {
    for mut token in all(records)?.into_iter().filter(|token| token.is_for(host) && token.expires_at > now) {
        token.expires_at = now;
        put_token(records, &token)?;
    }
    Ok(())
}

/// Nobody joins with what a backup brought back: it may have been used or ended since. Of records of whatever kind.
pub(crate) fn end_all(records: &mut [(String, Vec<u8>)], now: i64) -> Result<(), DbError> {
    for (key, value) in records.iter_mut().filter(|(key, _)| key.starts_with("token/")) {
        let mut token: Token = decode(key, value)?;
        token.expires_at = token.expires_at.min(now);
        *value = encode(key, &token)?;
    }
    Ok(())
}

/// Tokens for several hosts by which this one has come, that others may come by still.
pub(crate) fn shared_by(view: &mut dyn View, host: &str, now: i64) -> Result<Vec<String>, DbError> {
    let mut shared = Vec::new();
    for token in open(view, now)?.into_iter().filter(|token| token.max_uses > 1) {
        let seats: Vec<(String, Seat)> = glance(view, &seats(&token.id))?;
        if seats.iter().any(|(_, seat)| seat.host == host) {
            shared.push(token.id);
        }
    }
    Ok(shared)
}

/// One transaction of etcd takes 128 comparisons, and each token takes two; what is left goes the next time.
const PRUNED_AT_ONCE: usize = 40;

/// Lets no host come by a token into this identity. Returns the open tokens that would have given it.
pub(crate) fn take_out(records: &mut dyn Records, spiffe_id: &str, now: i64) -> Result<Vec<String>, DbError> {
    let mut narrowed = Vec::new();
    for mut token in open(records, now)?.into_iter().filter(|token| token.allow.iter().any(|id| id == spiffe_id)) {
        token.allow.retain(|id| id != spiffe_id);
        put_token(records, &token)?;
        narrowed.push(token.id);
    }
    Ok(narrowed)
}

/// Forgets tokens that ended before `before`.
pub(crate) fn prune(records: &mut dyn Records, before: i64) -> Result<(), DbError> {
    let ended = all(records)?.into_iter().filter(|token| token.expires_at < before).take(PRUNED_AT_ONCE);
    let mut keys = Vec::new();
    for token in ended {
        // Its seats first: without the token nobody would find them.
        keys.extend(records.list(&seats(&token.id))?.into_iter().map(|(seat, _)| seat));
        keys.push(format!("token/{}", token.id));
    }
    for key in keys.iter().take(PRUNED_AT_ONCE) {
        records.delete(key)?;
    }
    Ok(())
}

fn all(view: &mut dyn View) -> Result<Vec<Token>, DbError> {
    let found: Vec<(String, Token)> = list(view, "token/")?;
    Ok(found.into_iter().map(|(id, token)| Token { id, ..token }).collect())
}
