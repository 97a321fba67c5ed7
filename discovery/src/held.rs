//! What one source says, as far as it is believed: the last good state of each of its records.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use tokio::time::Instant;

use crate::belief::{Belief, Loss, Peak, Unbroken};
use crate::shared::Shared;
use crate::{Change, Definition, Epoch, Listing, Place, Record, Refused, Scope, ServiceName, SourceEvent, Wanted};

#[derive(Debug)]
pub(crate) struct Held {
    belief: Belief,
    /// Boxed, because a third of a tree's slots are free.
    records: BTreeMap<Arc<str>, Box<Entry>>,
    /// So that a service is put together without looking at the others.
    by_service: HashMap<ServiceName, BTreeSet<Arc<str>>>,
    /// Keys that cannot be understood now, and in which scope they were read.
    refused: BTreeMap<Arc<str>, (Scope, Vec<String>)>,
    /// Which life of the store each scope was read from, and how far it had come.
    epochs: HashMap<Scope, Epoch>,
    /// The same when nothing was doubted: what a restart goes by, so that it does not end a doubt.
    settled: HashMap<Scope, Epoch>,
    /// Places and definitions that the source says exist, and those it no longer says.
    live: usize,
    stale: usize,
    peak: Peak,
    unbroken: Unbroken,
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

/// How much a record counts when it is lost.
fn size(record: &Record) -> usize {
    record.places.len() + usize::from(record.definition.is_some())
}

/// A narrower scope begins where the wider one was that held it.
fn narrow_epochs(epochs: &mut HashMap<Scope, Epoch>, scopes: &[Scope]) {
    let begun = |scope: &Scope| {
        let wider = || epochs.iter().find(|(known, _)| known.overlaps(scope)).map(|(_, epoch)| epoch);
        Some((scope.clone(), epochs.get(scope).or_else(wider)?.clone()))
    };
    *epochs = scopes.iter().filter_map(begun).collect();
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
            epochs: HashMap::new(),
            settled: HashMap::new(),
            live: 0,
            stale: 0,
            peak: Peak::default(),
            unbroken: Unbroken::default(),
        }
    }

    pub(crate) fn apply(&mut self, event: SourceEvent, now: Instant) -> Touched {
        let doubted = self.stale > 0;
        let touched = match event {
            SourceEvent::Listed(listing) => self.list(listing, now),
            SourceEvent::Reread { within, listing } => self.list_part(&within, listing, now),
            SourceEvent::Changed { scope, position, changes } => self.change(&scope, position, changes, now),
            SourceEvent::Narrowed(wanted) => self.narrow(&wanted),
            SourceEvent::Unavailable { .. } => {
                self.unbroken.breaks(now);
                Touched::new()
            }
            // `resources/held.rs`
            SourceEvent::Resources(_) | SourceEvent::InSync | SourceEvent::Troubled { .. } => Touched::new(),
        };
        if doubted && self.stale == 0 {
            self.settled.clone_from(&self.epochs);
        }
        touched
    }

    /// True once a list said what there is of a service, be it in an earlier life of this daemon.
    pub(crate) fn has_read(&self, service: &ServiceName) -> bool {
        self.epochs.keys().any(|scope| scope.holds(service))
    }

    pub(crate) fn has_listed(&self, scope: &Scope) -> bool {
        self.epochs.contains_key(scope)
    }

    pub(crate) fn services_in<'a>(&'a self, scope: &'a Scope) -> impl Iterator<Item = &'a ServiceName> {
        self.by_service.keys().filter(|service| scope.holds(service))
    }

    /// What the source said of a service, by key.
    pub(crate) fn of(&self, service: &ServiceName) -> impl Iterator<Item = &Entry> {
        self.by_service.get(service).into_iter().flatten().filter_map(|key| self.records.get(key).map(Box::as_ref))
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.records.values().map(Box::as_ref)
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

    /// As of which epochs what is held was believed without a doubt.
    pub(crate) fn settled(&self) -> impl Iterator<Item = (&Scope, &Epoch)> {
        self.settled.iter()
    }

    /// The last good state of an earlier life of this daemon.
    pub(crate) fn restore(&mut self, epochs: Vec<(Scope, Epoch)>, records: Vec<Record>, now: Instant) -> Touched {
        self.epochs = epochs.into_iter().collect();
        self.settled.clone_from(&self.epochs);
        self.take(records.into_iter().map(Next::Is), true, now)
    }

    /// The operator says that what is doubted is gone indeed.
    pub(crate) fn accept_losses(&mut self) -> Touched {
        let touched = self.settle(self.keys_in(&Scope::Everything), |_| true);
        self.settled.clone_from(&self.epochs);
        touched
    }

    fn list(&mut self, listing: Listing, now: Instant) -> Touched {
        let same_epoch = self.goes_on(&listing.scope, &listing.epoch);
        self.refused.retain(|_, (listed, _)| *listed != listing.scope);
        let within = listing.scope.clone();
        self.take_list(&within, listing, same_epoch, now)
    }

    /// A part of a scope. Which keys it refuses is known of the scope as a whole.
    fn list_part(&mut self, within: &Scope, listing: Listing, now: Instant) -> Touched {
        let Some(known) = self.epochs.get_mut(within) else { return Touched::new() };
        let same_epoch = known.continues_in(&listing.epoch);
        if same_epoch {
            known.position = listing.epoch.position;
        }
        for record in &listing.records {
            self.refused.remove(&record.key);
        }
        self.take_list(within, listing, same_epoch, now)
    }

    fn take_list(&mut self, within: &Scope, listing: Listing, same_epoch: bool, now: Instant) -> Touched {
        let Listing { scope, records, refused, .. } = listing;
        if !same_epoch {
            self.unbroken.breaks(now);
        }
        let said: HashSet<&Arc<str>> =
            records.iter().map(|record| &record.key).chain(refused.iter().map(|refused| &refused.key)).collect();
        let gone =
            self.keys_in(&scope).into_iter().filter(|key| !said.contains(key)).map(Next::Gone).collect::<Vec<_>>();
        let mut touched = Touched::new();
        for refused in refused {
            touched.extend(self.refuse(within, refused));
        }
        touched.extend(self.take(gone.into_iter().chain(records.into_iter().map(Next::Is)), same_epoch, now));
        // What was doubted a minute before this list has been repeated by it.
        let unbroken = self.unbroken;
        touched.extend(self.settle(self.keys_in(&scope), |since| unbroken.repeats(since, now)));
        self.note_settled(within);
        touched
    }

    fn change(&mut self, scope: &Scope, position: u64, changes: Vec<Change>, now: Instant) -> Touched {
        let (mut next, mut touched) = (Vec::new(), Touched::new());
        for change in changes {
            match change {
                Change::Set(record) => {
                    self.refused.remove(&record.key);
                    next.push(Next::Is(record));
                }
                Change::Removed(key) => {
                    self.refused.remove(&key);
                    next.extend(self.is_of(&key, scope).then_some(Next::Gone(key)));
                }
                Change::Refused(refused) => touched.extend(self.refuse(scope, refused)),
            }
        }
        if let Some(known) = self.epochs.get_mut(scope) {
            known.position = position.max(known.position);
        }
        touched.extend(self.take(next, true, now));
        self.note_settled(scope);
        touched
    }

    /// False where another scope has said since what its key is now.
    fn is_of(&self, key: &Arc<str>, scope: &Scope) -> bool {
        self.records.get(key).is_some_and(|entry| scope.holds(&entry.record.service))
    }

    /// What its key said before stays, and is there again if that was doubted.
    fn refuse(&mut self, scope: &Scope, Refused { key, problems }: Refused) -> Option<ServiceName> {
        self.refused.insert(key.clone(), (scope.clone(), problems));
        let entry = self.records.get_mut(&key)?;
        let gone = entry.gone.take()?;
        let (back, stale): (Vec<_>, Vec<_>) =
            std::mem::take(&mut entry.stale).into_iter().partition(|(_, since)| *since == gone);
        entry.record.places = back.into_iter().map(|(place, _)| place).collect();
        entry.stale = stale;
        self.stale -= size(&entry.record);
        self.live += size(&entry.record);
        Some(entry.record.service.clone())
    }

    fn note_settled(&mut self, scope: &Scope) {
        if self.stale == 0
            && let Some(epoch) = self.epochs.get(scope)
        {
            self.settled.insert(scope.clone(), epoch.clone());
        }
    }

    fn narrow(&mut self, wanted: &Wanted) -> Touched {
        let scopes = wanted.scopes();
        narrow_epochs(&mut self.epochs, &scopes);
        narrow_epochs(&mut self.settled, &scopes);
        self.refused.retain(|_, (read, _)| scopes.contains(read));
        let strange = |entry: &&Entry| !wanted.covers(&entry.record.service);
        let keys: Vec<_> = self.entries().filter(strange).map(|entry| entry.record.key.clone()).collect();
        keys.iter().filter_map(|key| self.remove(key)).collect()
    }

    fn keys_in(&self, scope: &Scope) -> Vec<Arc<str>> {
        match scope {
            Scope::Service(service) => self.by_service.get(service).into_iter().flatten().cloned().collect(),
            _ => {
                let holds = |entry: &&Entry| scope.holds(&entry.record.service);
                self.entries().filter(holds).map(|entry| entry.record.key.clone()).collect()
            }
        }
    }

    /// Whether a list continues what this source said before of the same services.
    fn goes_on(&mut self, scope: &Scope, epoch: &Epoch) -> bool {
        let goes_on = match self.epochs.get(scope) {
            Some(before) => before.continues_in(epoch),
            None => {
                let mut others = self.epochs.iter().filter(|(other, _)| other.overlaps(scope));
                others.all(|(_, before)| before.continues_in(epoch))
            }
        };
        self.epochs.insert(scope.clone(), epoch.clone());
        goes_on
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
                    touched.extend(self.leave(&record));
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
            if self.records.get(&key).is_some_and(|entry| doubted_now(entry)) {
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

    /// True when the source says of no place of the service that it exists, or no longer what it is.
    fn is_empty(&self, service: &ServiceName) -> bool {
        let no_places = self.of(service).all(|entry| entry.record.places.is_empty());
        no_places || self.of(service).any(|entry| entry.gone.is_some() && entry.definition().is_some())
    }

    /// A key that changes its service is another thing. The service it was of.
    fn leave(&mut self, record: &Record) -> Option<ServiceName> {
        let moved = self.records.get(&record.key).is_some_and(|entry| entry.record.service != record.service);
        if moved { self.remove(&record.key) } else { None }
    }

    /// Takes a record as it is now. Places it no longer has become stale, and no service is told yet.
    fn set(&mut self, mut record: Record, now: Instant) -> Option<ServiceName> {
        self.share(&mut record);
        let service = record.service.clone();
        let Some(entry) = self.records.get_mut(&record.key) else {
            self.live += size(&record);
            self.by_service.entry(service.clone()).or_default().insert(record.key.clone());
            self.records.insert(record.key.clone(), Box::new(Entry::new(record)));
            return Some(service);
        };
        if let (Some(said), Some(known)) = (&mut record.definition, entry.definition())
            && said.identities.is_empty()
        {
            // Else what is doubted to be gone could serve no more.
            Arc::make_mut(said).identities.clone_from(&known.identities);
        }
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
        if entry.gone.take().is_some() {
            self.stale -= usize::from(entry.record.definition.is_some());
        } else {
            self.live -= size(&entry.record);
            let lost: Vec<_> = entry.record.places.iter().filter(|old| !back(old)).cloned().collect();
            self.stale += lost.len();
            entry.stale.extend(lost.into_iter().map(|place| (place, now)));
        }
        self.stale -= returned;
        self.live += size(&record);
        entry.record = record;
        Some(service)
    }

    /// What a service's records repeat is kept once.
    fn share(&self, record: &mut Record) {
        if let Some((name, _)) = self.by_service.get_key_value(&record.service) {
            record.service = name.clone();
        }
        let mut shared = Shared::of(self.of(&record.service).flat_map(|entry| &entry.record.places));
        record.places.iter_mut().for_each(|place| shared.share(place));
    }

    /// The record is no longer said. All its places become stale.
    fn lose(&mut self, key: &Arc<str>, now: Instant) -> Option<ServiceName> {
        let entry = self.records.get_mut(key)?;
        if entry.gone.is_some() {
            return None;
        }
        entry.gone = Some(now);
        self.live -= size(&entry.record);
        self.stale += size(&entry.record);
        let places = std::mem::take(&mut entry.record.places);
        entry.stale.extend(places.into_iter().map(|place| (place, now)));
        Some(entry.record.service.clone())
    }

    fn remove(&mut self, key: &Arc<str>) -> Option<ServiceName> {
        let entry = self.records.remove(key)?;
        self.stale -= entry.stale.len();
        if entry.gone.is_some() {
            self.stale -= size(&entry.record);
        } else {
            self.live -= size(&entry.record);
        }
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
