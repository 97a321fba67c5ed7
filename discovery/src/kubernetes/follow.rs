//! Keeps what is known of the cluster current: see the picture in `mod.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};

use super::error::Error;
use super::known::{Area, Watching, areas};
use super::leases::{Keeper, Leases};
use super::objects::{Event, Kind, Object};
use super::read::Reader;
use super::remote::{Remote, Watch};
use super::resources::Life;
use crate::backoff::Backoff;
use crate::resync::Resync;
use crate::{Change, Epoch, Refused, Scope, ServiceName, Sink, SourceEvent, Wanted};

/// How soon a server that stands still, or lost sight of its etcd, is noticed: this and a call's deadline (4 s). A
/// thousand hosts ask 200 times a second, each for one small object.
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// How soon a role that was granted is noticed, and who has too much to do is asked again.
const PUT_OFF: Duration = Duration::from_secs(15);
/// How soon Leases are asked for again where that failed: a dead host is to be known within seconds.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// A watch that ends sooner ends for another reason than its age.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);
/// Events waiting to be taken; the watches wait when it is full.
const INBOX: usize = 256;
/// In this order: the selector of a Service says which pods, and pods of a slice that are known need not be waited for.
const KINDS: [Kind; 4] = [Kind::Service, Kind::Slice, Kind::Pod, Kind::Mesh];

/// `told`: where those who follow other kinds hear of the server.
pub(super) async fn run<R: Remote>(
    mut remote: R,
    reader: Reader,
    leases: Leases,
    mut wanted: watch::Receiver<Wanted>,
    sink: Sink,
    told: watch::Sender<Life>,
) {
    let mut follower = Follower {
        reader,
        sink,
        life: Epoch::default(),
        areas: BTreeMap::new(),
        leases,
        areas_went: false,
        watches: 0,
        resync: Resync::default(),
        told,
    };
    // What an earlier life of this daemon knew beyond that is wanted no more.
    let begun_with = wanted.borrow().clone();
    follower.sink.send(SourceEvent::Narrowed(begun_with)).await;
    let mut backoff = Backoff::default();
    loop {
        let started = Instant::now();
        let Err(error) = follower.follow(&mut remote, &mut wanted).await;
        follower.sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
        follower.areas.values_mut().for_each(Area::end_watches);
        follower.leases.begin_anew(Instant::now());
        remote.leave();
        follower.told.send_modify(|life| life.connection += 1);
        sleep(backoff.pause(started.elapsed(), fastrand::f64())).await;
    }
}

struct Follower {
    reader: Reader,
    sink: Sink,
    /// Of the store, and how far it had come.
    life: Epoch,
    areas: BTreeMap<Scope, Area>,
    leases: Leases,
    /// And slices that Leases keep with them.
    areas_went: bool,
    /// How many were begun.
    watches: u64,
    resync: Resync,
    told: watch::Sender<Life>,
}

/// Which watch says something.
#[derive(Debug)]
struct Origin {
    area: Scope,
    kind: Kind,
    number: u64,
    since: Instant,
}

/// `None`: the watch came to its end.
type News = (Arc<Origin>, Result<Option<Event>, Error>);

/// The watches of one connection; they end with it.
struct Watches {
    tasks: JoinSet<()>,
    news: mpsc::Sender<News>,
    inbox: mpsc::Receiver<News>,
}

impl Watches {
    fn new() -> Watches {
        let (news, inbox) = mpsc::channel(INBOX);
        Watches { tasks: JoinSet::new(), news, inbox }
    }

    fn begin(&mut self, mut watch: impl Watch + Send + 'static, origin: Origin) -> Watching {
        let (news, number) = (self.news.clone(), origin.number);
        let origin = Arc::new(origin);
        while self.tasks.try_join_next().is_some() {}
        let task = self.tasks.spawn(async move {
            loop {
                let next = watch.next().await;
                let goes_on = matches!(next, Ok(Some(_)));
                // Nobody listens: the task is being ended.
                if news.send((origin.clone(), next)).await.is_err() || !goes_on {
                    return;
                }
            }
        });
        Watching { number, task }
    }
}

/// Services of areas that may have changed.
type Touched = BTreeMap<Scope, BTreeSet<ServiceName>>;

