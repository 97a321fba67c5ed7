//! Keeps what is known of the cluster current: see the picture in `mod.rs`. The loop decides and tells; what takes time is
//! under way beside it (`work.rs`), so that an event is told at once whatever else the server is asked.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};

use super::area::{Area, areas};
use super::error::Error;
use super::leases::Leases;
use super::read::Reader;
use super::remote::Remote;
use super::resources::Life;
use super::work::{News, Work};
use crate::backoff::Backoff;
use crate::resync::Resync;
use crate::{Epoch, Scope, ServiceName, Sink, SourceEvent, Wanted};

/// How soon a server that stands still, or lost sight of its etcd, is noticed: this and a call's deadline (4 s). A
/// thousand hosts ask 200 times a second, each for one small object.
const PROBE_EVERY: Duration = Duration::from_secs(5);

/// `told`: where those who follow other kinds hear of the server.
pub(super) async fn run<R: Remote>(
    remote: R,
    reader: Reader,
    leases: Leases,
    mut wanted: watch::Receiver<Wanted>,
    sink: Sink,
    told: watch::Sender<Life>,
) {
    let mut follower = Follower {
        remote,
        work: Work::new(),
        is_in_sync: false,
        reader,
        sink,
        life: Epoch::default(),
        areas: BTreeMap::new(),
        leases,
        areas_went: false,
        resync: Resync::default(),
        told,
    };
    // What an earlier life of this daemon knew beyond that is wanted no more.
    let begun_with = wanted.borrow().clone();
    follower.sink.send(SourceEvent::Narrowed(begun_with)).await;
    let mut backoff = Backoff::default();
    loop {
        let started = Instant::now();
        let Err(error) = follower.follow(&mut wanted).await;
        follower.sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
        follower.leave();
        backoff.rest(started).await;
    }
}

pub(super) struct Follower<R> {
    pub(super) remote: R,
    /// By the present connection.
    pub(super) work: Work,
    /// All that can be read was read by it.
    is_in_sync: bool,
    pub(super) reader: Reader,
    pub(super) sink: Sink,
    /// Of the store, and how far it had come.
    pub(super) life: Epoch,
    pub(super) areas: BTreeMap<Scope, Area>,
    pub(super) leases: Leases,
    /// And slices that Leases keep with them.
    pub(super) areas_went: bool,
    resync: Resync,
    told: watch::Sender<Life>,
}

impl<R: Remote> Follower<R> {
    /// Until an error.
    async fn follow(&mut self, wanted: &mut watch::Receiver<Wanted>) -> Result<Infallible, Error> {
        (self.work, self.is_in_sync) = (Work::new(), false);
        self.compare(self.remote.probe().await?);
        self.leases.begin_anew(Instant::now());
        self.want(wanted).await;

        let mut probes = interval_at(Instant::now() + PROBE_EVERY, PROBE_EVERY);
        probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.catch_up().await;
            let resync_at = self.resync.at();
            tokio::select! {
                news = self.work.next() => self.take_all(news?).await?,
                _ = probes.tick() => self.work.probe(&self.remote),
                Ok(()) = wanted.changed() => self.want(wanted).await,
                () = sleep_until(resync_at) => self.list_all_again(),
                () = until(self.leases.look_at()) => self.leases.due = true,
            }
        }
    }

    fn leave(&mut self) {
        self.areas.values_mut().for_each(Area::end_tasks);
        self.leases.begin_anew(Instant::now());
        self.work = Work::new();
        self.remote.leave();
        self.told.send_modify(|life| life.connection += 1);
    }

    /// Everything that waits is taken before anything is told of it.
    async fn take_all(&mut self, all: Vec<News>) -> Result<(), Error> {
        let mut touched = BTreeMap::new();
        let mut taken = Ok(());
        for news in all {
            taken = self.take(news, &mut touched).await;
            if taken.is_err() {
                break;
            }
        }
        // Also where it ends here: its watch will not say it again.
        self.tell(touched).await;
        taken
    }

    pub(super) async fn take_probe(&mut self, answer: Result<Epoch, Error>) -> Result<(), Error> {
        match answer {
            Ok(life) => {
                self.compare(life);
                if self.is_in_sync {
                    self.sink.send(SourceEvent::InSync).await;
                }
                Ok(())
            }
            // To begin anew would give it more to do.
            Err(error @ Error::Busy { .. }) => {
                self.sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Forgets how far it was read when the store is not the one it was read from.
    fn compare(&mut self, now: Epoch) {
        if self.life.store != now.store || now.position < self.life.position {
            self.areas.values_mut().for_each(Area::forget_positions);
            self.leases.begin_anew(Instant::now());
        }
        self.told.send_if_modified(|life| {
            let changed = life.epoch != now;
            life.epoch.clone_from(&now);
            changed
        });
        self.life = now;
    }

    fn list_all_again(&mut self) {
        self.resync.begins();
        self.areas.values_mut().for_each(Area::read_again);
    }

    async fn want(&mut self, wanted: &mut watch::Receiver<Wanted>) {
        let asked = wanted.borrow_and_update().clone();
        let suspects = self.resync.heed(&asked);
        self.adjust(&asked).await;
        suspects.iter().for_each(|service| self.read_service_again(service));
    }

    /// Follows what is wanted and nothing else.
    async fn adjust(&mut self, wanted: &Wanted) {
        let mut now = areas(wanted);
        let mut narrowed = false;
        self.areas.retain(|scope, area| {
            let told_as = now.remove(scope);
            self.areas_went |= told_as.is_none();
            narrowed |= told_as.is_none();
            told_as.map(|told_as| narrowed |= area.want(told_as)).is_some()
        });
        for (scope, told_as) in now {
            self.areas.insert(scope.clone(), Area::new(scope, told_as));
        }
        let looked_up: BTreeSet<ServiceName> = wanted.looked_up.difference(&wanted.services).cloned().collect();
        for area in self.areas.values_mut() {
            area.looked_up.clone_from(&looked_up);
        }
        if narrowed {
            self.sink.send(SourceEvent::Narrowed(wanted.clone())).await;
        }
    }

    /// Has the server asked for what is due, and tells when there is nothing left to ask.
    async fn catch_up(&mut self) {
        self.begin_lists_and_watches();
        self.look_after_leases().await;
        let now = Instant::now();
        if !self.is_in_sync && self.areas.values().all(|area| area.is_caught_up(now)) {
            self.is_in_sync = true;
            self.sink.send(SourceEvent::InSync).await;
        }
    }
}

/// For good where there is nothing to wait for.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
