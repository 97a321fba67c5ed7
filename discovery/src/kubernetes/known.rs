//! What was read so far. Outlives connections.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::leases::Keeper;
use super::objects::{Kind, LEASE, LEASE_HOLDER, Listed, Mesh, Object, Pod, Service, Slice};
use super::read::{self, Learned, Reader};
use super::remote::Collection;
use crate::{Change, Epoch, Listing, Refused, Scope, ServiceName, Wanted};

/// More services of a namespace than this are cheaper to follow as a whole: three watches instead of three for each.
const MOST_ALONE: usize = 8;

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

/// Objects of one kind.
#[derive(Debug, Default)]
pub(super) struct Feed {
    /// As of where they are known.
    pub(super) position: Option<String>,
    pub(super) watch: Option<Watching>,
    /// It cannot be followed, until it is listed again: the cluster has no such kind, or does not show it.
    pub(super) is_away: bool,
}

/// Ends with it.
#[derive(Debug)]
pub(super) struct Watching {
    pub(super) number: u64,
    pub(super) task: AbortHandle,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
pub(super) struct Area {
    pub(super) scope: Scope,
    /// What it is read for.
    pub(super) told_as: Vec<Scope>,
    /// Of these, what is read as a pattern would read it.
    pub(super) looked_up: BTreeSet<ServiceName>,
    /// To be listed, for the first time or again.
    pub(super) due: bool,
    /// Since when it may not be read, or not now.
    pub(super) put_off: Option<Instant>,
    pub(super) listed_at: Option<Instant>,
    /// Slices came or went that a Lease keeps.
    pub(super) keepers_changed: bool,
    /// A list came from before what was known, and is not told yet.
    pub(super) was_put_back: bool,
    feeds: BTreeMap<Kind, Feed>,
    services: HashMap<ServiceName, Service>,
    slices: HashMap<ServiceName, BTreeMap<String, Slice>>,
    pods: HashMap<String, Pod>,
    documents: HashMap<ServiceName, Mesh>,
    /// Why documents may not be read.
    denied: Option<String>,
    learned: HashMap<ServiceName, Learned>,
    /// Which keys of a service were told.
    told: HashMap<ServiceName, BTreeSet<Arc<str>>>,
}

impl Area {
    pub(super) fn new(scope: Scope, told_as: Vec<Scope>) -> Area {
        Area {
            scope,
            told_as,
            looked_up: BTreeSet::new(),
            due: true,
            put_off: None,
            listed_at: None,
            keepers_changed: false,
            was_put_back: false,
            feeds: BTreeMap::new(),
            services: HashMap::new(),
            slices: HashMap::new(),
            pods: HashMap::new(),
            documents: HashMap::new(),
            denied: None,
            learned: HashMap::new(),
            told: HashMap::new(),
        }
    }

    pub(super) fn feed(&mut self, kind: Kind) -> &mut Feed {
        self.feeds.entry(kind).or_default()
    }

    /// Lists and watches begin anew, in a store of which nothing is known.
    pub(super) fn forget_positions(&mut self) {
        self.due = true;
        self.put_off = None;
        self.feeds.values_mut().for_each(|feed| *feed = Feed::default());
    }

    pub(super) fn end_watches(&mut self) {
        self.feeds.values_mut().for_each(|feed| feed.watch = None);
    }

    /// What is followed of a kind; nothing where no pods are behind a Service.
    pub(super) fn collection(&self, kind: Kind) -> Option<Collection> {
        let of = |labels: String| Some(Collection { kind, area: self.scope.clone(), labels });
        match (kind, &self.scope) {
            (Kind::Pod, Scope::Service(name)) => {
                let selector = &self.services.get(name)?.selector;
                let labels: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
                if labels.is_empty() { None } else { of(labels.join(",")) }
            }
            _ => of(String::new()),
        }
    }

    /// All there is of one kind now.
    pub(super) fn replace(&mut self, kind: Kind, listed: Listed) {
        match kind {
            Kind::Service => self.services.clear(),
            Kind::Slice => {
                self.keepers_changed |= self.slices.values().flat_map(BTreeMap::values).any(|it| keeper(it).is_some());
                self.slices.clear();
            }
            Kind::Pod => self.pods.clear(),
            Kind::Lease => {}
            Kind::Mesh => {
                self.documents.clear();
                self.denied = None;
            }
        }
        for object in listed.objects {
            match object {
                Object::Service(service) => drop(self.services.insert(service.name.clone(), service)),
                Object::Slice(slice) => drop(self.add_slice(slice)),
                Object::Pod(key, pod) => drop(self.pods.insert(key, pod)),
                Object::Lease(_) => {}
                Object::Mesh(document) => drop(self.documents.insert(document.name.clone(), document)),
            }
        }
        let position = Some(listed.position).filter(|position| !position.is_empty());
        *self.feed(kind) = Feed { position, ..Feed::default() };
    }

