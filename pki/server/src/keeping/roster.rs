//! Who the hosts are and what they may hold, in a file without a secret, apart from everything else: what a new PKI
//! needs so that hosts come back to it after state, backups and wrapping key are lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use meshd_identity::TrustDomain;
use serde::{Deserialize, Serialize};

use super::backups::stamp;
use crate::keys::replace_private;
use crate::rotation::{Root, RootState, Trust};
use crate::store::grants::{self, LabelEntry};
use crate::store::hosts::{self, Entry, HostState};
use crate::store::intermediates::{self, Intermediate};
use crate::store::{DbError, View, base64, deny, trust};

pub(crate) const FILE: &str = "hosts.json";
pub(crate) const SCHEMA: u32 = 1;

/// Nothing in it changes with a renewal, so that a copy stays good for long.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Roster {
    pub(crate) schema: u32,
    pub(crate) trust_domain: TrustDomain,
    /// Of the bundle in force.
    pub(crate) sequence: u64,
    /// Of the deny set, which the hosts have.
    #[serde(default)]
    pub(crate) deny_sequence: u64,
    /// No certificate of a host or workload lives longer, in seconds.
    #[serde(default)]
    pub(crate) longest_leaf_s: i64,
    pub(crate) roots: Vec<KnownRoot>,
    pub(crate) hosts: Vec<KnownHost>,
    pub(crate) entries: Vec<Permitted>,
    pub(crate) label_entries: Vec<LabelEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KnownRoot {
    pub(crate) id: String,
    #[serde(with = "base64")]
    pub(crate) certificate: Vec<u8>,
    pub(crate) not_after: i64,
    /// When the last certificate under it ends, where it signs none any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) leaves_until: Option<i64>,
}

impl KnownRoot {
    fn of(root: Root, speaker: Option<&str>, all: &[Intermediate]) -> KnownRoot {
        let is_old = root.state == RootState::Old && speaker != Some(&root.id);
        let under = all.iter().filter(|one| one.root == root.id);
        let last_end = under.map(|one| one.replaced_at.unwrap_or(one.not_after) + one.longest_leaf_s).max();
        let leaves_until = is_old.then(|| last_end.unwrap_or(root.published_at));
        KnownRoot { id: root.id, certificate: root.certificate, not_after: root.not_after, leaves_until }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KnownHost {
    pub(crate) id: String,
    pub(crate) state: HostState,
    /// SubjectPublicKeyInfo of the key it enrolled with, which is what it comes back by. Empty for an evicted host.
    #[serde(with = "base64")]
    pub(crate) key: Vec<u8>,
    pub(crate) enrolled_at: i64,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) enrolled_by: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) labels: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Permitted {
    pub(crate) host: String,
    #[serde(flatten)]
    pub(crate) entry: Entry,
}

impl Roster {
    pub(crate) fn of(view: &mut dyn View, trust_domain: &TrustDomain) -> Result<Roster, DbError> {
        let trust = trust::trust(view)?;
        let speaker = trust.speaker().map(|root| root.id.clone());
        let Trust { sequence, roots, .. } = trust;
        let intermediates = intermediates::all(view)?;
        let roots = roots.into_iter().filter(|root| root.state.is_in_bundle() && root.tainted_at.is_none());
        let hosts = hosts::hosts(view)?.into_iter().map(|host| KnownHost {
            key: if host.enrolled_key.is_empty() { host.public_key } else { host.enrolled_key },
            id: host.id,
            state: host.state,
            enrolled_at: host.enrolled_at,
            enrolled_by: host.enrolled_by,
            labels: host.labels,
        });
        let hosts = hosts.collect();
        let entries = hosts::entries(view)?.into_iter();
        Ok(Roster {
            schema: SCHEMA,
            trust_domain: trust_domain.clone(),
            sequence,
            deny_sequence: deny::deny(view)?.sequence,
            longest_leaf_s: intermediates.iter().map(|one| one.longest_leaf_s).max().unwrap_or_default(),
            roots: roots.map(|root| KnownRoot::of(root, speaker.as_deref(), &intermediates)).collect(),
            hosts,
            entries: entries.map(|entry| Permitted { host: entry.host.clone(), entry }).collect(),
            label_entries: grants::label_entries(view)?,
        })
    }

    /// What a server wrote last, if it can be read.
    pub(crate) fn read(dir: &Path) -> Option<Roster> {
        serde_json::from_slice(&fs::read(dir.join(FILE)).ok()?).ok()
    }

    /// Banned and evicted hosts.
    pub(crate) fn shut_out(&self) -> Vec<(String, HostState)> {
        let hosts = self.hosts.iter().filter(|host| host.state != HostState::Active);
        hosts.map(|host| (host.id.clone(), host.state)).collect()
    }

    /// Writes it where it is looked for, if it changed.
    pub(crate) fn write(&self, dir: &Path, now: SystemTime) -> io::Result<()> {
        let (path, text) = (dir.join(FILE), serde_json::to_vec(self)?);
        let known = fs::read(&path).unwrap_or_default();
        if known == text {
            return Ok(());
        }
        if self.lacks_a_host_of(&known) {
            let kept = dir.join(format!("hosts-{}.json", stamp(now)));
            fs::rename(&path, &kept)?;
            let kept = kept.display();
            tracing::error!(%kept, "the list of hosts had hosts that the database does not know; it is kept there");
        }
        replace_private(&path, &text)
    }

    /// Hosts are never deleted: a database that knows fewer is not the one the list is of.
    fn lacks_a_host_of(&self, list: &[u8]) -> bool {
        let ours: BTreeSet<&str> = self.hosts.iter().map(|host| host.id.as_str()).collect();
        let list: Option<Roster> = serde_json::from_slice(list).ok();
        list.is_some_and(|list| list.hosts.iter().any(|host| !ours.contains(host.id.as_str())))
    }
}
