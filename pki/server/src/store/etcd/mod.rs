//! Records in etcd, for several servers. Reading is from memory, which a watch keeps current, so it needs no etcd at all.
//! A transaction is optimistic: it notes what it read, and commits only if none of that has changed.
//!
//! The engine's calls are blocking, as SQLite's are: what is async lives on a runtime of its own, with one thread. See
//! docs/adr/0008.

mod cache;
pub mod config;
mod leader;
pub(crate) mod transfer;
mod watcher;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use meshd_etcd::api::compare::{CompareResult, CompareTarget, TargetUnion};
use meshd_etcd::api::response_op::Response;
use meshd_etcd::api::{Compare, RequestOp, TxnRequest, TxnResponse};
use meshd_etcd::{Client, Error, Prefix, created_at, delete, get, none_changed_since, put, unchanged};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use self::cache::{Cache, GONE, LEADER, LIVE, RECORDS, Snapshot, TIP, refusal};
use self::config::EtcdConfig;
use self::leader::Candidate;
use self::watcher::Watcher;
use super::{Committed, DbError, Engine, Records, Transaction, View, sqlite};
use crate::authority::new_id;

/// Without this record there is no PKI.
const TRUST: &str = "trust";
/// etcd's own default for --max-txn-ops.
const MOST_OPERATIONS: usize = 128;
/// The longest a call can take: every member tried, then the call itself.
const PATIENCE: Duration = Duration::from_secs(20);
/// Until a change that etcd has confirmed is seen here, too.
const SEE_OWN: Duration = Duration::from_secs(2);
/// Until another member has told what one did that went away.
const FIND_OUT: Duration = Duration::from_secs(5);
/// For leaving the lead to others at the end.
const GOODBYE: Duration = Duration::from_secs(1);
const FIRST_LOAD: Duration = Duration::from_secs(10);

pub(crate) struct Etcd {
    runtime: Option<Runtime>,
    client: Arc<Client>,
    cache: Arc<Cache>,
    config: EtcdConfig,
    base: String,
    candidate: Mutex<Option<JoinHandle<()>>>,
}

impl Etcd {
    /// `fallback` are records to start from when etcd cannot be reached; without any that is an error.
    pub(crate) fn open(
        config: &EtcdConfig,
        fallback: impl FnOnce() -> Option<Vec<(String, Vec<u8>)>>,
    ) -> Result<Etcd, DbError> {
        let base = config.base()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("etcd")
            .enable_all()
            .build()
            .map_err(|error| DbError::Etcd(error.to_string()))?;
        let client = Arc::new(Client::new(config.settings())?);
        let cache = Arc::new(Cache::default());
        let prefix = Prefix::new(base.clone());
        let watcher = Watcher { client: client.clone(), cache: cache.clone(), base: base.clone(), prefix };
        runtime.spawn(watcher.run());
        let candidate = Mutex::default();
        let etcd = Etcd { runtime: Some(runtime), client, cache, config: config.clone(), base, candidate };
        etcd.first_load(fallback)?;
        Ok(etcd)
    }

    fn first_load(&self, fallback: impl FnOnce() -> Option<Vec<(String, Vec<u8>)>>) -> Result<(), DbError> {
        // The first trouble may be one member that is away.
        self.cache.wait(FIRST_LOAD, |state| state.loaded);
        let state = self.cache.lock();
        let (loaded, trouble) = (state.loaded, state.trouble.clone());
        let has_pki = state.snapshot.has_pki();
        drop(state);
        if loaded && has_pki {
            return Ok(());
        }
        let trouble = trouble.unwrap_or_else(|| format!("it holds nothing below {}", self.base));
        let Some(records) = fallback() else { return Err(DbError::Etcd(trouble)) };
        tracing::error!(trouble, "etcd is of no use now; starting from the newest backup, which nothing can change");
        self.cache.change(|state| {
            if !state.loaded || !state.snapshot.has_pki() {
                state.snapshot = Snapshot::from_records(records);
                state.loaded = false;
                state.trouble = Some(trouble);
            }
        });
        Ok(())
    }

