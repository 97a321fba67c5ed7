//! Hosts, the identities they may hold, and what they were given.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::grants::{self, Terms};
use super::{DbError, Records, View, base64, get, glance, list, put};

/// Ended certificates stay on record for so many of their lives, a week by default, for whoever looks into what happened.
const LIVES_ON_RECORD: i64 = 7;
/// The newest certificate of each identity is told of this long after its end.
pub(crate) const KEEP_ENDED_S: i64 = 7 * 86_400;
/// Per host, the newest: 500 identities renewed thrice a day, and one value of etcd (1.5 MiB).
const MOST_ISSUED: usize = 2000;
/// A clock that is as far off as this is no news: half of what any rotation allows.
const SAME_CLOCK_MS: u64 = 500;
/// A bundle never has as many roots, and no identifier of one is as long.
const MOST_ROOTS_TOLD: usize = 16;
const LONGEST_ROOT_ID: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HostState {
    Active,
    /// Its key counts no more; a new token makes it a host again.
    Evicted,
    /// May hold nothing, until the operator lifts it.
    Banned,
}

impl HostState {
    pub(crate) fn name(self) -> &'static str {
        match self {
            HostState::Active => "active",
            HostState::Evicted => "evicted",
            HostState::Banned => "banned",
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Host {
    #[serde(skip)]
    pub(crate) id: String,
    pub(crate) state: HostState,
    /// SHA-256 of the enrolled key's SubjectPublicKeyInfo.
    #[serde(with = "base64")]
    pub(crate) key_current: Vec<u8>,
    /// The SubjectPublicKeyInfo itself: what a host proves that comes back after its certificate has ended.
    #[serde(with = "base64", default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) public_key: Vec<u8>,
    /// SubjectPublicKeyInfo of the key it enrolled with. A host restored from a snapshot of any age holds it still; it is
    /// worth nothing any more once the host enrols again. Empty for hosts from before there was such a thing.
    #[serde(with = "base64", default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) enrolled_key: Vec<u8>,
    /// Issued but not yet used: the reply may have been lost, so both keys are the host's until one is seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<NextKey>,
    pub(crate) enrolled_at: i64,
    pub(crate) last_seen: i64,
    #[serde(default)]
    pub(crate) acked_sequence: u64,
    #[serde(default)]
    pub(crate) clock_offset_ms: i64,
    /// Roots that the chains it uses end in, as it last told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) roots_in_use: Vec<String>,
    /// `x509pop:machines`; empty for a join token.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) enrolled_by: String,
    /// From the operator, by the way it enrolled; never from the host itself.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) labels: BTreeMap<String, String>,
    /// It is a host of a PKI that was lost, and may come back by its key until then. Nothing once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) adopted_until: Option<i64>,
    /// What the PKI before gave it is not on record here, and has ended by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unrecorded_until: Option<i64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NextKey {
    #[serde(with = "base64")]
    pub(crate) key_id: Vec<u8>,
    #[serde(with = "base64")]
    pub(crate) public_key: Vec<u8>,
}

/// What a host's message tells about it.
pub(crate) struct Sighting<'a> {
    pub(crate) now: i64,
    pub(crate) acked_sequence: u64,
    pub(crate) clock_offset_ms: i64,
    /// `None` from hosts that do not tell.
    pub(crate) roots_in_use: Option<&'a [String]>,
}

impl Host {
    pub(crate) fn saw(&mut self, sighting: &Sighting<'_>) {
        self.last_seen = sighting.now;
        self.acked_sequence = self.acked_sequence.max(sighting.acked_sequence);
        self.clock_offset_ms = sighting.clock_offset_ms;
        if let Some(roots) = sighting.roots_in_use {
            let possible = roots.iter().filter(|root| root.len() <= LONGEST_ROOT_ID);
            self.roots_in_use = possible.take(MOST_ROOTS_TOLD).cloned().collect();
        }
    }

    /// Whether what a host tells is on record already, but that it lives, and that was put there less than so long ago.
    pub(crate) fn is_known(&self, sighting: &Sighting<'_>, key_id: &[u8], within_s: i64) -> bool {
        (0..within_s).contains(&(sighting.now - self.last_seen))
            && sighting.acked_sequence <= self.acked_sequence
            && sighting.clock_offset_ms.abs_diff(self.clock_offset_ms) < SAME_CLOCK_MS
            && sighting.roots_in_use.is_none_or(|roots| roots == self.roots_in_use)
            && self.next.as_ref().is_none_or(|next| next.key_id != key_id)
    }

    /// No key of it counts any more, not even when a ban is undone later: it needs a token.
    pub(crate) fn evict(&mut self) {
        self.state = HostState::Evicted;
        self.next = None;
        for key in [&mut self.key_current, &mut self.public_key, &mut self.enrolled_key] {
            key.clear();
        }
    }

    /// As it was before the ban.
    pub(crate) fn unban(&mut self) {
        self.state = if self.key_current.is_empty() { HostState::Evicted } else { HostState::Active };
    }

