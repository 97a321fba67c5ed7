//! WHAT is asked of the server, and what its answers and watches mean for an area.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::area::{Happened, SHORTEST_WATCH};
use super::error::Error;
use super::follow::Follower;
use super::kept::Names;
use super::lists::Lists;
use super::objects::{Event, Kind};
use super::remote::Remote;
use super::reread::Reread;
use super::work::{News, Origin};
use crate::backoff::jittered;
use crate::{Scope, ServiceName, SourceEvent};

/// How soon a role that was granted is noticed, and who has too much to do is asked again.
pub(super) const PUT_OFF: Duration = Duration::from_secs(15);
/// A server may ask for more, but not for any time.
const LONGEST_PUT_OFF: Duration = Duration::from_secs(300);
/// Lists under way at once: what a host has to ask must not all come to the server at once.
const MOST_LISTS: usize = 4;

/// Services of areas that may have changed.
pub(super) type Touched = BTreeMap<Scope, Names>;

impl<R: Remote> Follower<R> {
    pub(super) fn begin_lists_and_watches(&mut self) {
        let now = Instant::now();
        let mut lists = self.areas.values().filter(|area| area.is_being_listed()).count();
        for area in self.areas.values_mut() {
            if lists < MOST_LISTS
                && let Some(plan) = area.plan(now).map(Arc::new)
            {
                let task = self.work.list(&self.remote, plan.clone());
                area.awaits(&plan, task);
                lists += 1;
            }
            if area.rests(now) {
                continue;
            }
            for feed in area.unwatched() {
                if let (Some(what), Some(from)) = (feed.what.clone(), feed.position.clone()) {
                    feed.watch = Some(self.work.watch(&self.remote, what, from));
                }
            }
        }
    }

    /// Without the rest of its area, if there is any.
    pub(super) fn read_service_again(&mut self, name: &ServiceName) {
        let Some(area) = self.areas.iter_mut().find(|(scope, _)| scope.holds(name)).map(|(_, area)| area) else {
            return;
        };
        if let Some(plan) = area.suspect(name).map(Arc::new) {
            let task = self.work.list(&self.remote, plan.clone());
            area.awaits_service(name, Reread::new(&plan, task));
        }
    }

    /// True when that was one service of an area. One that cannot be read is not read: its watches and probes say why.
    fn take_service(
        &mut self,
        of: &Scope,
        number: u64,
        lists: &mut Result<Lists, Error>,
        touched: &mut Touched,
    ) -> bool {
        let Scope::Service(name) = of else { return false };
        let Some((scope, area)) = self.areas.iter_mut().find(|(_, area)| area.awaits_service_of(name, number)) else {
            return false;
        };
        let lists = std::mem::replace(lists, Ok(Lists::new()));
        touched.entry(scope.clone()).or_default().extend(area.take_service(name, lists.ok()));
        true
    }

    pub(super) async fn take(&mut self, mut news: News, touched: &mut Touched) -> Result<(), Error> {
        if let News::Listed { area, number, lists } = &mut news
            && self.take_service(area, *number, lists, touched)
        {
            return Ok(());
        }
        match news {
            News::Probed(answer) => self.take_probe(answer).await,
            News::Listed { area, number, lists } => self.take_lists(&area, number, lists).await,
            News::Leases { number, asked, listed } => self.take_leases(number, asked, listed).await,
            News::Begun(origin) => {
                self.begun(&origin);
                Ok(())
            }
            News::Said(origin, said) if origin.kind == Kind::Lease => self.take_of_leases(&origin, said).await,
            News::Said(origin, said) => self.take_said(&origin, said, touched).await,
        }
    }

    async fn take_lists(&mut self, scope: &Scope, number: u64, lists: Result<Lists, Error>) -> Result<(), Error> {
        // One that was given up may still be answered.
        let Some(area) = self.areas.get_mut(scope).filter(|area| area.is_list(number)) else { return Ok(()) };
        let lists = match lists {
            Ok(lists) => lists,
            Err(error) => {
                area.read_again();
                return self.trouble(scope, error).await;
            }
        };
        let was_put_back = area.take_lists(lists, Instant::now());
        let mut epoch = self.life.clone();
        if epoch.position == 0 {
            // Not told by the probe. Numbers in all versions there are; if not, the store alone counts.
            let services = area.feed(Kind::Service).position.as_deref();
            epoch.position = services.and_then(|position| position.parse().ok()).unwrap_or(0);
        }
        if was_put_back {
            // Before everything: what is missing now is doubted, also where the probe looks into another etcd.
            epoch.position = 0;
        }
        for listing in area.listings(&self.reader, &epoch) {
            self.sink.send(SourceEvent::Listed(listing)).await;
        }
        Ok(())
    }

