//! Keeps what is known of etcd current: see the picture in `mod.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use meshd_etcd::Error;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::remote::{News, Part, Remote, Stream, Told};
use crate::backoff::Backoff;
use crate::resources::{ResourceChange, ResourceNews};
use crate::resync::Resync;
use crate::{Refused, Sink, SourceEvent, Wanted};

/// How soon a member that stands still, or lost sight of the majority, is noticed: this and a call's deadline (4 s).
const PROBE_EVERY: Duration = Duration::from_secs(2);

/// What was read so far. Outlives connections.
#[derive(Debug, Default)]
struct Known {
    store: Arc<str>,
    parts: BTreeMap<Part, Followed>,
    /// Where resources lie, if they are read.
    resources: Option<Arc<str>>,
    wanted: Wanted,
    last_id: i64,
    resync: Resync,
}

#[derive(Debug, Default)]
struct Followed {
    /// As of which revision it is known; `None`: to be listed.
    position: Option<u64>,
    /// Of its watch on the present stream.
    id: i64,
}

pub(super) async fn run<R: Remote>(mut remote: R, mut wanted: watch::Receiver<Wanted>, sink: Sink) {
    let mut known = Known { resources: remote.resources(), ..Known::default() };
    // What an earlier life of this daemon knew beyond that is wanted no more.
    let begun_with = wanted.borrow().clone();
    sink.send(SourceEvent::Narrowed(begun_with)).await;
    let mut backoff = Backoff::default();
    loop {
        let started = Instant::now();
        if let Err(error) = follow(&mut remote, &mut known, &mut wanted, &sink).await {
            sink.send(SourceEvent::Unavailable { error: remote.explain(&error) }).await;
            remote.leave_member();
        }
        sleep(backoff.pause(started.elapsed(), fastrand::f64())).await;
    }
}

/// Until an error, or until what is known is to be read anew.
async fn follow<R: Remote>(
    remote: &mut R,
    known: &mut Known,
    wanted: &mut watch::Receiver<Wanted>,
    sink: &Sink,
) -> Result<(), Error> {
    let probed = remote.probe().await?;
    known.compare(&probed.store, probed.position);
    let asked = wanted.borrow_and_update().clone();
    known.resync.heed(&asked);
    known.adjust(&asked, sink).await;
    known.list_missing(remote, sink).await?;
    let mut watches = known.watch_all(remote).await?;
    sink.send(SourceEvent::InSync).await;

    let mut probes = interval(PROBE_EVERY);
    probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let resync_at = known.resync.at();
        tokio::select! {
            news = next(&mut watches) => {
                if known.take(news?, sink).await? == Outcome::Compacted {
                    return Ok(());
                }
            }
            _ = probes.tick() => {
                let probed = remote.probe().await?;
                if known.compare(&probed.store, probed.position) == Outcome::AnotherLife {
                    return Ok(());
                }
                sink.send(SourceEvent::InSync).await;
            }
            Ok(()) = wanted.changed() => {
                let asked = wanted.borrow_and_update().clone();
                known.resync.heed(&asked);
                for gone in known.adjust(&asked, sink).await {
                    if let Some(watches) = &mut watches {
                        watches.cancel(gone).await?;
                    }
                }
                known.list_missing(remote, sink).await?;
                known.watch_missing(remote, &mut watches).await?;
            }
            () = tokio::time::sleep_until(resync_at) => {
                let asked = known.wanted.clone();
                known.adjust(&asked, sink).await;
                known.list_again(remote, sink).await?;
                known.watch_missing(remote, &mut watches).await?;
                known.resync.begins();
            }
        }
    }
}

