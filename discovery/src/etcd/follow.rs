//! Keeps what is known of etcd current: see the picture in `mod.rs`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use meshd_etcd::Error;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::remote::{News, Remote, Stream};
use crate::backoff::Backoff;
use crate::resync::Resync;
use crate::{Scope, Sink, SourceEvent, Wanted};

/// How soon a member that stands still, or lost sight of the majority, is noticed: this and a call's deadline (4 s).
const PROBE_EVERY: Duration = Duration::from_secs(2);

/// What was read so far. Outlives connections.
#[derive(Debug, Default)]
struct Known {
    store: Arc<str>,
    scopes: BTreeMap<Scope, Followed>,
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
    let mut known = Known::default();
    // What an earlier life of this daemon knew beyond that is wanted no more.
    let begun_with = wanted.borrow().clone();
    sink.send(SourceEvent::Narrowed(begun_with)).await;
    let mut backoff = Backoff::default();
    loop {
        let started = Instant::now();
        if let Err(error) = follow(&mut remote, &mut known, &mut wanted, &sink).await {
            sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
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
                known.list_again(remote, sink).await?;
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
        let furthest = self.scopes.values().filter_map(|followed| followed.position).max().unwrap_or(0);
        if self.store == *store && position >= furthest {
            return Outcome::GoesOn;
        }
        self.store = store.clone();
        self.scopes.values_mut().for_each(|followed| followed.position = None);
        Outcome::AnotherLife
    }

    /// Follows what is wanted and nothing else. Returns the watches that are over.
    async fn adjust(&mut self, wanted: &Wanted, sink: &Sink) -> Vec<i64> {
        let scopes = wanted.scopes();
        let mut over = Vec::new();
        self.scopes.retain(|scope, followed| {
            let stays = scopes.contains(scope);
            over.extend((!stays).then_some(followed.id));
            stays
        });
        for scope in scopes {
            self.scopes.entry(scope).or_default();
        }
        if !over.is_empty() {
            sink.send(SourceEvent::Narrowed(wanted.clone())).await;
        }
        over
    }

    async fn list_missing<R: Remote>(&mut self, remote: &mut R, sink: &Sink) -> Result<(), Error> {
        for (scope, followed) in self.scopes.iter_mut().filter(|(_, followed)| followed.position.is_none()) {
            followed.position = Some(list(remote, scope, sink).await?);
            followed.id = 0;
        }
        Ok(())
    }

    /// Beside the watches, which go on: what they still tell of the time before is old news.
    async fn list_again<R: Remote>(&mut self, remote: &mut R, sink: &Sink) -> Result<(), Error> {
        for (scope, followed) in &mut self.scopes {
            followed.position = Some(list(remote, scope, sink).await?);
        }
        Ok(())
    }

    async fn watch_all<R: Remote>(&mut self, remote: &mut R) -> Result<Option<R::Watches>, Error> {
        self.scopes.values_mut().for_each(|followed| followed.id = 0);
        let mut watches = None;
        self.watch_missing(remote, &mut watches).await?;
        Ok(watches)
    }

    async fn watch_missing<R: Remote>(
        &mut self,
        remote: &mut R,
        watches: &mut Option<R::Watches>,
    ) -> Result<(), Error> {
        for (scope, followed) in self.scopes.iter_mut().filter(|(_, followed)| followed.id == 0) {
            self.last_id += 1;
            let (id, from) = (self.last_id, followed.position.unwrap_or(0) + 1);
            match watches {
                Some(watches) => remote.add(watches, id, scope, from).await?,
                None => *watches = Some(remote.watch(id, scope, from).await?),
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
        let Some((scope, followed)) = self.scopes.iter_mut().find(|(_, followed)| followed.id == news.id) else {
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
            let changes = new.into_iter().map(|(_, change)| change).collect();
            sink.send(SourceEvent::Changed { scope: scope.clone(), position, changes }).await;
        }
        Ok(Outcome::GoesOn)
    }
}

async fn list<R: Remote>(remote: &mut R, scope: &Scope, sink: &Sink) -> Result<u64, Error> {
    let listing = remote.list(scope).await?;
    let position = listing.epoch.position;
    sink.send(SourceEvent::Listed(listing)).await;
    Ok(position)
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
