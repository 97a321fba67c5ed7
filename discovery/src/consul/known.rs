//! What Consul said so far, and what of it discovery is told. Pure; takes `now`.
//!
//! A scope is listed once all that it needs was read: the documents, the instances of each service in it and, for a wide
//! one, the names of all services. From then on each answer is told as what it changes. Of a wide one what is there is told
//! before that: one query that fails for good would keep the others from being used.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use hyper::body::Bytes;
use tokio::time::Instant;

use super::read::{Document, Instance, Reading};
use super::remote::{Answer, Content, Error, Pair, Query};
use super::resources::Resources;
use crate::{Change, Epoch, Listing, Scope, ServiceName, SourceEvent, Wanted};

#[derive(Debug)]
pub(super) struct Known {
    reading: Reading,
    cluster: Option<Arc<str>>,
    scopes: BTreeMap<Scope, State>,
    parts: BTreeMap<Query, Part>,
    names: BTreeSet<Arc<str>>,
    /// Followed by their names, as what a pattern holds is.
    looked_up: BTreeSet<ServiceName>,
    /// By the name of the service, then by key: those of services that are wanted.
    documents: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Document>>,
    instances: BTreeMap<Arc<str>, Vec<Understood>>,
    hashing: RandomState,
    /// Whose last answer was not to be understood: nobody but its watch asks before there is another.
    garbled: BTreeSet<Query>,
    resources: Option<Resources>,
    /// To be read once more, as it is from then on.
    suspects: BTreeMap<Query, Instant>,
}

/// An instance, and the hash of what Consul said of it: of those of a service, most are as they were.
#[derive(Debug, Clone)]
struct Understood {
    hash: u64,
    instance: Instance,
}

/// How a scope is told.
#[derive(Debug)]
struct State {
    /// A list is due, of what was read since then.
    list_from: Option<Instant>,
    /// It was listed, so that changes can be told.
    listed: bool,
    /// The furthest index of the catalog that was read for it. Those of documents fall by themselves.
    position: u64,
    /// An index went back since the last list, whatever the others say.
    went_back: bool,
}

/// How far a query was read, and when last.
#[derive(Debug)]
struct Part {
    index: u64,
    as_of: Instant,
}

/// What is said of some names in each of some scopes, by key.
type Said = BTreeMap<(usize, Arc<str>), Arc<Change>>;

impl Known {
    pub(super) fn new(reading: Reading) -> Known {
        let resources = reading.resources.clone();
        let resources = resources.map(|(base, provides)| Resources::new(base, provides, reading.trust_domain.clone()));
        Known {
            resources,
            reading,
            cluster: None,
            scopes: BTreeMap::new(),
            parts: BTreeMap::new(),
            names: BTreeSet::new(),
            looked_up: BTreeSet::new(),
            documents: BTreeMap::new(),
            instances: BTreeMap::new(),
            hashing: RandomState::new(),
            garbled: BTreeSet::new(),
            suspects: BTreeMap::new(),
        }
    }

    /// False when it was another cluster that was read: then all of that is to be read anew. One that cannot say which it
    /// is may be the same: its indexes have to tell.
    pub(super) fn meets(&mut self, cluster: Option<&Arc<str>>, now: Instant) -> bool {
        let met = cluster.or(self.cluster.as_ref()).cloned().unwrap_or_default();
        let same = self.cluster.as_ref() == Some(&met);
        if !same {
            self.cluster = Some(met);
            self.begin_anew(now);
        }
        same
    }