    fn begun(&mut self, origin: &Origin) {
        let feed = match origin.kind {
            Kind::Lease => Some(&mut self.leases.feed),
            kind => self.areas.get_mut(&origin.area).map(|area| area.feed(kind)),
        };
        let watch = feed.and_then(|feed| feed.watch.as_mut()).filter(|watch| watch.number == origin.number);
        if let Some(watch) = watch {
            watch.is_begun = true;
        }
    }

    async fn take_said(
        &mut self,
        origin: &Origin,
        said: Result<Option<Event>, Error>,
        touched: &mut Touched,
    ) -> Result<(), Error> {
        // A watch that was given up may still have said something.
        let Some(area) = self.areas.get_mut(&origin.area) else { return Ok(()) };
        let feed = area.feed(origin.kind);
        if !feed.says(origin.number) {
            return Ok(());
        }
        let (position, happened) = match said {
            Ok(Some(Event::Set(object, position))) => (position, Happened::Set(object)),
            Ok(Some(Event::Gone(object, position))) => (position, Happened::Gone(object)),
            Ok(Some(Event::Bookmark(position) | Event::Other(position))) => {
                feed.moves(&position);
                return Ok(());
            }
            Ok(Some(Event::Expired)) | Err(Error::Expired) => {
                // The stream ends after it, and that means nothing more.
                feed.give_up();
                area.is_too_old(Instant::now(), PUT_OFF);
                return Ok(());
            }
            Ok(ended @ (None | Some(Event::Failed(_)))) => {
                feed.watch = None;
                return origin.may_end(ended);
            }
            Err(error) => {
                feed.watch = None;
                // What is not told, or cannot be understood, is not told by the same watch later.
                if error.is_of_one_area() && !matches!(error, Error::Deadline(_)) {
                    feed.give_up();
                    area.read_again();
                } else if error.is_of_one_area() {
                    // Else it is trouble for as long as nobody lists.
                    area.list_again();
                }
                return self.trouble(&origin.area, error).await;
            }
        };
        touched.entry(origin.area.clone()).or_default().extend(area.take(origin.kind, position, happened));
        Ok(())
    }

    /// What concerns an area alone is named, and tried again later; all else ends the connection.
    async fn trouble(&mut self, scope: &Scope, error: Error) -> Result<(), Error> {
        let Some(area) = self.areas.get_mut(scope) else { return Ok(()) };
        let now = Instant::now();
        match error {
            Error::Busy { after, .. } => {
                let pause = after.unwrap_or_default().clamp(PUT_OFF, LONGEST_PUT_OFF);
                area.put_off = Some(now + pause + jittered(pause / 4, fastrand::f64()));
                self.sink.send(SourceEvent::Unavailable { error: error.to_string() }).await;
            }
            error if error.is_of_one_area() => {
                area.put_off = Some(now + PUT_OFF);
                if let Error::Forbidden { .. } = error {
                    area.end_watches();
                }
                for (scope, change) in area.forbidden(&error.to_string()) {
                    self.sink.send(SourceEvent::Changed { scope, position: 0, changes: vec![change] }).await;
                }
            }
            error => return Err(error),
        }
        Ok(())
    }

    pub(super) async fn tell(&mut self, touched: Touched) {
        for (scope, services) in touched {
            let Some(area) = self.areas.get_mut(&scope) else { continue };
            for (scope, changes) in area.changes(&self.reader, &services) {
                let position = self.life.position;
                self.sink.send(SourceEvent::Changed { scope, position, changes }).await;
            }
        }
    }
}

impl Origin {
    /// Servers end watches as they age, and begin them again where they were.
    pub(super) fn may_end(&self, ended: Option<Event>) -> Result<(), Error> {
        let reason = match ended {
            Some(Event::Failed(reason)) => format!("a watch failed: {reason}"),
            _ => "a watch ended as soon as it began".to_owned(),
        };
        if self.since.elapsed() < SHORTEST_WATCH {
            return Err(Error::Broken(reason));
        }
        tracing::debug!(kind = ?self.kind, reason, "a watch is begun anew");
        Ok(())
    }
}

#[cfg(test)]
#[path = "catch_up_tests.rs"]
mod tests;
