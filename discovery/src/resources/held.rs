//! What one source says of resources, as far as it is believed: the last good state of each of its keys. The same promise
//! as for services (`belief.rs`), with one thing more: a single document that is removed by name, by somebody who meant it,
//! is gone at once, also if it was the last.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use tokio::time::Instant;

use super::news::{Change, News, Record, Refusal, is_wanted};
use super::{Id, Kind, Resource, Target};
use crate::belief::{Belief, Loss, Peak, Unbroken};
use crate::{Epoch, Wanted};

#[derive(Debug)]
pub(crate) struct HeldResources {
    belief: Belief,
    records: BTreeMap<Arc<str>, Entry>,
    by_id: HashMap<Id, BTreeSet<Arc<str>>>,
    by_target: HashMap<Target, BTreeSet<Id>>,
    refused: BTreeMap<Arc<str>, Vec<String>>,
    epochs: BTreeMap<Arc<str>, Epoch>,
    /// The same when nothing was doubted: what a restart goes by.
    settled: BTreeMap<Arc<str>, Epoch>,
    stale: usize,
    peaks: BTreeMap<Measured, Peak>,
    /// The keys of records that stand for documents nobody understands.
    unclear: BTreeSet<Arc<str>>,
    /// Prefixes of which something was said, good or bad.
    heard: BTreeSet<Arc<str>>,
    unbroken: Unbroken,
}

/// What a loss is measured against: all below a prefix, and a kind alone, so that much of one does not hide that all of
/// another went.
type Measured = (Arc<str>, Option<Kind>);

#[derive(Debug)]
struct Entry {
    record: Record,
    /// No longer there, which is doubted since then.
    gone: Option<Instant>,
}

impl Entry {
    fn kind(&self) -> Option<Kind> {
        self.record.resources.first().map(Resource::kind)
    }
}

/// What may be another one now, and what that is attached to, before or after.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Touched {
    pub(crate) ids: BTreeSet<Id>,
    pub(crate) targets: BTreeSet<Target>,
}

impl Touched {
    pub(crate) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    fn add(&mut self, record: &Record) {
        self.ids.extend(record.resources.iter().map(Resource::id));
        self.targets.extend(record.resources.iter().flat_map(Resource::targets));
    }

    pub(crate) fn extend(&mut self, other: Touched) {
        self.ids.extend(other.ids);
        self.targets.extend(other.targets);
    }
}

impl HeldResources {
    pub(crate) fn new(belief: Belief) -> HeldResources {
        HeldResources {
            belief,
            records: BTreeMap::new(),
            by_id: HashMap::new(),
            by_target: HashMap::new(),
            refused: BTreeMap::new(),
            epochs: BTreeMap::new(),
            settled: BTreeMap::new(),
            stale: 0,
            peaks: BTreeMap::new(),
            unclear: BTreeSet::new(),
            heard: BTreeSet::new(),
            unbroken: Unbroken::default(),
        }
    }

    pub(crate) fn apply(&mut self, news: News, now: Instant) -> Touched {
        let doubted = self.stale > 0;
        self.heard.insert(news.prefix().clone());
        let touched = match news {
            News::Listed { prefix, epoch, records, refused } => self.list(&prefix, epoch, records, refused, now),
            News::Changed { prefix, position, changes } => self.change(&prefix, position, changes, now),
        };
        if self.stale == 0 && (doubted || self.settled != self.epochs) {
            self.settled.clone_from(&self.epochs);
        }
        touched
    }

    /// The source cannot be read now: what it does not say repeats nothing.
    pub(crate) fn is_away(&mut self, now: Instant) {
        self.unbroken.breaks(now);
    }

    /// What is no concern of this host is forgotten, and nobody doubts that.
    pub(crate) fn narrow(&mut self, wanted: &Wanted) -> Touched {
        let strange = |entry: &&Entry| !is_wanted(&entry.record.resources, wanted);
        let keys: Vec<_> = self.records.values().filter(strange).map(|entry| entry.record.key.clone()).collect();
        self.remove_all(&keys)
    }

    /// What an earlier life knew.
    pub(crate) fn restore(&mut self, epochs: Vec<(Arc<str>, Epoch)>, records: Vec<Record>) -> Touched {
        self.epochs = epochs.into_iter().collect();
        self.settled.clone_from(&self.epochs);
        self.heard.extend(self.epochs.keys().cloned());
        let mut touched = Touched::default();
        records.into_iter().for_each(|record| self.set(record, &mut touched));
        touched
    }

    pub(crate) fn accept_losses(&mut self) -> Touched {
        let gone = |entry: &&Entry| entry.gone.is_some();
        let keys: Vec<_> = self.records.values().filter(gone).map(|entry| entry.record.key.clone()).collect();
        self.settled.clone_from(&self.epochs);
        self.remove_all(&keys)
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values().map(|entry| &entry.record)
    }

    pub(crate) fn settled(&self) -> impl Iterator<Item = (&Arc<str>, &Epoch)> {
        self.settled.iter()
    }