    /// It proved to hold this key; the one before is not its own any more.
    pub(crate) fn used_key(&mut self, key_id: &[u8]) {
        if let Some(next) = self.next.take_if(|next| next.key_id == key_id) {
            self.key_current = next.key_id;
            self.public_key = next.public_key;
        }
    }
}

pub(crate) fn host(view: &mut dyn View, id: &str) -> Result<Option<Host>, DbError> {
    let found: Option<Host> = get(view, &format!("host/{id}"))?;
    Ok(found.map(|host| Host { id: id.to_owned(), ..host }))
}

pub(crate) fn hosts(view: &mut dyn View) -> Result<Vec<Host>, DbError> {
    let found: Vec<(String, Host)> = glance(view, "host/")?;
    Ok(found.into_iter().map(|(id, host)| Host { id, ..host }).collect())
}

pub(crate) fn put_host(records: &mut dyn Records, host: &Host) -> Result<(), DbError> {
    put(records, &format!("host/{}", host.id), host)
}

/// That a host may hold an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    #[serde(skip)]
    pub(crate) host: String,
    pub(crate) spiffe_id: String,
    pub(crate) created_at: i64,
    #[serde(flatten)]
    pub(crate) terms: Terms,
}

pub(crate) fn entry_key(host: &str, spiffe_id: &str) -> String {
    format!("entry/{host}/{spiffe_id}")
}

pub(crate) fn entries(view: &mut dyn View) -> Result<Vec<Entry>, DbError> {
    let found: Vec<(String, Entry)> = list(view, "entry/")?;
    let owner = |key: &str| key.split('/').next().unwrap_or_default().to_owned();
    Ok(found.into_iter().map(|(key, entry)| Entry { host: owner(&key), ..entry }).collect())
}

/// SPIFFE IDs a host may hold.
pub(crate) fn permitted(view: &mut dyn View, host: &str) -> Result<Vec<String>, DbError> {
    Ok(grants::granted(view, host)?.into_keys().collect())
}

/// Whether the entry is new.
pub(crate) fn permit(records: &mut dyn Records, host: &str, spiffe_id: &str, now: i64) -> Result<bool, DbError> {
    let key = entry_key(host, spiffe_id);
    let new = records.get(&key)?.is_none();
    if new {
        let (host, spiffe_id) = (host.to_owned(), spiffe_id.to_owned());
        put(records, &key, &Entry { host, spiffe_id, created_at: now, terms: Terms::default() })?;
    }
    Ok(new)
}

/// Whether there was one.
pub(crate) fn forbid(records: &mut dyn Records, host: &str, spiffe_id: &str) -> Result<bool, DbError> {
    records.delete(&entry_key(host, spiffe_id))
}

/// A certificate on record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Issued {
    pub(crate) serial: String,
    pub(crate) spiffe_id: String,
    pub(crate) authority: String,
    pub(crate) issued_at: i64,
    pub(crate) not_after: i64,
}

/// Adds to what a host was given, and forgets what ended long ago.
pub(crate) fn note_issued(records: &mut dyn Records, host: &str, new: Vec<Issued>, now: i64) -> Result<(), DbError> {
    if new.is_empty() {
        return Ok(());
    }
    super::leaves::note(records, host, &new, now)?;
    let key = format!("issued/{host}");
    let mut all: Vec<Issued> = get(records, &key)?.unwrap_or_default();
    all.retain(|one| one.not_after + LIVES_ON_RECORD * (one.not_after - one.issued_at) > now);
    all.extend(new);
    all.drain(..all.len().saturating_sub(MOST_ISSUED));
    put(records, &key, &all)
}

/// What a host was given, as far as it is on record.
pub(crate) fn issued(view: &mut dyn View, host: &str) -> Result<Vec<Issued>, DbError> {
    Ok(get(view, &format!("issued/{host}"))?.unwrap_or_default())
}

/// Certificates on record that have not ended, with their hosts.
pub(crate) fn valid_issued(view: &mut dyn View, now: i64) -> Result<Vec<(String, Issued)>, DbError> {
    let found: Vec<(String, Vec<Issued>)> = glance(view, "issued/")?;
    let of_hosts = found.into_iter().flat_map(|(host, all)| all.into_iter().map(move |one| (host.clone(), one)));
    Ok(of_hosts.filter(|(_, one)| one.not_after > now).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_news_when_it_tells_more_than_that_the_host_lives() {
        let host: Host = serde_json::from_value(serde_json::json!({
            "state": "active", "key_current": "", "enrolled_at": 0, "last_seen": 1000,
            "acked_sequence": 7, "clock_offset_ms": -200, "roots_in_use": ["a"],
            "next": { "key_id": "AQID", "public_key": "" },
        }))
        .unwrap();
        let roots = ["a".to_owned()];
        let sighting =
            || Sighting { now: 1100, acked_sequence: 7, clock_offset_ms: 100, roots_in_use: Some(roots.as_slice()) };
        assert!(host.is_known(&sighting(), &[9], 120));
        assert!(!host.is_known(&sighting(), &[1, 2, 3], 120), "the key it was given last is in use");
        assert!(!host.is_known(&sighting(), &[9], 100), "it was noted long ago");
        assert!(!host.is_known(&Sighting { now: 999, ..sighting() }, &[9], 120), "the clock was set back");
        assert!(!host.is_known(&Sighting { acked_sequence: 8, ..sighting() }, &[9], 120));
        assert!(!host.is_known(&Sighting { clock_offset_ms: 300, ..sighting() }, &[9], 120));
        assert!(!host.is_known(&Sighting { roots_in_use: Some(&[]), ..sighting() }, &[9], 120));
        assert!(host.is_known(&Sighting { roots_in_use: None, ..sighting() }, &[9], 120));
    }
}
