//! All keys of a PKI in etcd as they last were, so that reading needs no etcd. Kept current by a watch.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use meshd_etcd::api;
use meshd_etcd::api::event::EventType;
use rpds::RedBlackTreeMapSync;

/// Where records are; beside them are marks and who leads.
pub(super) const RECORDS: &str = "r/";
/// For each first part of a record's key: changed when a record below is deleted.
pub(super) const GONE: &str = "gone/";
/// Written with every change, so that one small question tells whether there was one.
pub(super) const TIP: &str = "tip";
pub(super) const LEADER: &str = "leader";
pub(super) const LIVE: &str = "live/";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) bytes: Vec<u8>,
    pub(super) modified: i64,
}

/// Cloned in no time: a view is one of these, and the watch goes on beside it.
#[derive(Debug, Clone, Default)]
pub(super) struct Snapshot {
    pub(super) keys: RedBlackTreeMapSync<String, Value>,
    /// All changes up to this one are in it.
    pub(super) revision: i64,
    /// Which etcd it was read from.
    pub(super) cluster: u64,
}

impl Snapshot {
    pub(super) fn record(&self, key: &str) -> Option<&Value> {
        self.keys.get(&format!("{RECORDS}{key}"))
    }

    /// Keys below a prefix, in order.
    pub(super) fn below<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let from = (Bound::Included(prefix.to_owned()), Bound::Unbounded);
        let all = self.keys.range(from).map(|(key, value)| (key.as_str(), value));
        all.take_while(move |(key, _)| key.starts_with(prefix))
    }

    pub(super) fn modified(&self, key: &str) -> i64 {
        self.keys.get(key).map_or(0, |value| value.modified)
    }

    pub(super) fn from_list(base: &str, listed: meshd_etcd::Listed) -> Snapshot {
        let mut keys = RedBlackTreeMapSync::new_sync();
        for pair in listed.keys {
            if let Some((key, value)) = entry(base, pair) {
                keys.insert_mut(key, value);
            }
        }
        Snapshot { keys, revision: listed.header.revision, cluster: listed.header.cluster_id }
    }

    /// What a backup knows, for a start without etcd. No revision is so low.
    pub(super) fn from_records(records: Vec<(String, Vec<u8>)>) -> Snapshot {
        let mut keys = RedBlackTreeMapSync::new_sync();
        for (key, bytes) in records {
            keys.insert_mut(format!("{RECORDS}{key}"), Value { bytes, modified: 0 });
        }
        Snapshot { keys, revision: 0, cluster: 0 }
    }

    pub(super) fn has_pki(&self) -> bool {
        self.record("trust").is_some()
    }

    pub(super) fn apply(&mut self, base: &str, event: api::Event) {
        let is_delete = event.r#type() == EventType::Delete;
        let Some((key, value)) = event.kv.and_then(|pair| entry(base, pair)) else { return };
        self.revision = self.revision.max(value.modified);
        if is_delete {
            self.keys.remove_mut(&key);
        } else {
            self.keys.insert_mut(key, value);
        }
    }

    /// For comparing two of the same revision.
    pub(super) fn content(&self) -> BTreeMap<&str, i64> {
        self.keys.iter().map(|(key, value)| (key.as_str(), value.modified)).collect()
    }
}

fn entry(base: &str, pair: api::KeyValue) -> Option<(String, Value)> {
    let key = String::from_utf8(pair.key).ok()?.strip_prefix(base)?.to_owned();
    Some((key, Value { bytes: pair.value, modified: pair.mod_revision }))
}

/// The latest snapshot, and whether it is believed to be the latest.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) snapshot: Snapshot,
    /// What the last changes wrote at the tip, by which whoever made one knows it again.
    pub(super) tips: VecDeque<Vec<u8>>,
    /// Why nothing can be written now.
    pub(super) trouble: Option<String>,
    /// Why etcd refused the last change, which it may not refuse the next time.
    pub(super) refused: Option<String>,
    /// It was read from etcd at least once.
    pub(super) loaded: bool,
    /// The revision that made this process's leader key, and until when it may believe to lead.
    pub(super) leads: Option<(i64, Instant)>,
    /// What the keys of this process hang on.
    pub(super) lease: Option<i64>,
}

/// More than happen while an answer is waited for.
const TIPS: usize = 256;

impl State {
    pub(super) fn note_tip(&mut self, tip: &[u8]) {
        self.tips.push_back(tip.to_vec());
        let surplus = self.tips.len().saturating_sub(TIPS);
        self.tips.drain(..surplus);
    }
}

#[derive(Default)]
pub(super) struct Cache {
    state: Mutex<State>,
    changed: Condvar,
}

impl Cache {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        self.lock().snapshot.clone()
    }

    pub(super) fn change(&self, act: impl FnOnce(&mut State)) {
        act(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until it is so, or time is up; whether it is so.
    pub(super) fn wait(&self, time: Duration, is_so: impl Fn(&State) -> bool) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), time, |state| !is_so(state));
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        is_so(&state)
    }
}

pub(super) fn refusal(error: &meshd_etcd::Error) -> Option<String> {
    error.is_refusal_to_write().then(|| error.to_string())
}
