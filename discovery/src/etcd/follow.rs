//! Keeps what is known of etcd current: see the picture in `mod.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use meshd_etcd::Error;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::beside::{self, Beside, Job};
use super::remote::{Listed, News, Part, Remote, Stream, Told};
use crate::backoff::Backoff;
use crate::resources::{ResourceChange, ResourceNews};
use crate::resync::Resync;
use crate::{Change, Epoch, Listing, Refused, Scope, ServiceName, Sink, SourceEvent, Wanted};

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
    was_away: bool,
    /// Services to be read again.
    suspects: BTreeSet<ServiceName>,
    /// Lists beside the watches fail; new parts alone are read until then.
    rests_until: Option<Instant>,
    rests: Backoff,
}

#[derive(Debug, Default)]
struct Followed {
    /// As of which revision it is known; `None`: to be listed.
    position: Option<u64>,
    /// Of its watch on the present stream.
    id: i64,
    /// To be listed again.
    again: bool,
    /// Services of it that were read later than that, and as of which revision.
    reread: BTreeMap<ServiceName, u64>,
}

pub(super) async fn run<R: Remote + 'static>(mut remote: R, mut wanted: watch::Receiver<Wanted>, sink: Sink) {
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
            known.was_away = true;
        }
        backoff.rest(started).await;
    }
}

