//! What one source says, as far as it is believed: the last good state of each of its records.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use tokio::time::Instant;

use crate::belief::{Belief, Loss, Peak, REPEATED_FOR};
use crate::{Change, Definition, Epoch, Listing, Place, Record, Refused, Scope, ServiceName, SourceEvent, Wanted};

#[derive(Debug)]
pub(crate) struct Held {
    belief: Belief,
    records: BTreeMap<Arc<str>, Entry>,
    /// So that a service is put together without looking at the others.
    by_service: HashMap<ServiceName, BTreeSet<Arc<str>>>,
    /// Keys that cannot be understood now, and in which scope they were read.
    refused: BTreeMap<Arc<str>, (Scope, Vec<String>)>,
    /// The life of the store that was read last, and how far each scope had come in it.
    store: Arc<str>,
    positions: HashMap<Scope, u64>,
    /// Places that the source says exist; those of `stale` are not among them.
    live: usize,
    stale: usize,
    peak: Peak,
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) record: Record,
    /// Places the record no longer has, and since when that is doubted.
    pub(crate) stale: Vec<(Arc<Place>, Instant)>,
    /// The record itself is no longer there, which is doubted; its definition stays.
    gone: Option<Instant>,
}

impl Entry {
    fn new(record: Record) -> Entry {
        Entry { record, stale: Vec::new(), gone: None }
    }

    pub(crate) fn definition(&self) -> Option<&Arc<Definition>> {
        self.record.definition.as_ref()
    }
}

/// The services an event may have changed.
pub(crate) type Touched = BTreeSet<ServiceName>;

/// What a record is to become.
enum Next {
    Is(Record),
    Gone(Arc<str>),
}

impl Held {
    pub(crate) fn new(belief: Belief) -> Held {
        Held {
            belief,
            records: BTreeMap::new(),
            by_service: HashMap::new(),
            refused: BTreeMap::new(),
            store: "".into(),
            positions: HashMap::new(),
            live: 0,
            stale: 0,
            peak: Peak::default(),
        }
    }

    pub(crate) fn apply(&mut self, event: SourceEvent, now: Instant) -> Touched {
        match event {
            SourceEvent::Listed(listing) => self.list(listing, now),
            SourceEvent::Changed { scope, position, changes } => self.change(&scope, position, changes, now),
            SourceEvent::Narrowed(wanted) => self.narrow(&wanted),
            SourceEvent::InSync | SourceEvent::Unavailable { .. } => Touched::new(),
        }
    }

    /// What the source said of a service, by key.
    pub(crate) fn of(&self, service: &ServiceName) -> impl Iterator<Item = &Entry> {
        self.by_service.get(service).into_iter().flatten().filter_map(|key| self.records.get(key))
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.records.values()
    }

    #[cfg(test)]
    pub(crate) fn live(&self) -> usize {
        self.live
    }

    pub(crate) fn stale(&self) -> usize {
        self.stale
    }

