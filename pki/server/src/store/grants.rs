//! On which terms hosts may hold identities: by their own entries, and by those for all hosts with some labels.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::hosts::{self, Entry, Host, entry_key};
use super::{DbError, Records, View, get, list, put};
use crate::labels::texts;

/// Of an entry. One from before there was such a thing has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    /// What the processes are known by; empty leaves it to the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) selectors: Vec<String>,
    /// Shorter than certificates live otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ttl_s: Option<u64>,
    /// Life of tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) jwt_ttl_s: Option<u64>,
    /// In its certificates, beside the SPIFFE ID.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) dns_names: Vec<String>,
    /// For programs, at the Workload API.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) hint: String,
    /// When it permits nothing any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expires_at: Option<i64>,
}

impl Terms {
    pub(crate) fn has_ended(&self, now: i64) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    /// How long a certificate may live that is issued now.
    pub(crate) fn life(&self, usual: Duration, now: i64) -> Duration {
        let left = self.expires_at.map(|end| u64::try_from(end - now).unwrap_or(0));
        [self.ttl_s, left].into_iter().flatten().map(Duration::from_secs).fold(usual, Duration::min)
    }
}

/// That hosts with these labels may hold an identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LabelEntry {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) spiffe_id: String,
    pub(crate) created_at: i64,
    #[serde(flatten)]
    pub(crate) terms: Terms,
}

impl LabelEntry {
    fn key(&self) -> String {
        format!("label-entry/{}/{}", labels_text(&self.labels), self.spiffe_id)
    }

    fn means(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

pub(crate) fn labels_text(labels: &BTreeMap<String, String>) -> String {
    texts(labels).join(",")
}

/// What a host may hold, and on which terms. Its own entry is closer than one by labels.
pub(crate) fn granted(view: &mut dyn View, host: &str) -> Result<BTreeMap<String, Terms>, DbError> {
    let own: Vec<(String, Entry)> = list(view, &format!("entry/{host}/"))?;
    let labels = hosts::host(view, host)?.map(|host| host.labels).unwrap_or_default();
    let mut all = granted_to(view, &labels)?;
    all.extend(own.into_iter().map(|(_, entry)| (entry.spiffe_id, entry.terms)));
    Ok(all)
}

/// What every host with these labels may hold.
pub(crate) fn granted_to(
    view: &mut dyn View,
    labels: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Terms>, DbError> {
    if labels.is_empty() {
        return Ok(BTreeMap::new());
    }
    let meant = label_entries(view)?.into_iter().filter(|entry| entry.means(labels));
    Ok(meant.map(|entry| (entry.spiffe_id, entry.terms)).collect())
}

/// Hosts that may hold an identity, by whatever entry; some may not have joined yet.
pub(crate) fn holders(view: &mut dyn View, spiffe_id: &str) -> Result<BTreeSet<String>, DbError> {
    let own = hosts::entries(view)?.into_iter().filter(|entry| entry.spiffe_id == spiffe_id);
    let mut holders: BTreeSet<String> = own.map(|entry| entry.host).collect();
    let by_labels = label_entries(view)?.into_iter().filter(|entry| entry.spiffe_id == spiffe_id);
    let by_labels: Vec<LabelEntry> = by_labels.collect();
    let meant = |host: &Host| by_labels.iter().any(|entry| entry.means(&host.labels));
    holders.extend(hosts::hosts(view)?.into_iter().filter(meant).map(|host| host.id));
    Ok(holders)
}

pub(crate) fn label_entries(view: &mut dyn View) -> Result<Vec<LabelEntry>, DbError> {
    Ok(list(view, "label-entry/")?.into_iter().map(|(_, entry)| entry).collect())
}

pub(crate) fn put_label_entry(records: &mut dyn Records, entry: &LabelEntry) -> Result<(), DbError> {
    put(records, &entry.key(), entry)
}

/// Whether there was one.
pub(crate) fn delete_label_entry(
    records: &mut dyn Records,
    labels: &BTreeMap<String, String>,
    spiffe_id: &str,
) -> Result<bool, DbError> {
    records.delete(&format!("label-entry/{}/{spiffe_id}", labels_text(labels)))
}

/// A host's entry on these terms, whatever terms it had.
pub(crate) fn put_entry(
    records: &mut dyn Records,
    host: &str,
    spiffe_id: &str,
    terms: Terms,
    now: i64,
) -> Result<(), DbError> {
    let key = entry_key(host, spiffe_id);
    let before: Option<Entry> = get(records, &key)?;
    let created_at = before.map_or(now, |entry| entry.created_at);
    put(records, &key, &Entry { host: host.to_owned(), spiffe_id: spiffe_id.to_owned(), created_at, terms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_from_before_there_were_terms_has_none() {
        let entry: Entry = serde_json::from_str(r#"{"spiffe_id":"spiffe://a/ns/b/sa/c","created_at":7}"#).unwrap();
        assert_eq!(
            (entry.spiffe_id.as_str(), entry.created_at, entry.terms),
            ("spiffe://a/ns/b/sa/c", 7, Terms::default())
        );
    }
}