    /// Until then nobody knows whether there is anything below a prefix.
    pub(crate) fn has_heard_of(&self, prefix: &Arc<str>) -> bool {
        self.heard.contains(prefix)
    }

    pub(crate) fn stale(&self) -> usize {
        self.stale
    }

    pub(crate) fn refused(&self) -> impl Iterator<Item = &String> {
        self.refused.values().flatten()
    }

    pub(crate) fn count_refused(&self) -> usize {
        self.refused.len()
    }

    /// Without what stands for documents that are refused.
    pub(crate) fn len(&self) -> usize {
        self.by_id.len() - self.unclear().count()
    }

    /// What stands for documents of which nothing good was ever known.
    pub(crate) fn unclear(&self) -> impl Iterator<Item = &Record> {
        self.unclear.iter().filter_map(|key| Some(&self.records.get(key)?.record))
    }

    /// The resource of that name and where it was read. Of two keys that say the same name, the first holds.
    pub(crate) fn get(&self, id: &Id) -> Option<(&Resource, &Record)> {
        let record = &self.records.get(self.by_id.get(id)?.first()?)?.record;
        let resource = record.resources.iter().find(|resource| resource.id() == *id)?;
        Some((resource, record))
    }

    pub(crate) fn at<'h>(&'h self, target: &Target) -> impl Iterator<Item = &'h Id> + use<'h> {
        self.by_target.get(target).into_iter().flatten()
    }

    /// Names that two keys say, each with the keys that do not hold.
    pub(crate) fn duplicates(&self) -> impl Iterator<Item = String> {
        let twice = self.by_id.iter().filter(|(_, keys)| keys.len() > 1);
        twice.flat_map(|(id, keys)| {
            let origin =
                |key: &Arc<str>| self.records.get(key).map(|entry| entry.record.origin.clone()).unwrap_or_default();
            let first = keys.first().map(origin).unwrap_or_default();
            keys.iter().skip(1).map(move |key| {
                format!("{}: {id} is already said by {first}, which holds; remove one of them", origin(key))
            })
        })
    }

    fn list(
        &mut self,
        prefix: &Arc<str>,
        epoch: Epoch,
        records: Vec<Record>,
        refused: Vec<Refusal>,
        now: Instant,
    ) -> Touched {
        let before = self.epochs.insert(prefix.clone(), epoch.clone());
        if !before.as_ref().is_some_and(|before| before.continues_in(&epoch)) {
            self.unbroken.breaks(now);
        }
        // Without an earlier list there is nothing that the store could have gone on from.
        let same_epoch = before.is_some_and(|before| !epoch.store.is_empty() && before.continues_in(&epoch));
        let said: HashSet<Arc<str>> = records
            .iter()
            .map(|record| &record.key)
            .chain(refused.iter().map(|refused| &refused.key))
            .cloned()
            .collect();
        let gone: Vec<_> = self.below(prefix).filter(|key| !said.contains(key)).collect();
        self.refused.retain(|key, _| !key.starts_with(&**prefix));
        let mut touched = Touched::default();
        refused.into_iter().for_each(|refused| self.refuse(refused, &mut touched));
        self.take(
            prefix,
            records,
            &gone,
            |left, peak, belief| belief.accepts(Loss { left, empties_a_service: left == 0, same_epoch }, peak),
            now,
            &mut touched,
        );
        let repeated = |entry: &&Entry| entry.gone.is_some_and(|since| self.unbroken.repeats(since, now));
        let settled: Vec<_> = self.records.values().filter(repeated).map(|entry| entry.record.key.clone()).collect();
        let settled: Vec<_> =
            settled.into_iter().filter(|key| key.starts_with(&**prefix) && !said.contains(key)).collect();
        touched.extend(self.remove_all(&settled));
        touched
    }

    fn change(&mut self, prefix: &Arc<str>, position: u64, changes: Vec<Change>, now: Instant) -> Touched {
        let (mut set, mut gone, mut touched) = (Vec::new(), Vec::new(), Touched::default());
        for change in changes {
            match change {
                Change::Set(record) => {
                    self.refused.remove(&record.key);
                    gone.retain(|key| *key != record.key);
                    set.push(record);
                }
                Change::Removed(key) => {
                    self.refused.remove(&key);
                    set.retain(|record| record.key != key);
                    gone.extend(self.records.contains_key(&key).then_some(key));
                }
                Change::Refused(refused) => self.refuse(refused, &mut touched),
            }
        }
        if let Some(known) = self.epochs.get_mut(prefix) {
            known.position = position.max(known.position);
        }
        self.take(
            prefix,
            set,
            &gone,
            |left, peak, belief| {
                // One of them, named: somebody meant it.
                peak <= left + 1 || belief.accepts(Loss { left, empties_a_service: left == 0, same_epoch: true }, peak)
            },
            now,
            &mut touched,
        );
        touched
    }

    fn below<'h>(&'h self, prefix: &'h Arc<str>) -> impl Iterator<Item = Arc<str>> + 'h {
        self.entries_below(prefix).map(|entry| entry.record.key.clone())
    }

    fn entries_below<'h>(&'h self, prefix: &'h Arc<str>) -> impl Iterator<Item = &'h Entry> {
        let from = self.records.range(prefix.clone()..);
        from.take_while(|(key, _)| key.starts_with(&**prefix)).map(|(_, entry)| entry)
    }

    /// What is there and not doubted.
    fn live(&self, prefix: &Arc<str>) -> BTreeMap<Measured, usize> {
        let mut live = BTreeMap::new();
        for entry in self.entries_below(prefix).filter(|entry| entry.gone.is_none()) {
            let kind = entry.kind().map(Some);
            for of in std::iter::once(None).chain(kind) {
                *live.entry((prefix.clone(), of)).or_default() += 1;
            }
        }
        live
    }

    /// The same, and the most there was lately, of whatever there was.
    fn measure(&mut self, prefix: &Arc<str>, now: Instant) -> Vec<(usize, usize)> {
        let live = self.live(prefix);
        for measured in live.keys().filter(|measured| !self.peaks.contains_key(*measured)).cloned().collect::<Vec<_>>()
        {
            self.peaks.insert(measured, Peak::default());
        }
        let peaks = self.peaks.iter_mut().filter(|((of, _), _)| of == prefix);
        let measured = peaks.map(|(measured, peak)| {
            let count = live.get(measured).copied().unwrap_or_default();
            peak.note(count, now);
            (count, peak.within(now))
        });
        measured.collect()
    }

    /// What is there is taken; what is gone is taken away where that is believed, and doubted elsewhere.
    fn take(
        &mut self,
        prefix: &Arc<str>,
        set: Vec<Record>,
        gone: &[Arc<str>],
        believed: impl Fn(usize, usize, Belief) -> bool,
        now: Instant,
        touched: &mut Touched,
    ) {
        self.measure(prefix, now);
        set.into_iter().for_each(|record| self.set(record, touched));
        let news: Vec<Arc<str>> = gone.iter().filter(|key| self.lose(key, now)).cloned().collect();
        let measured = self.measure(prefix, now);
        if !news.is_empty() && measured.into_iter().all(|(left, peak)| believed(left, peak, self.belief)) {
            touched.extend(self.remove_all(&news));
        }
    }

    fn set(&mut self, record: Record, touched: &mut Touched) {
        self.back(&record.key);
        if let Some(entry) = self.records.get(&record.key) {
            if entry.record == record {
                return;
            }
            touched.extend(self.remove_all(std::slice::from_ref(&record.key)));
        }
        touched.add(&record);
        if record.is_unclear() {
            self.unclear.insert(record.key.clone());
        }
        for resource in &record.resources {
            self.by_id.entry(resource.id()).or_default().insert(record.key.clone());
            for target in resource.targets() {
                self.by_target.entry(target).or_default().insert(resource.id());
            }
        }
        self.records.insert(record.key.clone(), Entry { record, gone: None });
    }

    /// What its key said before stays, and is there again if that was doubted.
    fn refuse(&mut self, Refusal { key, problems, meanwhile }: Refusal, touched: &mut Touched) {
        self.back(&key);
        let was_good = self.records.get(&key).is_some_and(|entry| !entry.record.is_unclear());
        match meanwhile {
            Some(record) if !was_good => self.set(record, touched),
            None if self.unclear.contains(&key) => touched.extend(self.remove_all(std::slice::from_ref(&key))),
            _ => {}
        }
        self.refused.insert(key, problems);
    }

    fn back(&mut self, key: &Arc<str>) {
        if self.records.get_mut(key).is_some_and(|entry| entry.gone.take().is_some()) {
            self.stale -= 1;
        }
    }

    /// True when it was there until now.
    fn lose(&mut self, key: &Arc<str>, now: Instant) -> bool {
        let Some(entry) = self.records.get_mut(key).filter(|entry| entry.gone.is_none()) else { return false };
        entry.gone = Some(now);
        self.stale += 1;
        true
    }

    fn remove_all(&mut self, keys: &[Arc<str>]) -> Touched {
        let mut touched = Touched::default();
        for key in keys {
            let Some(Entry { record, gone }) = self.records.remove(key) else { continue };
            self.stale -= usize::from(gone.is_some());
            self.unclear.remove(key);
            touched.add(&record);
            for resource in &record.resources {
                self.forget(key, resource);
            }
        }
        touched
    }

    fn forget(&mut self, key: &Arc<str>, resource: &Resource) {
        let id = resource.id();
        let others = self.by_id.get_mut(&id).map_or(0, |keys| {
            keys.remove(key);
            keys.len()
        });
        if others > 0 {
            return;
        }
        self.by_id.remove(&id);
        for target in resource.targets() {
            if let Some(ids) = self.by_target.get_mut(&target) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.by_target.remove(&target);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "held_tests.rs"]
mod tests;