    /// There is nothing of a kind: no pods behind the Service, no documents in the cluster.
    pub(super) fn without(&mut self, kind: Kind) {
        self.replace(kind, Listed::default());
        self.feed(kind).is_away = true;
    }

    /// Documents are there and may not be read. What was read before stays, and so does everything else.
    pub(super) fn deny_documents(&mut self, reason: String) {
        self.denied = Some(reason);
        *self.feed(Kind::Mesh) = Feed { is_away: true, ..Feed::default() };
    }

    /// Takes what is there now; the services it may matter to.
    pub(super) fn set(&mut self, object: Object) -> BTreeSet<ServiceName> {
        match object {
            Object::Service(service) => {
                let name = service.name.clone();
                let before = self.services.insert(name.clone(), service);
                let now = &self.services[&name];
                if before.as_ref() == Some(now) {
                    return BTreeSet::new();
                }
                // Other pods are behind it.
                let selects_others = before.is_none_or(|before| before.selector != now.selector);
                self.due |= selects_others && matches!(self.scope, Scope::Service(_));
                [name].into()
            }
            Object::Slice(slice) => {
                let name = slice.service.clone();
                let mut touched: BTreeSet<ServiceName> = self.add_slice(slice).into_iter().collect();
                touched.insert(name);
                touched
            }
            Object::Lease(_) => BTreeSet::new(),
            // Most of what happens to a pod does not matter to us.
            Object::Pod(key, pod) if self.pods.get(&key) == Some(&pod) => BTreeSet::new(),
            Object::Pod(key, pod) => {
                let users = self.users_of(&key);
                self.pods.insert(key, pod);
                users
            }
            Object::Mesh(document) if self.documents.get(&document.name) == Some(&document) => BTreeSet::new(),
            Object::Mesh(document) => {
                let name = document.name.clone();
                self.documents.insert(name.clone(), document);
                [name].into()
            }
        }
    }

    pub(super) fn remove(&mut self, object: Object) -> BTreeSet<ServiceName> {
        match object {
            Object::Service(service) => {
                self.services.remove(&service.name);
                self.learned.remove(&service.name);
                self.due |= matches!(self.scope, Scope::Service(_));
                [service.name].into()
            }
            Object::Slice(slice) => {
                if let Some(slices) = self.slices.get_mut(&slice.service) {
                    self.keepers_changed |= slices.remove(&slice.key).is_some_and(|it| keeper(&it).is_some());
                }
                [slice.service].into()
            }
            Object::Lease(_) => BTreeSet::new(),
            Object::Pod(key, pod) => match self.pods.get(&key) {
                // Another one has its name by now.
                Some(known) if !known.life.may_be(pod.life) => BTreeSet::new(),
                _ => {
                    self.pods.remove(&key);
                    self.users_of(&key)
                }
            },
            Object::Mesh(document) => {
                self.documents.remove(&document.name);
                [document.name].into()
            }
        }
    }

    /// The service it belonged to before, if it was another one.
    fn add_slice(&mut self, slice: Slice) -> Option<ServiceName> {
        let (key, name) = (slice.key.clone(), slice.service.clone());
        let kept_by = keeper(&slice);
        let before = self.slices.entry(name.clone()).or_default().insert(key.clone(), slice);
        self.keepers_changed |= before.as_ref().and_then(keeper) != kept_by;
        let is_new = before.is_none();
        let mut others = self.slices.iter_mut().filter(|(service, _)| is_new && **service != name);
        others.find_map(|(service, slices)| slices.remove(&key).map(|_| service.clone()))
    }

    /// Who keeps slices that are known.
    pub(super) fn keepers(&self) -> impl Iterator<Item = Keeper> {
        self.slices.values().flat_map(BTreeMap::values).filter_map(keeper)
    }

    /// Services with a slice of one of these.
    pub(super) fn kept_by(&self, keepers: &BTreeSet<Keeper>) -> BTreeSet<ServiceName> {
        let is_kept = |slice: &Slice| keeper(slice).is_some_and(|keeper| keepers.contains(&keeper));
        let kept = self.slices.iter().filter(|(_, slices)| slices.values().any(is_kept));
        kept.map(|(service, _)| service.clone()).collect()
    }

