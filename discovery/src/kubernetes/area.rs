//! What is read together, how far it is read, and what was told of it. Outlives connections.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::feed::{Feed, is_before};
use super::kept::{Changed, Kept, Names};
use super::lists::{Answer, Lists, Plan};
use super::objects::{Kind, Object};
use super::pick::Pick;
use super::read::Learned;
use super::reread::{self, Reread};
use super::work::Task;
use crate::{Scope, ServiceName, Wanted};

/// More services of a namespace than this are cheaper to follow together: three watches instead of three for each.
const MOST_ALONE: usize = 8;
/// A watch that ends sooner ends for another reason than its age.
pub(super) const SHORTEST_WATCH: Duration = Duration::from_secs(1);

/// What is read together, each with what is told of it: every service wanted by itself, or a namespace for all of them.
pub(super) fn areas(wanted: &Wanted) -> BTreeMap<Scope, Vec<Scope>> {
    let scopes = wanted.scopes();
    let namespace_of = |scope: &Scope| match scope {
        Scope::Service(service) => Some(service.namespace().to_owned()),
        _ => None,
    };
    let mut alone: HashMap<String, usize> = HashMap::new();
    for namespace in scopes.iter().filter_map(namespace_of) {
        *alone.entry(namespace).or_default() += 1;
    }
    let mut areas: BTreeMap<Scope, Vec<Scope>> = BTreeMap::new();
    for scope in scopes {
        let together = namespace_of(&scope).filter(|namespace| alone[namespace] > MOST_ALONE);
        areas.entry(together.map_or(scope.clone(), Scope::Namespace)).or_default().push(scope);
    }
    areas
}

/// A list that is awaited.
#[derive(Debug)]
struct Awaited {
    task: Task,
    pick: Pick,
    /// What the server kept of each kind when it was asked for.
    known: BTreeMap<Kind, String>,
    /// What watches said meanwhile: the list may be of before.
    since: Vec<(Kind, String, Happened)>,
}

/// To an object.
#[derive(Debug, Clone)]
pub(super) enum Happened {
    Set(Object),
    Gone(Object),
}

#[derive(Debug)]
pub(super) struct Area {
    scope: Scope,
    /// What it is read for, in order.
    pub(super) told_as: Vec<Scope>,
    /// Of these, what is read as a pattern would read it.
    pub(super) looked_up: BTreeSet<ServiceName>,
    /// To be listed, for the first time or again.
    due: bool,
    listing: Option<Awaited>,
    /// Services that are read again by themselves.
    rereads: BTreeMap<ServiceName, Reread>,
    /// Until when nothing is asked: it may not be read, or not now.
    pub(super) put_off: Option<Instant>,
    listed_at: Option<Instant>,
    /// A watch was too old as soon as it was listed.
    was_too_old: bool,
    /// What is followed, as of the last list.
    pub(super) pick: Pick,
    feeds: BTreeMap<Kind, Feed>,
    pub(super) kept: Kept,
    /// False before the first list in this life of the store: nothing is told.
    pub(super) is_whole: bool,
    /// Nothing is told of these before the next list: their pods are not known.
    pub(super) held_back: Names,
    /// Why documents may not be read.
    pub(super) denied: Option<String>,
    pub(super) learned: HashMap<ServiceName, Learned>,
    /// Which keys of a service were told.
    pub(super) told: HashMap<ServiceName, BTreeSet<Arc<str>>>,
}

impl Area {
    pub(super) fn new(scope: Scope, told_as: Vec<Scope>) -> Area {
        Area {
            pick: Pick::of(&scope, &told_as),
            scope,
            told_as,
            looked_up: BTreeSet::new(),
            due: true,
            listing: None,
            rereads: BTreeMap::new(),
            put_off: None,
            listed_at: None,
            was_too_old: false,
            feeds: BTreeMap::new(),
            kept: Kept::default(),
            is_whole: false,
            held_back: Names::new(),
            denied: None,
            learned: HashMap::new(),
            told: HashMap::new(),
        }
    }

    /// True where less is read than before.
    pub(super) fn want(&mut self, told_as: Vec<Scope>) -> bool {
        if self.told_as == told_as {
            return false;
        }
        let narrowed = self.told_as.iter().any(|told| told_as.binary_search(told).is_err());
        // What was not wanted a moment ago was forgotten, also where it is followed still: only a list tells it.
        let is_new = |told: &Scope| self.told_as.binary_search(told).is_err();
        let is_awaited = |told: &Scope| self.listing.as_ref().is_some_and(|listing| listing.pick.covers(told));
        self.due |= told_as.iter().any(|told| is_new(told) && !is_awaited(told));
        self.told_as = told_as;
        narrowed
    }