    /// All that cannot be understood now; full messages.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &String> {
        self.refused.values().flat_map(|(_, problems)| problems)
    }

    pub(crate) fn epochs(&self) -> impl Iterator<Item = (&Scope, Epoch)> {
        self.positions.iter().map(|(scope, position)| (scope, Epoch { store: self.store.clone(), position: *position }))
    }

    /// The last good state of an earlier life of this daemon.
    pub(crate) fn restore(&mut self, epochs: Vec<(Scope, Epoch)>, records: Vec<Record>, now: Instant) -> Touched {
        for (scope, epoch) in epochs {
            self.store = epoch.store;
            self.positions.insert(scope, epoch.position);
        }
        self.take(records.into_iter().map(Next::Is), true, now)
    }

    /// The operator says that what is doubted is gone indeed.
    pub(crate) fn accept_losses(&mut self) -> Touched {
        self.settle(self.keys_in(&Scope::Everything), |_| true)
    }

    fn list(&mut self, listing: Listing, now: Instant) -> Touched {
        let Listing { scope, epoch, records, refused } = listing;
        let same_epoch = self.goes_on(&scope, &epoch);
        let said: HashSet<&Arc<str>> =
            records.iter().map(|record| &record.key).chain(refused.iter().map(|refused| &refused.key)).collect();
        let gone =
            self.keys_in(&scope).into_iter().filter(|key| !said.contains(key)).map(Next::Gone).collect::<Vec<_>>();
        self.refused.retain(|_, (listed, _)| *listed != scope);
        for Refused { key, problems } in refused {
            self.refused.insert(key, (scope.clone(), problems));
        }
        let mut touched = self.take(gone.into_iter().chain(records.into_iter().map(Next::Is)), same_epoch, now);
        // What was doubted a minute before this list has been repeated by it.
        touched.extend(self.settle(self.keys_in(&scope), |since| now.saturating_duration_since(since) >= REPEATED_FOR));
        touched
    }

    fn change(&mut self, scope: &Scope, position: u64, changes: Vec<Change>, now: Instant) -> Touched {
        let mut next = Vec::new();
        for change in changes {
            match change {
                Change::Set(record) => {
                    self.refused.remove(&record.key);
                    next.push(Next::Is(record));
                }
                Change::Removed(key) => {
                    self.refused.remove(&key);
                    next.push(Next::Gone(key));
                }
                Change::Refused(Refused { key, problems }) => {
                    self.refused.insert(key, (scope.clone(), problems));
                }
            }
        }
        let known = self.positions.entry(scope.clone()).or_default();
        *known = position.max(*known);
        self.take(next, true, now)
    }

    fn narrow(&mut self, wanted: &Wanted) -> Touched {
        let scopes = wanted.scopes();
        self.positions.retain(|scope, _| scopes.contains(scope));
        self.refused.retain(|_, (read, _)| scopes.contains(read));
        let strange = |entry: &&Entry| !wanted.covers(&entry.record.service);
        let keys: Vec<_> = self.records.values().filter(strange).map(|entry| entry.record.key.clone()).collect();
        keys.iter().filter_map(|key| self.remove(key)).collect()
    }

    fn keys_in(&self, scope: &Scope) -> Vec<Arc<str>> {
        match scope {
            Scope::Service(service) => self.by_service.get(service).into_iter().flatten().cloned().collect(),
            _ => {
                let holds = |entry: &&Entry| scope.holds(&entry.record.service);
                self.records.values().filter(holds).map(|entry| entry.record.key.clone()).collect()
            }
        }
    }

    /// Whether a list continues what this source said before of the same scope.
    fn goes_on(&mut self, scope: &Scope, epoch: &Epoch) -> bool {
        let same_store = self.store == epoch.store || self.positions.is_empty();
        if !same_store {
            self.positions.clear();
        }
        self.store = epoch.store.clone();
        let before = self.positions.insert(scope.clone(), epoch.position);
        same_store && before.is_none_or(|before| before <= epoch.position)
    }

    /// What is there is taken; what is gone is taken away where that is believed, and doubted elsewhere.
    fn take(&mut self, next: impl IntoIterator<Item = Next>, same_epoch: bool, now: Instant) -> Touched {
        self.peak.note(self.live, now);
        let peak = self.peak.within(now);
        let mut touched = Touched::new();
        let mut lost: Vec<Arc<str>> = Vec::new();
        for next in next {
            let key = match next {
                Next::Is(record) => {
                    let key = record.key.clone();
                    touched.extend(self.set(record, now));
                    key
                }
                Next::Gone(key) => {
                    touched.extend(self.lose(&key, now));
                    key
                }
            };
            let doubted_now =
                |entry: &Entry| entry.gone == Some(now) || entry.stale.iter().any(|(_, since)| *since == now);
            if self.records.get(&key).is_some_and(doubted_now) {
                lost.push(key);
            }
        }
        let empties_a_service =
            lost.iter().any(|key| self.records.get(key).is_some_and(|entry| self.is_empty(&entry.record.service)));
        let loss = Loss { left: self.live, empties_a_service, same_epoch };
        if !lost.is_empty() && self.belief.accepts(loss, peak) {
            for key in lost {
                touched.extend(self.settle_one(&key, &|since| since == now));
            }
        }
        self.peak.note(self.live, now);
        touched
    }

    /// True when the source says of no place of the service that it exists.
    fn is_empty(&self, service: &ServiceName) -> bool {
        self.of(service).all(|entry| entry.gone.is_some() || entry.record.places.is_empty())
    }

    /// Takes a record as it is now. Places it no longer has become stale, and no service is told yet.
    fn set(&mut self, mut record: Record, now: Instant) -> Option<ServiceName> {
        let service = record.service.clone();
        // A key that changes its service is another thing; only our own form of keys could do that.
        if self.records.get(&record.key).is_some_and(|entry| entry.record.service != service) {
            self.remove(&record.key.clone());
        }
        let Some(entry) = self.records.get_mut(&record.key) else {
            self.live += record.places.len();
            self.by_service.entry(service.clone()).or_default().insert(record.key.clone());
            self.records.insert(record.key.clone(), Entry::new(record));
            return Some(service);
        };
        if entry.gone.is_none() && entry.record == record {
            return None;
        }
        for place in &mut record.places {
            // The same allocation where nothing changed.
            if let Some(known) = entry.record.places.iter().find(|known| *known == place) {
                *place = known.clone();
            }
        }
        let back = |old: &Place| record.places.iter().any(|place| place.is_same_as(old));
        let before = entry.stale.len();
        entry.stale.retain(|(old, _)| !back(old));
        let returned = before - entry.stale.len();
        if entry.gone.take().is_none() {
            self.live -= entry.record.places.len();
            let lost: Vec<_> = entry.record.places.iter().filter(|old| !back(old)).cloned().collect();
            self.stale += lost.len();
            entry.stale.extend(lost.into_iter().map(|place| (place, now)));
        }
        self.stale -= returned;
        self.live += record.places.len();
        entry.record = record;
        Some(service)
    }

    /// The record is no longer said. All its places become stale.
    fn lose(&mut self, key: &Arc<str>, now: Instant) -> Option<ServiceName> {
        let entry = self.records.get_mut(key)?;
        if entry.gone.is_some() {
            return None;
        }
        entry.gone = Some(now);
        let places = std::mem::take(&mut entry.record.places);
        self.live -= places.len();
        self.stale += places.len();
        entry.stale.extend(places.into_iter().map(|place| (place, now)));
        Some(entry.record.service.clone())
    }

    fn remove(&mut self, key: &Arc<str>) -> Option<ServiceName> {
        let entry = self.records.remove(key)?;
        self.live -= entry.record.places.len();
        self.stale -= entry.stale.len();
        let service = entry.record.service;
        if let Some(keys) = self.by_service.get_mut(&service) {
            keys.remove(key);
            if keys.is_empty() {
                self.by_service.remove(&service);
            }
        }
        Some(service)
    }

    fn settle(&mut self, keys: Vec<Arc<str>>, believed: impl Fn(Instant) -> bool) -> Touched {
        keys.iter().filter_map(|key| self.settle_one(key, &believed)).collect()
    }

    /// Takes away what was lost at a time for which the loss is believed.
    fn settle_one(&mut self, key: &Arc<str>, believed: &impl Fn(Instant) -> bool) -> Option<ServiceName> {
        let entry = self.records.get_mut(key)?;
        if entry.gone.is_some_and(believed) {
            return self.remove(key);
        }
        let before = entry.stale.len();
        entry.stale.retain(|(_, since)| !believed(*since));
        let settled = before - entry.stale.len();
        self.stale -= settled;
        (settled > 0).then(|| entry.record.service.clone())
    }
}

#[cfg(test)]
#[path = "held_tests.rs"]
mod tests;