    fn users_of(&self, pod: &str) -> BTreeSet<ServiceName> {
        let uses = |slice: &Slice| {
            slice.endpoints.iter().any(|endpoint| endpoint.pod.as_ref().is_some_and(|(key, _)| key == pod))
        };
        let users = self.slices.iter().filter(|(_, slices)| slices.values().any(uses));
        users.map(|(service, _)| service.clone()).collect()
    }

    fn read(&mut self, reader: &Reader, name: &ServiceName) -> Vec<Change> {
        let document = self.documents.get(name);
        let mut changes: Vec<Change> = document.into_iter().filter_map(|document| reader.document(document)).collect();
        let Some(service) = self.services.get(name) else { return changes };
        let is_alone = self.told_as.iter().any(|scope| *scope == Scope::Service(name.clone()));
        let is_named = is_alone && !self.looked_up.contains(name);
        let slices = self.slices.get(name).into_iter().flat_map(BTreeMap::values).collect();
        let known = read::Known { service, slices, pods: &self.pods, is_named, is_described: document.is_some() };
        changes.extend(reader.read(&known, self.learned.entry(name.clone()).or_default()));
        changes
    }

    /// What there is of each scope, as of `epoch`.
    pub(super) fn listings(&mut self, reader: &Reader, epoch: &Epoch) -> Vec<Listing> {
        let mut listings: Vec<Listing> =
            self.told_as.iter().map(|scope| Listing::empty(scope.clone(), epoch.clone())).collect();
        self.told.clear();
        self.learned.retain(|name, _| self.services.contains_key(name));
        let names: BTreeSet<ServiceName> = self.services.keys().chain(self.documents.keys()).cloned().collect();
        for name in names {
            let Some(index) = self.told_as.iter().position(|scope| scope.holds(&name)) else { continue };
            let changes = self.read(reader, &name);
            self.told.insert(name, changes.iter().map(|change| change_key(change).clone()).collect());
            for change in changes {
                match change {
                    Change::Set(record) => listings[index].records.push(record),
                    Change::Refused(refused) => listings[index].refused.push(refused),
                    Change::Removed(_) => {}
                }
            }
        }
        for (listing, reason) in listings.iter_mut().zip(self.denied.iter().cycle()) {
            let key = format!("{}/documents", access_key(&listing.scope)).into();
            listing.refused.push(Refused { key, problems: vec![reason.clone()] });
        }
        listings
    }

    /// What is to be told of services that may have changed, by scope.
    pub(super) fn changes(&mut self, reader: &Reader, touched: &BTreeSet<ServiceName>) -> BTreeMap<Scope, Vec<Change>> {
        let mut all: BTreeMap<Scope, Vec<Change>> = BTreeMap::new();
        for name in touched {
            let Some(scope) = self.told_as.iter().find(|scope| scope.holds(name)).cloned() else { continue };
            let mut changes = self.read(reader, name);
            let now: BTreeSet<Arc<str>> = changes.iter().map(|change| change_key(change).clone()).collect();
            let before = self.told.remove(name).unwrap_or_default();
            changes.extend(before.difference(&now).cloned().map(Change::Removed));
            if !now.is_empty() {
                self.told.insert(name.clone(), now);
            }
            if !changes.is_empty() {
                all.entry(scope).or_default().extend(changes);
            }
        }
        all
    }

    /// What we may not read stays as it was, and is told under a key of its own.
    pub(super) fn forbidden(&self, reason: &str) -> impl Iterator<Item = (Scope, Change)> {
        self.told_as.iter().map(move |scope| {
            let key = access_key(scope).into();
            (scope.clone(), Change::Refused(Refused { key, problems: vec![reason.to_owned()] }))
        })
    }
}

/// Of a slice that a registering host wrote.
pub(super) fn keeper(slice: &Slice) -> Option<Keeper> {
    let holder = slice.notes.get(LEASE_HOLDER).cloned().unwrap_or_default();
    Some((slice.notes.get(LEASE)?.clone(), holder))
}

/// Of what may not be read.
fn access_key(scope: &Scope) -> String {
    match scope {
        Scope::Everything => "access".to_owned(),
        Scope::Namespace(namespace) => format!("access/{namespace}"),
        Scope::Service(service) => format!("access/{}/{}", service.namespace(), service.name()),
    }
}

fn change_key(change: &Change) -> &Arc<str> {
    match change {
        Change::Set(record) => &record.key,
        Change::Removed(key) => key,
        Change::Refused(refused) => &refused.key,
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