impl Follower {
    /// Until an error.
    async fn follow<R: Remote>(
        &mut self,
        remote: &mut R,
        wanted: &mut watch::Receiver<Wanted>,
    ) -> Result<Infallible, Error> {
        let mut watches = Watches::new();
        self.leases.begin_anew(Instant::now());
        self.compare(remote.probe().await?);
        let asked = wanted.borrow_and_update().clone();
        self.heed(&asked);
        self.adjust(&asked).await;
        self.catch_up(remote, &mut watches).await?;
        self.sink.send(SourceEvent::InSync).await;

        let mut probes = interval_at(Instant::now() + PROBE_EVERY, PROBE_EVERY);
        probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let resync_at = self.resync.at();
            tokio::select! {
                // We hold a sender, so this never ends.
                Some(news) = watches.inbox.recv() => {
                    let mut touched = Touched::new();
                    let mut taken = self.take(news, &mut touched);
                    // One answer to everything that is already waiting.
                    for _ in 0..INBOX {
                        let Some(news) = watches.inbox.try_recv().ok().filter(|_| taken.is_ok()) else { break };
                        taken = self.take(news, &mut touched);
                    }
                    // Also where it ends here: its watch will not say it again.
                    self.tell(touched).await;
                    taken?;
                }
                _ = probes.tick() => match remote.probe().await {
                    Ok(life) => {
                        self.compare(life);
                        self.sink.send(SourceEvent::InSync).await;
                    }
                    // To begin anew would give it more to do.
                    Err(error @ Error::Busy(_)) => {
                        self.sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
                        continue;
                    }
                    Err(error) => return Err(error),
                },
                Ok(()) = wanted.changed() => {
                    let asked = wanted.borrow_and_update().clone();
                    self.heed(&asked);
                    self.adjust(&asked).await;
                }
                () = tokio::time::sleep_until(resync_at) => self.list_all_again(),
                () = until(self.leases.look_at()) => self.leases.due = true,
            }
            self.catch_up(remote, &mut watches).await?;
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

    fn heed(&mut self, wanted: &Wanted) {
        for service in self.resync.heed(wanted) {
            self.areas.values_mut().filter(|area| area.scope.holds(&service)).for_each(|area| area.due = true);
        }
    }

    fn list_all_again(&mut self) {
        self.resync.begins();
        self.areas.values_mut().for_each(|area| area.due = true);
    }

    /// Follows what is wanted and nothing else.
    async fn adjust(&mut self, wanted: &Wanted) {
        let mut now = areas(wanted);
        let mut narrowed = false;
        self.areas.retain(|scope, area| {
            let Some(told_as) = now.remove(scope) else {
                (narrowed, self.areas_went) = (true, true);
                return false;
            };
            narrowed |= area.told_as.iter().any(|told| !told_as.contains(told));
            area.due |= area.told_as != told_as;
            area.told_as = told_as;
            true
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

    /// Lists what is due, and watches what is not watched.
    async fn catch_up<R: Remote>(&mut self, remote: &mut R, watches: &mut Watches) -> Result<(), Error> {
        let now = Instant::now();
        let (reader, sink, life, number) = (&self.reader, &self.sink, &self.life, &mut self.watches);
        for area in self.areas.values_mut() {
            if area.put_off.is_some_and(|since| now.saturating_duration_since(since) < PUT_OFF) {
                continue;
            }
            match catch_up_with(area, remote, watches, number, reader, sink, life).await {
                Ok(()) => area.put_off = None,
                // What is followed goes on.
                Err(error @ Error::Busy(_)) => {
                    area.put_off = Some(now);
                    sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
                }
                Err(error) if error.is_of_one_area() => {
                    area.end_watches();
                    (area.put_off, area.due) = (Some(now), true);
                    for (scope, change) in area.forbidden(&error.to_string()) {
                        sink.send(SourceEvent::Changed { scope, position: 0, changes: vec![change] }).await;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        self.look_after_leases(remote, watches).await
    }

    /// Follows the Leases that slices name, and tells of hosts that died or came back.
    async fn look_after_leases<R: Remote>(&mut self, remote: &mut R, watches: &mut Watches) -> Result<(), Error> {
        let went = std::mem::take(&mut self.areas_went);
        let changed = self.areas.values_mut().fold(went, |any, area| std::mem::take(&mut area.keepers_changed) || any);
        if changed {
            self.leases.use_by(self.areas.values().flat_map(Area::keepers).collect());
        }
        let now = Instant::now();
        if self.leases.put_off.is_none_or(|until| until <= now) {
            let (trouble, put_off) =
                match catch_up_with_leases(&mut self.leases, remote, watches, &mut self.watches).await {
                    Ok(()) => (None, None),
                    Err(error @ Error::Forbidden { .. }) => (Some(error.to_string()), Some(now + PUT_OFF)),
                    Err(error) if error.is_of_one_area() || matches!(error, Error::Busy(_)) => {
                        (Some(error.to_string()), Some(now + LOOK_AGAIN))
                    }
                    Err(error) => return Err(error),
                };
            self.leases.put_off = put_off;
            self.tell_trouble_with_leases(trouble).await;
        }
        let differ: BTreeSet<Keeper> = self.leases.over().symmetric_difference(&self.reader.dead).cloned().collect();
        if !differ.is_empty() {
            self.reader.dead.clone_from(self.leases.over());
            let touched = self.areas.iter().map(|(scope, area)| (scope.clone(), area.kept_by(&differ)));
            self.tell(touched.filter(|(_, services)| !services.is_empty()).collect()).await;
        }
        Ok(())
    }

    /// Under a key of its own, wherever a slice is kept by one.
    async fn tell_trouble_with_leases(&mut self, trouble: Option<String>) {
        // A list of the scope takes it away; each attempt says it again.
        if trouble.is_none() && self.leases.trouble.is_none() {
            return;
        }
        self.leases.trouble.clone_from(&trouble);
        let Some(scope) = self.areas.values().find_map(|area| area.told_as.first()).cloned() else { return };
        let change = match trouble {
            Some(reason) => Change::Refused(Refused { key: "access/leases".into(), problems: vec![reason] }),
            None => Change::Removed("access/leases".into()),
        };
        self.sink.send(SourceEvent::Changed { scope, position: 0, changes: vec![change] }).await;
    }

    fn take_of_leases(&mut self, origin: &Origin, news: Result<Option<Event>, Error>) -> Result<(), Error> {
        let (leases, now) = (&mut self.leases, Instant::now());
        if leases.feed.watch.as_ref().is_none_or(|watching| watching.number != origin.number) {
            return Ok(());
        }
        let position = match news? {
            Some(Event::Set(Object::Lease(lease), position)) => {
                leases.set(lease, now);
                position
            }
            Some(Event::Gone(Object::Lease(lease), position)) => {
                leases.remove(&lease.name, now);
                position
            }
            Some(Event::Set(_, position) | Event::Gone(_, position)) => position,
            Some(Event::Bookmark(position) | Event::Other(position)) => position,
            Some(Event::Failed(reason)) => return Err(Error::Broken(format!("a watch failed: {reason}"))),
            None if origin.since.elapsed() < SHORTEST_WATCH => {
                return Err(Error::Broken("a watch ended as soon as it began".to_owned()));
            }
            Some(Event::Expired) => {
                (leases.feed.watch, leases.due) = (None, true);
                return Ok(());
            }
            None => {
                leases.feed.watch = None;
                return Ok(());
            }
        };
        leases.feed.position = Some(position).filter(|position| !position.is_empty());
        Ok(())
    }

    fn take(&mut self, (origin, news): News, touched: &mut Touched) -> Result<(), Error> {
        if origin.kind == Kind::Lease {
            return self.take_of_leases(&origin, news);
        }
        // A watch that was given up may still have said something.
        let Some(area) = self.areas.get_mut(&origin.area) else { return Ok(()) };
        let feed = area.feed(origin.kind);
        if feed.watch.as_ref().is_none_or(|watching| watching.number != origin.number) {
            return Ok(());
        }
        let mut moved = |position: String| feed.position = Some(position).filter(|position| !position.is_empty());
        let services = match news? {
            Some(Event::Set(object, position)) => {
                moved(position);
                area.set(object)
            }
            Some(Event::Gone(object, position)) => {
                moved(position);
                area.remove(object)
            }
            Some(Event::Bookmark(position) | Event::Other(position)) => {
                moved(position);
                return Ok(());
            }
            Some(Event::Expired) => {
                // The stream ends after it, and that means nothing more.
                feed.watch = None;
                area.due = true;
                // It would be so again.
                if area.listed_at.is_some_and(|at| at.elapsed() < SHORTEST_WATCH) {
                    area.put_off = Some(Instant::now());
                }
                return Ok(());
            }
            Some(Event::Failed(reason)) => return Err(Error::Broken(format!("a watch failed: {reason}"))),
            None if origin.since.elapsed() < SHORTEST_WATCH => {
                return Err(Error::Broken("a watch ended as soon as it began".to_owned()));
            }
            None => {
                feed.watch = None;
                return Ok(());
            }
        };
        touched.entry(origin.area.clone()).or_default().extend(services);
        Ok(())
    }

    async fn tell(&mut self, touched: Touched) {
        for (scope, services) in touched {
            // What is listed next says all of it.
            let Some(area) = self.areas.get_mut(&scope).filter(|area| !area.due) else { continue };
            for (scope, changes) in area.changes(&self.reader, &services) {
                let position = self.life.position;
                self.sink.send(SourceEvent::Changed { scope, position, changes }).await;
            }
        }
    }
}

/// For good where there is nothing to wait for.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn catch_up_with_leases<R: Remote>(
    leases: &mut Leases,
    remote: &mut R,
    watches: &mut Watches,
    number: &mut u64,
) -> Result<(), Error> {
    let Some(collection) = leases.collection() else { return Ok(()) };
    if leases.due {
        let asked = Instant::now();
        let listed = remote.list(&collection, None).await?;
        let lease = |object| if let Object::Lease(lease) = object { Some(lease) } else { None };
        leases.replace(listed.objects.into_iter().filter_map(lease).collect(), asked, Instant::now());
        // A watch that is there goes on: it tells the same once more at most.
        if leases.feed.watch.is_none() {
            leases.feed.position = Some(listed.position);
        }
    }
    if leases.feed.watch.is_some() {
        return Ok(());
    }
    let Some(from) = leases.feed.position.clone() else {
        leases.due = true;
        return Ok(());
    };
    match remote.watch(&collection, &from).await {
        Ok(watch) => {
            *number += 1;
            let origin = Origin { area: collection.area, kind: Kind::Lease, number: *number, since: Instant::now() };
            leases.feed.watch = Some(watches.begin(watch, origin));
            Ok(())
        }
        Err(Error::Expired) => {
            (leases.feed.position, leases.due) = (None, true);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

async fn catch_up_with<R: Remote>(
    area: &mut Area,
    remote: &mut R,
    watches: &mut Watches,
    number: &mut u64,
    reader: &Reader,
    sink: &Sink,
    life: &Epoch,
) -> Result<(), Error> {
    // Once more where the history between a list and its watch is gone already.
    for _ in 0..2 {
        if area.due {
            list(area, remote, reader, sink, life).await?;
        }
        match watch_missing(area, remote, watches, number).await {
            Err(Error::Expired) => area.due = true,
            other => return other,
        }
    }
    Err(Error::Expired)
}

async fn list<R: Remote>(
    area: &mut Area,
    remote: &mut R,
    reader: &Reader,
    sink: &Sink,
    life: &Epoch,
) -> Result<(), Error> {
    for kind in KINDS {
        let Some(collection) = area.collection(kind) else {
            area.without(kind);
            continue;
        };
        let known = area.feed(kind).position.clone();
        let listed = match remote.list(&collection, known.as_deref()).await {
            Err(Error::NotServed) => {
                area.without(kind);
                continue;
            }
            // Services need not suffer for what came with another right.
            Err(error @ Error::Forbidden { .. }) if kind == Kind::Mesh => {
                area.deny_documents(error.to_string());
                continue;
            }
            listed => listed?,
        };
        area.was_put_back |= known.is_some_and(|known| is_before(&listed.position, &known));
        area.replace(kind, listed);
    }
    (area.due, area.listed_at) = (false, Some(Instant::now()));
    let mut epoch = life.clone();
    if epoch.position == 0 {
        // Not told by the probe. Numbers in all versions there are; if not, the store alone counts.
        let services = area.feed(Kind::Service).position.as_deref();
        epoch.position = services.and_then(|position| position.parse().ok()).unwrap_or(0);
    }
    if std::mem::take(&mut area.was_put_back) {
        // Before everything: what is missing now is doubted, also where the probe looks into another etcd.
        epoch.position = 0;
    }
    for listing in area.listings(reader, &epoch) {
        sink.send(SourceEvent::Listed(listing)).await;
    }
    Ok(())
}

/// Lists are never older than what was known, unless their store is.
fn is_before(position: &str, known: &str) -> bool {
    matches!((position.parse::<u64>(), known.parse::<u64>()), (Ok(position), Ok(known)) if position < known)
}

async fn watch_missing<R: Remote>(
    area: &mut Area,
    remote: &mut R,
    watches: &mut Watches,
    number: &mut u64,
) -> Result<(), Error> {
    for kind in KINDS {
        let Some(collection) = area.collection(kind) else { continue };
        let feed = area.feed(kind);
        if feed.watch.is_some() || feed.is_away {
            continue;
        }
        let Some(from) = feed.position.clone() else { return Err(Error::Expired) };
        let watch = remote.watch(&collection, &from).await?;
        *number += 1;
        let origin = Origin { area: collection.area, kind, number: *number, since: Instant::now() };
        feed.watch = Some(watches.begin(watch, origin));
    }
    Ok(())
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