    /// Runs it on the engine's runtime and waits.
    fn block<T: Send + 'static>(&self, act: impl Future<Output = T> + Send + 'static) -> Result<T, DbError> {
        let runtime = self.runtime.as_ref().expect("only dropping takes it");
        let (send, receive) = sync_channel(1);
        runtime.spawn(async move {
            // Nobody waits any more when this fails.
            _ = send.send(act.await);
        });
        receive.recv_timeout(PATIENCE).map_err(|error| {
            DbError::Etcd(match error {
                RecvTimeoutError::Timeout => format!("no answer within {} s", PATIENCE.as_secs()),
                RecvTimeoutError::Disconnected => "its task panicked".to_owned(),
            })
        })
    }

    /// Whether a change whose answer was lost is among those that etcd has told of since.
    fn was_done(&self, id: &str, error: &Error) -> bool {
        if !error.is_gone() && !matches!(error, Error::Deadline) {
            return false;
        }
        let (client, tip) = (self.client.clone(), format!("{}{TIP}", self.base));
        let Ok(Ok((_, latest))) = self.block(async move { client.modified(&tip).await }) else { return false };
        self.cache.wait(FIND_OUT, |state| state.snapshot.revision >= latest);
        self.cache.lock().tips.iter().any(|known| known == id.as_bytes())
    }

    fn start(&self, leader: Option<i64>) -> Open<'_> {
        let snapshot = self.cache.snapshot();
        Open { etcd: self, snapshot, read: BTreeSet::new(), listed: BTreeSet::new(), changes: BTreeMap::new(), leader }
    }
}

impl Engine for Etcd {
    fn begin(&self) -> Result<Box<dyn Transaction + '_>, DbError> {
        Ok(Box::new(self.start(None)))
    }

    fn begin_leading(&self) -> Result<Option<Box<dyn Transaction + '_>>, DbError> {
        let leads = self.cache.lock().leads.filter(|(_, until)| Instant::now() < *until);
        Ok(leads.map(|(revision, _)| Box::new(self.start(Some(revision))) as Box<dyn Transaction + '_>))
    }

    fn view(&self) -> Result<Box<dyn View + '_>, DbError> {
        Ok(Box::new(self.start(None)))
    }

    fn check(&self) -> Result<(), DbError> {
        Ok(())
    }

    fn copy_to(&self, path: &Path) -> Result<(), DbError> {
        let records = self.view()?.list("")?;
        sqlite::write_copy(path, &records)
    }

    fn catch_up(&self) -> bool {
        if self.cache.lock().trouble.is_some() {
            return false;
        }
        let (client, tip) = (self.client.clone(), format!("{}{TIP}", self.base));
        let known = self.cache.lock().snapshot.revision;
        match self.block(async move { client.modified(&tip).await }) {
            Ok(Ok((_, latest))) => {
                latest > known && self.cache.wait(SEE_OWN, |state| state.snapshot.revision >= latest)
            }
            _ => false,
        }
    }

    fn join_replicas(&self) {
        let runtime = self.runtime.as_ref().expect("only dropping takes it");
        let mut running = self.candidate.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_some() {
            return;
        }
        let candidate = Candidate {
            client: self.client.clone(),
            cache: self.cache.clone(),
            base: self.base.clone(),
            replica: self.config.replica.clone(),
            lease_s: self.config.lease_s,
        };
        *running = Some(runtime.spawn(candidate.run()));
        drop(running);
        // A PKI that was off for long needs a leader before anything else.
        let settled = |state: &cache::State| state.leads.is_some() || state.snapshot.keys.get(LEADER).is_some();
        if self.cache.lock().trouble.is_none() {
            self.cache.wait(FIRST_LOAD, settled);
        }
    }

    fn leads(&self) -> bool {
        self.cache.lock().leads.is_some_and(|(_, until)| Instant::now() < until)
    }

    fn is_current(&self) -> bool {
        self.cache.lock().trouble.is_none()
    }

    fn trouble(&self) -> Option<String> {
        let state = self.cache.lock();
        state.trouble.clone().or_else(|| state.refused.clone())
    }

    fn live_replicas(&self) -> Vec<String> {
        let snapshot = self.cache.snapshot();
        snapshot.below(LIVE).map(|(key, _)| key[LIVE.len()..].to_owned()).collect()
    }

    fn leader(&self) -> Option<String> {
        let snapshot = self.cache.snapshot();
        snapshot.keys.get(LEADER).map(|value| String::from_utf8_lossy(&value.bytes).into_owned())
    }
}