/// Without watches there is no news.
async fn next<S: Stream>(watches: &mut Option<S>) -> Result<News, Error> {
    match watches {
        Some(watches) => watches.next().await,
        None => std::future::pending().await,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    GoesOn,
    /// What a watch would need is forgotten there.
    Compacted,
    /// Another cluster, or one that was put back.
    AnotherLife,
}

impl Known {
    /// Forgets how far it was read when the store is not the one it was read from.
    fn compare(&mut self, store: &Arc<str>, position: u64) -> Outcome {
        let furthest = self.parts.values().filter_map(|followed| followed.position).max().unwrap_or(0);
        if self.store == *store && position >= furthest {
            return Outcome::GoesOn;
        }
        self.store = store.clone();
        self.parts.values_mut().for_each(|followed| followed.position = None);
        Outcome::AnotherLife
    }

    /// Follows what is wanted and nothing else. Returns the watches that are over.
    async fn adjust(&mut self, wanted: &Wanted, sink: &Sink) -> Vec<i64> {
        let services = wanted.scopes().into_iter().map(Part::Services);
        let parts: Vec<Part> = self.resources.iter().map(|_| Part::Resources).chain(services).collect();
        let mut over = Vec::new();
        // Routes that were passed over may be of a service that is new.
        if parts.iter().any(|part| *part != Part::Resources && !self.parts.contains_key(part)) {
            over.extend(self.parts.remove(&Part::Resources).map(|followed| followed.id));
        }
        let others = over.len();
        self.parts.retain(|part, followed| {
            let stays = parts.contains(part);
            over.extend((!stays).then_some(followed.id));
            stays
        });
        for part in parts {
            self.parts.entry(part).or_default();
        }
        self.wanted = wanted.clone();
        if over.len() > others {
            sink.send(SourceEvent::Narrowed(wanted.clone())).await;
        }
        over
    }

    async fn list_missing<R: Remote>(&mut self, remote: &mut R, sink: &Sink) -> Result<(), Error> {
        let missing = self.parts.iter().filter(|(_, followed)| followed.position.is_none());
        for part in missing.map(|(part, _)| part.clone()).collect::<Vec<_>>() {
            let position = self.list(&part, remote, sink).await?;
            self.listed(part, position, |_| 0);
        }
        Ok(())
    }

    /// Beside the watches, which go on: what they still tell of the time before is old news.
    async fn list_again<R: Remote>(&mut self, remote: &mut R, sink: &Sink) -> Result<(), Error> {
        for part in self.parts.keys().cloned().collect::<Vec<_>>() {
            let position = self.list(&part, remote, sink).await?;
            self.listed(part, position, |id| id);
        }
        Ok(())
    }

    /// What may not be read is not followed, until it is tried again.
    fn listed(&mut self, part: Part, position: Option<u64>, id: impl FnOnce(i64) -> i64) {
        match (self.parts.get_mut(&part), position) {
            (Some(followed), Some(_)) => (followed.position, followed.id) = (position, id(followed.id)),
            _ => drop(self.parts.remove(&part)),
        }
    }

    async fn list<R: Remote>(&self, part: &Part, remote: &mut R, sink: &Sink) -> Result<Option<u64>, Error> {
        let (event, position) = match remote.list(part).await {
            Ok(listed) => listed,
            // Services are worth having without.
            Err(error) if *part == Part::Resources && error.is_denied() => {
                sink.send(self.may_not_read(&error)).await;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        sink.send(self.of_concern(event)).await;
        Ok(Some(position))
    }

    fn may_not_read(&self, error: &Error) -> SourceEvent {
        let prefix = self.resources.clone().unwrap_or_default();
        let reason = format!(
            "routes and policies cannot be read: {error}; grant the user of this host to read keys below {prefix}/, or \
             take `routes` and `policies` out of `provides`"
        );
        let refused = Refused { key: prefix.clone(), problems: vec![reason] };
        let changes = vec![ResourceChange::Refused(refused.into())];
        SourceEvent::Resources(ResourceNews::Changed { prefix, position: 0, changes })
    }

    fn of_concern(&self, event: SourceEvent) -> SourceEvent {
        match event {
            SourceEvent::Resources(news) => SourceEvent::Resources(news.wanted(&self.wanted)),
            event => event,
        }
    }

    async fn watch_all<R: Remote>(&mut self, remote: &mut R) -> Result<Option<R::Watches>, Error> {
        self.parts.values_mut().for_each(|followed| followed.id = 0);
        let mut watches = None;
        self.watch_missing(remote, &mut watches).await?;
        Ok(watches)
    }

    async fn watch_missing<R: Remote>(
        &mut self,
        remote: &mut R,
        watches: &mut Option<R::Watches>,
    ) -> Result<(), Error> {
        for (part, followed) in self.parts.iter_mut().filter(|(_, followed)| followed.id == 0) {
            self.last_id += 1;
            let (id, from) = (self.last_id, followed.position.unwrap_or(0) + 1);
            match watches {
                Some(watches) => remote.add(watches, id, part, from).await?,
                None => *watches = Some(remote.watch(id, part, from).await?),
            }
            followed.id = id;
        }
        Ok(())
    }

    async fn take(&mut self, news: News, sink: &Sink) -> Result<Outcome, Error> {
        // etcd refuses to begin a watch under no id at all.
        if let Some(reason) = news.ended.as_ref().filter(|_| news.id < 0) {
            return Err(Error::gone(&format!("a watch was refused: {reason}")));
        }
        // A watch that was given up may still say something, or that it is over.
        let Some((part, followed)) = self.parts.iter_mut().find(|(_, followed)| followed.id == news.id) else {
            return Ok(Outcome::GoesOn);
        };
        if news.compacted {
            followed.position = None;
            return Ok(Outcome::Compacted);
        }
        if let Some(reason) = news.ended {
            return Err(Error::gone(&format!("the watch ended: {reason}")));
        }
        let known = followed.position.unwrap_or(0);
        let new: Vec<_> = news.changes.into_iter().filter(|(revision, _)| *revision > known).collect();
        if let Some(position) = new.iter().map(|(revision, _)| *revision).max() {
            followed.position = Some(position);
            let told = new.into_iter().map(|(_, told)| told);
            let event = match part.clone() {
                Part::Services(scope) => {
                    SourceEvent::Changed { scope, position, changes: told.filter_map(Told::service).collect() }
                }
                Part::Resources => {
                    let prefix = self.resources.clone().unwrap_or_default();
                    let changes = told.filter_map(Told::resource).collect();
                    SourceEvent::Resources(ResourceNews::Changed { prefix, position, changes })
                }
            };
            sink.send(self.of_concern(event)).await;
        }
        Ok(Outcome::GoesOn)
    }
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