    /// What is under way goes on.
    pub(super) fn list_again(&mut self) {
        self.due = true;
    }

    /// What is under way does not do.
    pub(super) fn read_again(&mut self) {
        (self.due, self.listing) = (true, None);
    }

    /// Lists and watches begin anew, in a store of which nothing is known.
    pub(super) fn forget_positions(&mut self) {
        self.read_again();
        self.put_off = None;
        self.is_whole = false;
        self.feeds.clear();
    }

    /// What was under way ended with its connection.
    pub(super) fn end_tasks(&mut self) {
        self.due |= self.listing.take().is_some();
        self.rereads.clear();
        self.feeds.values_mut().for_each(|feed| feed.watch = None);
    }

    pub(super) fn feed(&mut self, kind: Kind) -> &mut Feed {
        self.feeds.entry(kind).or_default()
    }

    pub(super) fn rests(&self, now: Instant) -> bool {
        self.put_off.is_some_and(|until| until > now)
    }

    pub(super) fn is_being_listed(&self) -> bool {
        self.listing.is_some()
    }

    pub(super) fn is_caught_up(&self, now: Instant) -> bool {
        let is_up = !self.due && self.listing.is_none() && self.feeds.values().all(Feed::is_watched);
        is_up || self.rests(now)
    }

    /// What to ask the server for, if it is time.
    pub(super) fn plan(&mut self, now: Instant) -> Option<Plan> {
        if !self.due || self.listing.is_some() || self.rests(now) {
            return None;
        }
        let known = self.feeds.iter().filter_map(|(kind, feed)| Some((*kind, feed.position.clone()?)));
        Some(Plan { scope: self.scope.clone(), pick: Pick::of(&self.scope, &self.told_as), known: known.collect() })
    }

    /// An endpoint of the service cannot be reached. What to ask the server for, unless all of it is read again.
    pub(super) fn suspect(&mut self, name: &ServiceName) -> Option<Plan> {
        if self.pick.is_one() {
            self.list_again();
        }
        let is_enough = self.due || self.listing.is_some() || !self.is_whole || self.rereads.contains_key(name);
        if is_enough || self.index_of(name).is_none() {
            return None;
        }
        let known = self.feeds.iter().filter_map(|(kind, feed)| Some((*kind, feed.position.clone()?)));
        Some(reread::plan(name, known.collect()))
    }

    pub(super) fn awaits_service(&mut self, name: &ServiceName, reread: Reread) {
        self.rereads.insert(name.clone(), reread);
    }

    pub(super) fn awaits_service_of(&self, name: &ServiceName, number: u64) -> bool {
        self.rereads.get(name).is_some_and(|reread| reread.is(number))
    }

    /// Takes what was listed of it, if it could be. The services that it may matter to.
    pub(super) fn take_service(&mut self, name: &ServiceName, lists: Option<Lists>) -> Names {
        let (Some(reread), Some(lists)) = (self.rereads.remove(name), lists) else { return Names::new() };
        match reread.news(name, lists, &self.kept) {
            Some(news) => news.into_iter().flat_map(|happened| self.hear(happened)).collect(),
            None => {
                self.read_again();
                Names::new()
            }
        }
    }

    pub(super) fn awaits(&mut self, plan: &Plan, task: Task) {
        self.due = false;
        self.listing = Some(Awaited { task, pick: plan.pick.clone(), known: plan.known.clone(), since: Vec::new() });
    }

    /// What is to be watched, and is not.
    pub(super) fn unwatched(&mut self) -> impl Iterator<Item = &mut Feed> {
        self.feeds.values_mut().filter(|feed| feed.watch.is_none() && !feed.is_away)
    }

    /// The list of this number, if it is still awaited.
    pub(super) fn is_list(&self, number: u64) -> bool {
        self.listing.as_ref().is_some_and(|listing| listing.task.number == number)
    }

    /// A watch needs what the server no longer keeps. Where that is so from its list on, it would be so again.
    pub(super) fn is_too_old(&mut self, now: Instant, put_off_for: Duration) {
        let just_listed = self.listed_at.is_some_and(|at| now.saturating_duration_since(at) < SHORTEST_WATCH);
        if self.due || self.listing.is_some() {
            return;
        }
        if just_listed && self.was_too_old {
            self.put_off = Some(now + put_off_for);
        }
        (self.due, self.was_too_old) = (true, just_listed);
    }