impl Drop for Etcd {
    /// Leaves the lead to another at once.
    fn drop(&mut self) {
        let candidate = self.candidate.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(candidate) = candidate {
            candidate.abort();
            let (client, lease) = (self.client.clone(), self.cache.lock().lease);
            if let Some(lease) = lease {
                // Without an answer it ends by itself.
                _ = self.block(async move { tokio::time::timeout(GOODBYE, client.revoke(lease)).await });
            }
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A transaction or a view: what was there when it began, what of that it looked at, and what it changed.
struct Open<'a> {
    etcd: &'a Etcd,
    snapshot: Snapshot,
    read: BTreeSet<String>,
    listed: BTreeSet<String>,
    changes: BTreeMap<String, Option<Vec<u8>>>,
    /// Commits only while this is the revision that made the leader's key.
    leader: Option<i64>,
}

impl View for Open<'_> {
    fn get(&mut self, key: &str) -> Result<Option<Vec<u8>>, DbError> {
        if let Some(change) = self.changes.get(key) {
            return Ok(change.clone());
        }
        self.read.insert(key.to_owned());
        Ok(self.snapshot.record(key).map(|value| value.bytes.clone()))
    }

    fn list(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        self.listed.insert(prefix.to_owned());
        self.glance(prefix)
    }

    fn glance(&mut self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        let below = format!("{RECORDS}{prefix}");
        let stored = self.snapshot.below(&below).map(|(key, value)| (&key[RECORDS.len()..], &value.bytes));
        let mut all: BTreeMap<&str, &Vec<u8>> = stored.collect();
        for (key, change) in self.changes.iter().filter(|(key, _)| key.starts_with(prefix)) {
            match change {
                Some(value) => all.insert(key, value),
                None => all.remove(key.as_str()),
            };
        }
        Ok(all.into_iter().map(|(key, value)| (key.to_owned(), value.clone())).collect())
    }
}

impl Records for Open<'_> {
    fn put(&mut self, key: &str, value: &[u8]) -> Result<(), DbError> {
        self.changes.insert(key.to_owned(), Some(value.to_vec()));
        Ok(())
    }

    fn delete(&mut self, key: &str) -> Result<bool, DbError> {
        let was_there = self.get(key)?.is_some();
        if was_there {
            self.changes.insert(key.to_owned(), None);
        }
        Ok(was_there)
    }
}