/// Until an error, or until what is known is to be read anew.
async fn follow<R: Remote + 'static>(
    remote: &mut R,
    known: &mut Known,
    wanted: &mut watch::Receiver<Wanted>,
    sink: &Sink,
) -> Result<(), Error> {
    let probed = remote.probe().await?;
    known.compare(&probed.store, probed.position);
    let asked = wanted.borrow_and_update().clone();
    known.heed(&asked, sink).await;
    known.list_missing(remote, sink).await?;
    let mut watches = known.watch_all(remote).await?;
    sink.send(SourceEvent::InSync).await;
    if std::mem::take(&mut known.was_away) {
        known.resync.is_back(fastrand::f64());
    }

    let mut probes = interval(PROBE_EVERY);
    probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut beside = None;
    loop {
        let resync_at = known.resync.at();
        if beside.is_none() {
            beside = known.next_list().map(|job| Beside::begin(job, known.furthest(), remote));
        }
        tokio::select! {
            news = next(&mut watches) => {
                if known.take(news?, remote, &mut beside, sink).await? == Outcome::Compacted {
                    return Ok(());
                }
            }
            listed = beside::answer(&mut beside) => {
                if let Some(beside) = beside.take()
                    && known.take_list(beside, listed, sink).await? == Outcome::AnotherLife
                {
                    return Ok(());
                }
                known.watch_missing(remote, &mut watches).await?;
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
                for gone in known.heed(&asked, sink).await {
                    if let Some(watches) = &mut watches {
                        watches.cancel(gone).await?;
                    }
                }
            }
            () = tokio::time::sleep_until(resync_at) => {
                // What could not be read may be tried again.
                let asked = known.wanted.clone();
                known.adjust(&asked, sink).await;
                known.parts.values_mut().for_each(|followed| followed.again = true);
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
        if self.store == *store && position >= self.furthest() {
            return Outcome::GoesOn;
        }
        self.begin_anew(store);
        Outcome::AnotherLife
    }

    fn begin_anew(&mut self, store: &Arc<str>) {
        self.store = store.clone();
        self.parts.values_mut().for_each(|followed| *followed = Followed::default());
    }

    fn furthest(&self) -> u64 {
        self.parts.values().filter_map(|followed| followed.position).max().unwrap_or(0)
    }

    async fn heed(&mut self, wanted: &Wanted, sink: &Sink) -> Vec<i64> {
        self.suspects.extend(self.resync.heed(wanted));
        self.adjust(wanted, sink).await
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

    /// Before there are watches, so that nobody waits for it.
    async fn list_missing<R: Remote>(&mut self, remote: &mut R, sink: &Sink) -> Result<(), Error> {
        while let Some(part) = self.missing() {
            let listed = remote.list(&part).await;
            self.take_part(part, listed, sink).await?;
        }
        Ok(())
    }

    fn missing(&self) -> Option<Part> {
        self.parts.iter().find(|(_, followed)| followed.position.is_none()).map(|(part, _)| part.clone())
    }

    /// What is to be read beside the watches now: what is new, what is suspected, what is due again.
    fn next_list(&mut self) -> Option<Job> {
        if let Some(part) = self.missing() {
            return Some(Job::Part(part));
        }
        // Looked at again with every probe.
        if self.rests_until.is_some_and(|until| until > Instant::now()) {
            return None;
        }
        while let Some(name) = self.suspects.pop_first() {
            let holds = |part: &&Part| matches!(part, Part::Services(scope) if scope.holds(&name));
            match self.parts.keys().find(holds) {
                Some(Part::Services(Scope::Service(_))) => {
                    let part = Part::Services(Scope::Service(name));
                    self.parts.entry(part.clone()).or_default().again = true;
                    return Some(Job::Part(part));
                }
                Some(Part::Services(within)) => return Some(Job::Service { within: within.clone(), name }),
                // Nobody wants it any more.
                _ => {}
            }
        }
        self.parts.iter().find(|(_, followed)| followed.again).map(|(part, _)| Job::Part(part.clone()))
    }

    async fn take_list(
        &mut self,
        beside: Beside,
        listed: Result<Listed, Error>,
        sink: &Sink,
    ) -> Result<Outcome, Error> {
        let listed = match listed {
            Ok(listed) if listed.epoch.store != self.store || listed.epoch.position < beside.begun_at => {
                self.begin_anew(&listed.epoch.store);
                return Ok(Outcome::AnotherLife);
            }
            Ok(listed) => listed,
            // The watches go on, and probes say what is wrong with the member.
            Err(error) if self.may_be_asked_again(&beside.job, &error) => {
                self.rests_until = Some(Instant::now() + self.rests.pause(Duration::ZERO, fastrand::f64()));
                if let Job::Service { name, .. } = beside.job {
                    self.suspects.insert(name);
                }
                return Ok(Outcome::GoesOn);
            }
            Err(error) => {
                self.take_part(beside.job.part(), Err(error), sink).await?;
                return Ok(Outcome::GoesOn);
            }
        };
        self.rests = Backoff::default();
        let (job, listed) = beside.bring_up(listed);
        match job {
            Job::Part(part) => self.take_part(part, Ok(listed), sink).await?,
            Job::Service { name, within } => self.take_service(name, within, listed, sink).await,
        }
        Ok(Outcome::GoesOn)
    }

    fn may_be_asked_again(&self, job: &Job, error: &Error) -> bool {
        let is_known = self.parts.get(&job.part()).is_some_and(|followed| followed.position.is_some());
        is_known
            && (error.is_gone() || error.is_compacted() || matches!(error, Error::Deadline | Error::Unreachable(_)))
    }

    async fn take_part(&mut self, part: Part, listed: Result<Listed, Error>, sink: &Sink) -> Result<(), Error> {
        let Listed { epoch, told } = match listed {
            Ok(listed) => listed,
            // Services are worth having without. It is tried again when all is read again.
            Err(error) if part == Part::Resources && error.is_denied() => {
                self.parts.remove(&part);
                sink.send(self.may_not_read(&error)).await;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        // It may be wanted no more.
        let Some(followed) = self.parts.get_mut(&part) else { return Ok(()) };
        // Its watch, if it has one, goes on: what it still tells of the time before is old news.
        *followed = Followed { position: Some(epoch.position), id: followed.id, ..Followed::default() };
        let event = match part {
            Part::Services(scope) => SourceEvent::Listed(listing(scope, epoch, told)),
            Part::Resources => {
                let (prefix, told) = (self.resources.clone().unwrap_or_default(), told.into_iter());
                SourceEvent::Resources(ResourceNews::listed(prefix, epoch, told.filter_map(Told::resource)))
            }
        };
        sink.send(self.of_concern(event)).await;
        Ok(())
    }

    async fn take_service(&mut self, name: ServiceName, within: Scope, listed: Listed, sink: &Sink) {
        let Some(followed) = self.parts.get_mut(&Part::Services(within.clone())) else { return };
        followed.reread.insert(name.clone(), listed.epoch.position);
        let listing = listing(Scope::Service(name), listed.epoch, listed.told);
        sink.send(SourceEvent::Reread { within, listing }).await;
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
            // What is not listed yet has nothing to be watched from; its list comes.
            let Some(position) = followed.position else { continue };
            self.last_id += 1;
            let (id, from) = (self.last_id, position + 1);
            match watches {
                Some(watches) => remote.add(watches, id, part, from).await?,
                None => *watches = Some(remote.watch(id, part, from).await?),
            }
            followed.id = id;
        }
        Ok(())
    }

    async fn take<R: Remote>(
        &mut self,
        news: News,
        remote: &R,
        beside: &mut Option<Beside>,
        sink: &Sink,
    ) -> Result<Outcome, Error> {
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
        let service_of = |key: &str| remote.service_of(key);
        let new: Vec<_> = news.changes.into_iter().filter(|news| followed.is_new(news, service_of)).collect();
        if let Some(beside) = beside {
            beside.heard(part, &new, service_of);
        }
        if let Some(position) = new.iter().map(|(revision, _)| *revision).max() {
            followed.position = Some(position);
            followed.reread.retain(|_, as_of| *as_of > position);
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

impl Followed {
    fn is_new(&self, (revision, told): &(u64, Told), service_of: impl Fn(&str) -> Option<ServiceName>) -> bool {
        let is_reread = || {
            let as_of = service_of(told.key()).and_then(|service| self.reread.get(&service).copied());
            as_of.is_some_and(|as_of| *revision <= as_of)
        };
        *revision > self.position.unwrap_or(0) && (self.reread.is_empty() || !is_reread())
    }
}

fn listing(scope: Scope, epoch: Epoch, told: Vec<Told>) -> Listing {
    let mut listing = Listing::empty(scope, epoch);
    for change in told.into_iter().filter_map(Told::service) {
        match change {
            Change::Set(record) => listing.records.push(record),
            Change::Refused(refused) => listing.refused.push(refused),
            Change::Removed(_) => {}
        }
    }
    listing
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