    /// Nothing of it may be read now.
    pub(super) fn end_watches(&mut self) {
        self.feeds.values_mut().for_each(Feed::give_up);
    }

    /// Takes what was listed. True where the store of a kind was put back.
    pub(super) fn take_lists(&mut self, lists: Lists, now: Instant) -> bool {
        let Some(Awaited { pick, known, since, .. }) = self.listing.take() else { return false };
        self.pick = pick;
        // These were asked for after them, and say more.
        self.rereads.clear();
        self.held_back.clear();
        self.denied = None;
        let mut was_put_back = false;
        for (kind, answer) in lists {
            match answer {
                Answer::Listed(what, listed) => {
                    let went_back = known.get(&kind).is_some_and(|known| is_before(&listed.position, known));
                    was_put_back |= went_back;
                    self.kept.clear(kind);
                    for object in listed.objects {
                        self.apply(Happened::Set(object));
                    }
                    self.feed(kind).listed(what, listed.position, !went_back);
                }
                Answer::Nothing => {
                    self.kept.clear(kind);
                    *self.feed(kind) = Feed::away();
                }
                // Documents are there and may not be read. What was read before stays, and so does everything else.
                Answer::Denied(reason) => {
                    self.denied = Some(reason);
                    *self.feed(kind) = Feed::away();
                }
            }
        }
        (self.is_whole, self.listed_at, self.put_off) = (true, Some(now), None);
        for (kind, position, happened) in since {
            let feed = self.feed(kind);
            if feed.watch.is_some() && feed.moves(&position) {
                self.hear(happened);
            }
        }
        was_put_back
    }

    /// What a watch says; the services it may matter to.
    pub(super) fn take(&mut self, kind: Kind, position: String, happened: Happened) -> Names {
        if !self.feed(kind).moves(&position) {
            return Names::new();
        }
        self.rereads.values_mut().for_each(|reread| reread.hears(&happened));
        if let Some(listing) = &mut self.listing {
            listing.since.push((kind, position, happened.clone()));
        }
        self.hear(happened)
    }

    fn hear(&mut self, happened: Happened) -> Names {
        let is_gone = matches!(happened, Happened::Gone(Object::Service(_)));
        let Changed { services, selector } = self.apply(happened);
        if selector && self.pick.is_by_selectors() {
            self.read_again();
            if !is_gone {
                self.held_back.extend(services.iter().cloned());
            }
        }
        services
    }

    fn apply(&mut self, happened: Happened) -> Changed {
        match happened {
            Happened::Set(object) | Happened::Gone(object) if !self.holds(&object) => match object {
                // It has other labels now.
                Object::Pod(..) => self.kept.remove(object),
                _ => Changed::default(),
            },
            Happened::Set(object) => self.kept.set(object),
            Happened::Gone(object) => self.kept.remove(object),
        }
    }

    /// The server cannot always select all that is not wanted.
    fn holds(&self, object: &Object) -> bool {
        match object {
            Object::Service(service) => self.pick.holds(&service.name),
            Object::Slice(slice) => self.pick.holds(&slice.service),
            Object::Mesh(document) => self.pick.holds(&document.name),
            Object::Pod(_, pod) => {
                let mut selectors = self.kept.services().map(|service| &service.selector);
                !self.pick.is_by_selectors() || selectors.any(|selector| pod.labels.are_selected(selector))
            }
            Object::Lease(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_services_are_followed_by_themselves_and_many_of_a_namespace_together() {
        let mut wanted = Wanted::default();
        wanted.services.extend((0..MOST_ALONE).map(|n| format!("s{n}.shop").parse().unwrap()));
        wanted.services.insert("ledger.bank".parse().unwrap());
        assert_eq!(areas(&wanted).len(), MOST_ALONE + 1);
        wanted.services.insert("more.shop".parse().unwrap());
        let areas_now = areas(&wanted);
        assert_eq!(areas_now.len(), 2);
        let told = &areas_now[&Scope::Namespace("shop".into())];
        assert!(told.len() == MOST_ALONE + 1 && told.contains(&Scope::Service("more.shop".parse().unwrap())));
        wanted.everything = true;
        assert_eq!(areas(&wanted), [(Scope::Everything, vec![Scope::Everything])].into());
    }
}
