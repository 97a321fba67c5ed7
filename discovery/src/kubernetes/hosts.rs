//! Follows the Leases that slices name, and tells of hosts that died or came back.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::catch_up::PUT_OFF;
use super::error::Error;
use super::follow::Follower;
use super::leases::Keeper;
use super::objects::{Event, Listed, Object};
use super::remote::{Collection, Remote};
use super::work::Origin;
use crate::{Change, Refused, SourceEvent};

/// How soon Leases are asked for again where that failed: a dead host is to be known within seconds.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

impl<R: Remote> Follower<R> {
    pub(super) async fn look_after_leases(&mut self) {
        let went = std::mem::take(&mut self.areas_went);
        let changed =
            self.areas.values_mut().fold(went, |any, area| std::mem::take(&mut area.kept.keepers_changed) || any);
        if changed {
            self.leases.use_by(self.areas.values().flat_map(|area| area.kept.keepers()).collect());
        }
        self.follow_leases();
        self.tell_of_hosts().await;
    }

    fn follow_leases(&mut self) {
        if self.leases.put_off.is_some_and(|until| until > Instant::now()) {
            return;
        }
        let Some(collection) = self.leases.collection() else {
            self.leases.due = false;
            return;
        };
        if self.leases.due && self.leases.listing.is_none() {
            self.leases.listing = Some(self.work.list_leases(&self.remote, collection));
            self.leases.due = false;
        }
        let feed = &mut self.leases.feed;
        if feed.is_away {
            return;
        }
        if let (None, Some(what), Some(from)) = (&feed.watch, feed.what.clone(), feed.position.clone()) {
            feed.watch = Some(self.work.watch(&self.remote, what, from));
        }
    }

    pub(super) async fn take_leases(
        &mut self,
        number: u64,
        asked: Instant,
        listed: Result<(Collection, Listed), Error>,
    ) -> Result<(), Error> {
        if self.leases.listing.as_ref().is_none_or(|task| task.number != number) {
            return Ok(());
        }
        self.leases.listing = None;
        let (what, listed) = match listed {
            Ok(listed) => listed,
            Err(error) => return self.trouble_with_leases(error).await,
        };
        let lease = |object| if let Object::Lease(lease) = object { Some(lease) } else { None };
        let leases = listed.objects.into_iter().filter_map(lease).collect();
        self.leases.replace(leases, asked, Instant::now());
        self.leases.feed.listed(what, listed.position, true);
        self.leases.put_off = None;
        self.tell_trouble_with_leases(None).await;
        Ok(())
    }

    pub(super) async fn take_of_leases(
        &mut self,
        origin: &Origin,
        said: Result<Option<Event>, Error>,
    ) -> Result<(), Error> {
        let (leases, now) = (&mut self.leases, Instant::now());
        if !leases.feed.says(origin.number) {
            return Ok(());
        }
        match said {
            Ok(Some(Event::Set(Object::Lease(lease), position))) if leases.feed.moves(&position) => {
                leases.set(lease, now);
            }
            Ok(Some(Event::Gone(Object::Lease(lease), position))) if leases.feed.moves(&position) => {
                leases.remove(&lease.name, now);
            }
            Ok(Some(Event::Set(..) | Event::Gone(..))) => {}
            Ok(Some(Event::Bookmark(position) | Event::Other(position))) => {
                leases.feed.moves(&position);
            }
            Ok(Some(Event::Expired)) | Err(Error::Expired) => {
                leases.feed.give_up();
                leases.due = true;
            }
            Ok(ended @ (None | Some(Event::Failed(_)))) => {
                leases.feed.watch = None;
                return origin.may_end(ended);
            }
            Err(error) => {
                leases.feed.watch = None;
                return self.trouble_with_leases(error).await;
            }
        }
        Ok(())
    }

    async fn trouble_with_leases(&mut self, error: Error) -> Result<(), Error> {
        let pause = match error {
            Error::Forbidden { .. } => PUT_OFF,
            Error::Busy { after, .. } => after.unwrap_or_default().clamp(LOOK_AGAIN, PUT_OFF),
            _ if error.is_of_one_area() => LOOK_AGAIN,
            error => return Err(error),
        };
        (self.leases.due, self.leases.put_off) = (true, Some(Instant::now() + pause));
        self.tell_trouble_with_leases(Some(error.to_string())).await;
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

    async fn tell_of_hosts(&mut self) {
        let differ: BTreeSet<Keeper> = self.leases.over().symmetric_difference(&self.reader.dead).cloned().collect();
        if differ.is_empty() {
            return;
        }
        self.reader.dead.clone_from(self.leases.over());
        let touched = self.areas.iter().map(|(scope, area)| (scope.clone(), area.kept.kept_by(&differ)));
        self.tell(touched.filter(|(_, services)| !services.is_empty()).collect()).await;
    }
}

#[cfg(test)]
#[path = "hosts_tests.rs"]
mod tests;
