//! The loop between sources and everybody who asks the directory.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Serialize, Serializer};
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};

use crate::config::Configured;
use crate::merge::{Layer, LayerReport, merge};
use crate::{Directory, Offer, ServiceName, Sink, SourceEvent};

/// Sources wait when the watcher is this many events behind.
const INBOX: usize = 64;

/// How one source is doing, for `meshd status` and `meshd check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceHealth {
    pub name: String,
    pub kind: &'static str,
    /// Services in the directory that come from this source.
    pub services: usize,
    /// Services another source of higher precedence defines as well.
    pub shadowed: Vec<ServiceName>,
    /// When what it offers changed.
    #[serde(serialize_with = "unix_seconds")]
    pub last_change: Option<SystemTime>,
    /// When it was last known to be current.
    #[serde(serialize_with = "unix_seconds")]
    pub last_ok: Option<SystemTime>,
    /// All that is wrong now; empty when healthy. Each says where and what to do.
    pub errors: Vec<String>,
}

fn unix_seconds<S: Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    time.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map(|since| since.as_secs()).serialize(serializer)
}

/// Runs the sources, merges what they say and publishes it.
pub struct Watcher {
    sources: Vec<Configured>,
    states: Vec<State>,
    directory: watch::Sender<Arc<Directory>>,
    health: watch::Sender<Arc<Vec<SourceHealth>>>,
}

/// What one source said last.
#[derive(Default)]
struct State {
    offers: Vec<Offer>,
    problems: Vec<String>,
    unavailable: Option<String>,
    /// The source's task is over. Its last events may still be in the inbox then, and do not bring it back.
    ended: Option<String>,
    last_change: Option<SystemTime>,
    last_ok: Option<SystemTime>,
}

impl Watcher {
    /// `sources` in order of precedence, first wins.
    pub fn new(sources: Vec<Configured>) -> Watcher {
        let states = sources.iter().map(|_| State::default()).collect();
        let health = sources.iter().map(|configured| SourceHealth {
            name: configured.source.name().to_owned(),
            kind: configured.source.kind(),
            services: 0,
            shadowed: Vec::new(),
            last_change: None,
            last_ok: None,
            errors: Vec::new(),
        });
        let health = watch::Sender::new(Arc::new(health.collect()));
        Watcher { sources, states, directory: watch::Sender::default(), health }
    }

    pub fn directory(&self) -> watch::Receiver<Arc<Directory>> {
        self.directory.subscribe()
    }

    pub fn health(&self) -> watch::Receiver<Arc<Vec<SourceHealth>>> {
        self.health.subscribe()
    }

    /// Never returns. Dropping the future ends the sources.
    pub async fn run(mut self) {
        let (events, mut inbox) = mpsc::channel(INBOX);
        let (mut tasks, mut indexes, mut authorities) = (JoinSet::new(), HashMap::new(), Vec::new());
        for (index, configured) in std::mem::take(&mut self.sources).into_iter().enumerate() {
            let task = tasks.spawn(configured.source.watch(Sink::new(index, events.clone())));
            indexes.insert(task.id(), index);
            authorities.push(configured.authority);
        }
        loop {
            tokio::select! {
                // `events` stays open above, so the inbox never ends.
                Some((index, event)) = inbox.recv() => {
                    self.states[index].note(event);
                    // One merge for everything that is already waiting.
                    while let Ok((index, event)) = inbox.try_recv() {
                        self.states[index].note(event);
                    }
                }
                Some(ended) = tasks.join_next_with_id(), if !tasks.is_empty() => {
                    let (id, reason) = why_it_ended(ended);
                    self.states[indexes[&id]].ended = Some(reason);
                }
            }
            self.publish(&authorities);
        }
    }

    fn publish(&self, authorities: &[crate::Authority]) {
        let before = self.health.borrow().clone();
        let layers: Vec<Layer<'_>> = (self.states.iter().zip(authorities).zip(before.iter()))
            .map(|((state, authority), health)| Layer { source: &health.name, authority, offers: &state.offers })
            .collect();
        let previous = self.directory.borrow().clone();
        let merged = merge(&previous, &layers);
        if !merged.directory.is_same_as(&previous) {
            tracing::info!(services = merged.directory.len(), "directory changed");
            self.directory.send_replace(Arc::new(merged.directory));
        }
        let now = (before.iter().zip(&self.states).zip(merged.reports))
            .map(|((old, state), report)| state.health(old, report))
            .collect::<Vec<_>>();
        for (old, new) in before.iter().zip(&now) {
            log_difference(old, new);
        }
        self.health.send_if_modified(|current| {
            let changed = **current != now;
            *current = Arc::new(now);
            changed
        });
    }
}

impl State {
    fn note(&mut self, event: SourceEvent) {
        let now = SystemTime::now();
        match event {
            SourceEvent::Snapshot { offers, problems } => {
                if self.last_change.is_none() || self.offers != offers {
                    self.last_change = Some(now);
                }
                (self.offers, self.problems, self.unavailable) = (offers, problems, None);
                self.last_ok = Some(now);
            }
            SourceEvent::InSync => (self.last_ok, self.unavailable) = (Some(now), None),
            SourceEvent::Unavailable { error } => self.unavailable = Some(error),
        }
    }

    fn health(&self, old: &SourceHealth, report: LayerReport) -> SourceHealth {
        let own = self.ended.iter().chain(&self.unavailable).cloned();
        let errors = own.chain(report.refused).chain(self.problems.iter().cloned());
        SourceHealth {
            name: old.name.clone(),
            kind: old.kind,
            services: report.accepted,
            shadowed: report.shadowed,
            last_change: self.last_change,
            last_ok: self.last_ok,
            errors: errors.collect(),
        }
    }
}

fn why_it_ended(ended: Result<(Id, ()), JoinError>) -> (Id, String) {
    let remedy = "what it said last stays in force; restart meshd and report this";
    match ended {
        Ok((id, ())) => (id, format!("the source ended by itself; {remedy}")),
        Err(error) => (error.id(), format!("the source failed inside ({error}); {remedy}")),
    }
}

/// Each error once when it appears, and once when all are gone.
fn log_difference(old: &SourceHealth, new: &SourceHealth) {
    for error in new.errors.iter().filter(|error| !old.errors.contains(error)) {
        tracing::warn!(source = new.name, "{error}");
    }
    for service in new.shadowed.iter().filter(|service| !old.shadowed.contains(service)) {
        tracing::warn!(source = new.name, %service, "also defined by a source listed earlier in meshd.toml, which holds");
    }
    if !old.errors.is_empty() && new.errors.is_empty() {
        tracing::info!(source = new.name, "source is well again");
    }
}

/// Waits until every source has said something, good or bad: before that an empty directory means nothing.
pub async fn settled(health: &mut watch::Receiver<Arc<Vec<SourceHealth>>>) {
    let answered = |source: &SourceHealth| source.last_ok.is_some() || !source.errors.is_empty();
    // An error means the watcher is gone, and nothing will be said any more.
    let _ = health.wait_for(|sources| sources.iter().all(answered)).await;
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