    /// Forgets how far it was read, and what was said: that was another life of the store.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        self.parts.clear();
        self.names.clear();
        self.documents.clear();
        self.instances.clear();
        self.resources.iter_mut().for_each(Resources::forget);
        for state in self.scopes.values_mut() {
            *state = State::begun(now);
        }
    }

    /// The store was put back. Some of its indexes may be beyond what they were nonetheless.
    pub(super) fn went_back(&mut self, now: Instant) {
        self.begin_anew(now);
        self.resources.iter_mut().for_each(Resources::went_back);
        self.scopes.values_mut().for_each(|state| state.went_back = true);
    }

    /// The index of a query is lower than the one that was known, by which an answer read later is told from an earlier.
    pub(super) fn falls(&mut self, query: &Query, known: u64) {
        if let Some(part) = self.parts.get_mut(query).filter(|part| part.index <= known) {
            part.index = 0;
        }
    }

    /// Follows what is wanted and nothing else. True if something no longer is.
    pub(super) fn adjust(&mut self, wanted: &Wanted, now: Instant) -> bool {
        let scopes = wanted.scopes();
        self.looked_up = wanted.looked_up.difference(&wanted.services).cloned().collect();
        let before = self.scopes.len();
        self.scopes.retain(|scope, _| scopes.contains(scope));
        let narrowed = self.scopes.len() < before;
        for scope in scopes {
            self.scopes.entry(scope).or_insert_with(|| State::begun(now));
        }
        self.resources.iter_mut().for_each(|resources| resources.adjust(wanted));
        let queries = self.queries();
        self.parts.retain(|query, _| queries.contains(query));
        self.suspects.retain(|query, _| queries.contains(query));
        self.garbled.retain(|query| queries.contains(query));
        self.instances.retain(|name, _| queries.contains(&Query::Instances(name.clone())));
        let scopes = &self.scopes;
        self.documents.retain(|_, documents| {
            documents.retain(|_, document| scopes.keys().any(|scope| scope.holds(&document.service)));
            !documents.is_empty()
        });
        narrowed
    }

    /// All that is wanted is to be listed again, as it is from now on.
    pub(super) fn resync(&mut self, now: Instant) {
        self.resources.iter_mut().for_each(Resources::resync);
        for state in self.scopes.values_mut() {
            state.list_from = Some(now);
        }
    }

    /// A service is to be read again: its instances, and documents where one says where it runs.
    pub(super) fn suspect(&mut self, service: &ServiceName, now: Instant) {
        let documents = self.documents.get(service.name()).into_iter().flat_map(BTreeMap::values);
        let has_places = |said: &Change| matches!(said, Change::Set(record) if !record.places.is_empty());
        let described =
            documents.filter(|document| document.service == *service).any(|it| has_places(it.said.as_ref()));
        let of_it = |query: &Query| match query {
            Query::Instances(name) => **name == *service.name(),
            Query::Names | Query::Resources(_) => false,
            _ => described,
        };
        let holding = self.scopes.keys().filter(|scope| scope.holds(service));
        let queries = holding.flat_map(|scope| self.needed(scope)).filter(of_it);
        let suspects: Vec<_> = queries.map(|query| (query, now)).collect();
        self.suspects.extend(suspects);
    }

    /// What is followed.
    pub(super) fn queries(&self) -> BTreeSet<Query> {
        let mut queries: BTreeSet<Query> = self.scopes.keys().flat_map(|scope| self.needed(scope)).collect();
        queries.extend(self.resources.as_ref().map(Resources::query));
        queries
    }

    /// What was read before a list that is due, and has to be read again for it; and what is suspected since it was read.
    pub(super) fn overdue(&self) -> BTreeSet<Query> {
        let due = self.scopes.iter().filter_map(|(scope, state)| Some((scope, state.list_from?)));
        let late = |from: Instant| move |query: &Query| self.parts.get(query).is_some_and(|part| part.as_of < from);
        let resources = self.resources.iter().filter(|resources| resources.is_due()).map(Resources::query);
        let suspects = self.suspects.iter().filter(|(query, from)| late(**from)(query)).map(|(query, _)| query.clone());
        let due = due.flat_map(|(scope, from)| self.needed(scope).into_iter().filter(late(from)));
        due.chain(suspects).chain(resources).filter(|query| !self.garbled.contains(query)).collect()
    }

    /// How far a query was read.
    pub(super) fn index(&self, query: &Query) -> u64 {
        self.parts.get(query).map_or(0, |part| part.index)
    }

    /// Each scope was listed in this life of the store.
    pub(super) fn is_whole(&self) -> bool {
        self.scopes.values().all(|state| state.listed)
    }

    /// An error where an answer is not to be understood at all: then it changes nothing.
    pub(super) fn take(&mut self, query: &Query, answer: Answer, now: Instant) -> Result<Vec<SourceEvent>, Error> {
        if !self.follows(query) {
            return Ok(Vec::new());
        }
        let known = self.index(query);
        // Of two questions under way together the earlier answer may come last.
        let is_newer = answer.index >= known;
        let understood = match &answer.content {
            Content::Instances(texts) if is_newer => self.understand(query, texts),
            _ => Ok(Vec::new()),
        };
        if understood.is_err() {
            self.garbled.insert(query.clone());
        } else {
            self.garbled.remove(query);
        }
        let understood = understood?;
        self.parts.insert(query.clone(), Part { index: known.max(answer.index), as_of: now });
        self.suspects.remove(query);
        if let (Content::Resources(pairs), Some(resources)) = (&answer.content, &mut self.resources) {
            let pairs = is_newer.then_some(pairs);
            return Ok(pairs.map_or_else(Vec::new, |pairs| resources.take(pairs, answer.index, self.cluster.as_ref())));
        }
        let mut changes: BTreeMap<Scope, Vec<Change>> = BTreeMap::new();
        if is_newer {
            self.advance(query, answer.index);
            let scopes: Vec<Scope> = self.scopes.keys().filter(|scope| needs(scope, query)).cloned().collect();
            let touched = self.touched(query, &answer.content);
            let before = self.said_of(&touched, &scopes);
            self.replace(query, answer.content, understood);
            let after = self.said_of(&touched, &scopes);
            for (scope, key) in before.keys().filter(|at| !after.contains_key(*at)) {
                changes.entry(scopes[*scope].clone()).or_default().push(Change::Removed(key.clone()));
            }
            for (at, change) in after {
                if before.get(&at).is_none_or(|before| !Arc::ptr_eq(before, &change) && *before != change) {
                    changes.entry(scopes[at.0].clone()).or_default().push(Arc::unwrap_or_clone(change));
                }
            }
        }
        Ok(self.tell(changes))
    }

    /// What to tell of each scope: its list if that is due and possible, else what changed since it was listed.
    fn tell(&mut self, mut changes: BTreeMap<Scope, Vec<Change>>) -> Vec<SourceEvent> {
        let mut events = Vec::new();
        let ready: Vec<Scope> = self.scopes.keys().filter(|scope| self.is_ready(scope)).cloned().collect();
        for scope in ready {
            changes.remove(&scope);
            events.extend(self.list(scope.clone()).map(SourceEvent::Listed));
            events.extend(self.goes_on(scope));
        }
        for (scope, mut changes) in changes {
            let Some(State { listed, position, .. }) = self.scopes.get(&scope) else { continue };
            let mut position = *position;
            if !listed {
                // What is there does not wait for a query that fails; what is gone, and how far this went, does.
                changes.retain(|change| is_wide(&scope) && matches!(change, Change::Set(_)));
                position = 0;
            }
            if !changes.is_empty() {
                events.push(SourceEvent::Changed { position, scope, changes });
            }
        }
        events
    }

    /// After a list that no earlier one goes on in, where this life of the store is.
    fn goes_on(&mut self, scope: Scope) -> Option<SourceEvent> {
        let state = self.scopes.get_mut(&scope)?;
        let position = state.position;
        let went_back = std::mem::take(&mut state.went_back);
        went_back.then(|| SourceEvent::Changed { scope, position, changes: Vec::new() })
    }

    fn is_ready(&self, scope: &Scope) -> bool {
        let Some(from) = self.scopes.get(scope).and_then(|state| state.list_from) else { return false };
        let read = |query: &Query| self.parts.get(query).is_some_and(|part| part.as_of >= from);
        self.cluster.is_some() && self.needed(scope).iter().all(read)
    }

    /// What a scope is made of was read this far. That does not fall when a service and its index go.
    fn advance(&mut self, query: &Query, index: u64) {
        for (scope, state) in &mut self.scopes {
            if needs(scope, query) && !matches!(query, Query::Documents(_)) {
                state.position = state.position.max(index);
            }
        }
    }

    fn list(&mut self, scope: Scope) -> Option<Listing> {
        let state = self.scopes.get_mut(&scope)?;
        (state.list_from, state.listed) = (None, true);
        let epoch = Epoch { store: self.cluster.clone()?, position: if state.went_back { 0 } else { state.position } };
        let mut listing = Listing::empty(scope, epoch);
        let names: BTreeSet<&Arc<str>> = self.documents.keys().chain(self.instances.keys()).collect();
        let mut said = BTreeMap::new();
        for name in names {
            self.say(name, &listing.scope, &mut said);
        }
        for change in said.values().map(|change: &Arc<Change>| &**change) {
            match change {
                Change::Set(record) => listing.records.push(record.clone()),
                Change::Refused(refused) => listing.refused.push(refused.clone()),
                Change::Removed(_) => {}
            }
        }
        Some(listing)
    }

    fn follows(&self, query: &Query) -> bool {
        if let Query::Resources(_) = query {
            return self.resources.is_some();
        }
        let named = match query {
            Query::Instances(name) => self.names.contains(name),
            _ => true,
        };
        self.scopes.keys().any(|scope| needs(scope, query) && (named || matches!(scope, Scope::Service(_))))
    }

    fn needed(&self, scope: &Scope) -> Vec<Query> {
        let instances = |name: &Arc<str>| Query::Instances(name.clone());
        let mut needed = vec![documents_of(scope)];
        match scope {
            Scope::Service(service) => needed.push(instances(&service.name().into())),
            Scope::Namespace(_) | Scope::Everything => {
                needed.push(Query::Names);
                needed.extend(self.names.iter().map(instances));
            }
        }
        needed
    }

    /// The names that an answer may say something new of.
    fn touched(&self, query: &Query, content: &Content) -> BTreeSet<Arc<str>> {
        match (query, content) {
            (Query::Instances(name), _) => BTreeSet::from([name.clone()]),
            (_, Content::Names(names)) => {
                let now: BTreeSet<&Arc<str>> = names.iter().collect();
                self.names.iter().filter(|name| !now.contains(name)).cloned().collect()
            }
            (Query::Documents(of), Content::Documents(pairs)) => {
                let now: BTreeMap<&str, u64> = pairs.iter().map(|pair| (&*pair.key, pair.modified)).collect();
                let gone = self.documents.iter().filter(|(_, documents)| {
                    let mut asked = documents.iter().filter(|(_, document)| document.is_of(of.as_deref()));
                    asked.any(|(key, document)| now.get(&**key) != Some(&document.modified))
                });
                let new = pairs.iter().filter_map(|pair| {
                    let name: Arc<str> = self.wanted_service(&pair.key)?.name().into();
                    let known = self.documents.get(&name).is_some_and(|known| known.contains_key(&*pair.key));
                    (!known).then_some(name)
                });
                gone.map(|(name, _)| name.clone()).chain(new).collect()
            }
            _ => BTreeSet::new(),
        }
    }

    fn wanted_service(&self, key: &str) -> Option<ServiceName> {
        self.reading.service_of(key).filter(|service| self.scopes.keys().any(|scope| scope.holds(service)))
    }

    fn replace(&mut self, query: &Query, content: Content, understood: Vec<Understood>) {
        match (query, content) {
            (Query::Instances(name), _) if understood.is_empty() => drop(self.instances.remove(name)),
            (Query::Instances(name), _) => drop(self.instances.insert(name.clone(), understood)),
            (_, Content::Names(names)) => {
                self.names = names.into_iter().collect();
                let queries = self.queries();
                self.parts.retain(|query, _| queries.contains(query));
                self.instances.retain(|name, _| queries.contains(&Query::Instances(name.clone())));
            }
            (Query::Documents(of), Content::Documents(pairs)) => self.replace_documents(of.as_deref(), &pairs),
            // A remote answers what it was asked.
            _ => {}
        }
    }

    /// Of the instances of a service, those it was not said of before in the same words.
    fn understand(&self, query: &Query, texts: &[Bytes]) -> Result<Vec<Understood>, Error> {
        let Query::Instances(name) = query else { return Ok(Vec::new()) };
        let before = self.instances.get(name).map(Vec::as_slice).unwrap_or_default();
        let by_hash: HashMap<u64, &Understood> = before.iter().map(|known| (known.hash, known)).collect();
        let last = |at: &str| before.iter().find(|known| known.instance.at() == at)?.instance.service.as_ref();
        let mut understood = Vec::with_capacity(texts.len());
        for text in texts {
            let hash = self.hashing.hash_one(&text[..]);
            if let Some(known) = by_hash.get(&hash) {
                understood.push((*known).clone());
                continue;
            }
            let read = self.reading.instance(name, text).map_err(|error| Error::garbage(query, &error))?;
            let Some(mut instance) = read else { continue };
            if instance.service.is_none()
                && let Some(service) = last(instance.at())
            {
                instance = instance.stays_with(service);
            }
            understood.push(Understood { hash, instance });
        }
        Ok(understood)
    }

    /// Only what was written since is read.
    fn replace_documents(&mut self, of: Option<&str>, pairs: &[Pair]) {
        let mut before = BTreeMap::new();
        self.documents.retain(|_, documents| {
            before.extend(documents.extract_if(.., |_, document| document.is_of(of)));
            !documents.is_empty()
        });
        for pair in pairs {
            let Some(service) = self.wanted_service(&pair.key) else { continue };
            let name: Arc<str> = service.name().into();
            let known = before.remove_entry(&*pair.key);
            let known = known.filter(|(_, document)| document.modified == pair.modified);
            let (key, document) =
                known.unwrap_or_else(|| (pair.key.as_str().into(), self.reading.document(service, pair)));
            self.documents.entry(name).or_default().insert(key, document);
        }
    }

    fn said_of(&self, names: &BTreeSet<Arc<str>>, scopes: &[Scope]) -> Said {
        let mut said = Said::new();
        for (at, scope) in scopes.iter().enumerate() {
            let mut here = BTreeMap::new();
            names.iter().for_each(|name| self.say(name, scope, &mut here));
            said.extend(here.into_iter().map(|(key, change)| ((at, key), change)));
        }
        said
    }

    /// What is said of a name within a scope.
    fn say(&self, name: &Arc<str>, scope: &Scope, said: &mut BTreeMap<Arc<str>, Arc<Change>>) {
        let documents = self.documents.get(name).into_iter().flatten();
        let of_scope = documents.filter(|(_, document)| scope.holds(&document.service));
        said.extend(of_scope.map(|(key, document)| (key.clone(), document.said.clone())));
        for Understood { instance, .. } in self.instances.get(name).into_iter().flatten() {
            // Where its service cannot be told, everybody who uses the name is told why.
            let concerns = instance.service.as_ref().is_none_or(|service| scope.holds(service));
            if concerns && self.is_meant(instance, name, scope) {
                said.insert(instance.key.clone(), instance.said.clone());
            }
        }
    }

    /// Whether an instance is anything to the mesh. Consul has many services that are not: one that does not say how the
    /// mesh reaches it counts only where its service has a document or is imported by its name.
    fn is_meant(&self, instance: &Instance, name: &Arc<str>, scope: &Scope) -> bool {
        let documented = || {
            let mut documents = self.documents.get(name).into_iter().flat_map(BTreeMap::values);
            documents.any(|document| Some(&document.service) == instance.service.as_ref())
        };
        let declared = matches!(scope, Scope::Service(service) if !self.looked_up.contains(service));
        instance.names_transport || declared || documented()
    }
}

/// Such a scope is made of many answers.
fn is_wide(scope: &Scope) -> bool {
    !matches!(scope, Scope::Service(_))
}

/// No others than may concern it: each is sent whole whenever one of them changes.
fn documents_of(scope: &Scope) -> Query {
    Query::Documents(match scope {
        Scope::Everything => None,
        Scope::Namespace(namespace) => Some(namespace.as_str().into()),
        Scope::Service(service) => Some(service.namespace().into()),
    })
}

/// Whether a query tells of a scope; of instances in a wide one, if such a name exists.
fn needs(scope: &Scope, query: &Query) -> bool {
    match (scope, query) {
        (_, Query::Documents(_)) => documents_of(scope) == *query,
        (_, Query::Resources(_)) => false,
        (Scope::Service(service), Query::Instances(name)) => service.name() == &**name,
        (scope, Query::Names | Query::Instances(_)) => is_wide(scope),
    }
}

impl State {
    fn begun(now: Instant) -> State {
        State { list_from: Some(now), listed: false, position: 0, went_back: false }
    }
}

#[cfg(test)]
#[path = "known_tests.rs"]
mod tests;