impl Open<'_> {
    fn compares(&self) -> Vec<Compare> {
        let base = &self.etcd.base;
        let mut compares = Vec::new();
        for key in &self.read {
            let stored = format!("{RECORDS}{key}");
            compares.push(unchanged(format!("{base}{stored}"), self.snapshot.modified(&stored)));
        }
        let mut marks = BTreeSet::new();
        for prefix in &self.listed {
            let below = Prefix::new(format!("{base}{RECORDS}{prefix}"));
            compares.push(none_changed_since(&below, self.snapshot.revision));
            marks.insert(directory(prefix));
        }
        for directory in marks {
            match directory {
                Some(directory) => {
                    let mark = format!("{GONE}{directory}");
                    compares.push(unchanged(format!("{base}{mark}"), self.snapshot.modified(&mark)));
                }
                None => {
                    let below = Prefix::new(format!("{base}{GONE}"));
                    compares.push(none_changed_since(&below, self.snapshot.revision));
                }
            }
        }
        compares.extend(self.leader.map(|revision| created_at(format!("{base}{LEADER}"), revision)));
        // What was moved away, or is being restored, takes no more changes.
        if self.snapshot.has_pki() && !self.read.contains(TRUST) {
            compares.push(exists(format!("{base}{RECORDS}{TRUST}")));
        }
        compares
    }

    /// `id` tells this change from all others.
    fn operations(&self, id: &str) -> Vec<RequestOp> {
        let base = &self.etcd.base;
        let mut marks = BTreeSet::new();
        let mut operations = Vec::new();
        for (key, change) in &self.changes {
            let stored = format!("{base}{RECORDS}{key}");
            match change {
                Some(value) => operations.push(put(stored, value.clone(), 0)),
                None => {
                    operations.push(delete(stored));
                    // Deleted keys do not show in comparisons of ranges.
                    marks.insert(directory(key).unwrap_or(key));
                }
            }
        }
        operations.push(put(format!("{base}{TIP}"), id, 0));
        operations.extend(marks.into_iter().map(|mark| put(format!("{base}{GONE}{mark}"), Vec::new(), 0)));
        operations
    }

    /// Somebody was faster: the next attempt is to see what they did.
    fn lost(&self, answer: &TxnResponse) -> Result<Committed, DbError> {
        if let Some(revision) = self.leader {
            let found = answer.responses.first().and_then(|one| match &one.response {
                Some(Response::ResponseRange(range)) => range.kvs.first().map(|pair| pair.create_revision),
                _ => None,
            });
            if found != Some(revision) {
                tracing::warn!("another replica leads now; what this one was about to do was not done");
                self.etcd.cache.change(|state| {
                    state.leads = state.leads.filter(|(known, _)| *known != revision);
                });
                return Ok(Committed::NotLeading);
            }
        }
        let seen = self.snapshot.revision;
        if self.etcd.cache.wait(SEE_OWN, |state| state.snapshot.revision > seen) {
            return Ok(Committed::LostRace);
        }
        // Another attempt would see the same.
        let trouble = self.etcd.cache.lock().trouble.clone();
        Err(trouble.map_or(DbError::Contended, DbError::Etcd))
    }
}

impl Transaction for Open<'_> {
    fn commit(self: Box<Self>) -> Result<Committed, DbError> {
        if self.changes.is_empty() {
            // What was read was so at one moment.
            return Ok(Committed::Yes);
        }
        let id = new_id().map_err(|error| DbError::Etcd(error.to_string()))?;
        let (compare, success) = (self.compares(), self.operations(&id));
        let operations = compare.len().max(success.len());
        if operations > MOST_OPERATIONS {
            return Err(DbError::TooLarge { operations });
        }
        let trouble = self.etcd.cache.lock().trouble.clone();
        if let Some(trouble) = trouble {
            return Err(DbError::Etcd(trouble));
        }
        let failure = vec![get(format!("{}{LEADER}", self.etcd.base))];
        let client = self.etcd.client.clone();
        let request = TxnRequest { compare, success, failure };
        let answer = self.etcd.block(async move { client.txn(request).await })?;
        self.etcd.cache.change(|state| match &answer {
            Ok(_) => state.refused = None,
            Err(error) => state.refused = refusal(error).or(state.refused.take()),
        });
        match answer {
            Ok(answer) if answer.succeeded => {
                let revision = answer.header.map_or(0, |header| header.revision);
                self.etcd.cache.wait(SEE_OWN, |state| state.snapshot.revision >= revision);
                Ok(Committed::Yes)
            }
            Ok(answer) => self.lost(&answer),
            Err(error) if self.etcd.was_done(&id, &error) => Ok(Committed::Yes),
            // The member went away without having done it, as far as can be known.
            Err(error) if error.is_gone() => Ok(Committed::LostRace),
            Err(error @ Error::Deadline) => {
                self.etcd.cache.change(|state| state.trouble = Some(error.to_string()));
                Err(DbError::Etcd(format!("{error} It may have done what was asked: look before you repeat it")))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The key is there, whatever happened to it.
fn exists(key: String) -> Compare {
    Compare {
        result: CompareResult::Greater.into(),
        target: CompareTarget::Create.into(),
        key: key.into_bytes(),
        target_union: Some(TargetUnion::CreateRevision(0)),
        range_end: Vec::new(),
    }
}

/// The first part of a key: `host` of `host/web`.
fn directory(key: &str) -> Option<&str> {
    key.split_once('/').map(|(first, _)| first)
}
