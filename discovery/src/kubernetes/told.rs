//! WHAT is told of an area: all of it after a list, then what changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::time::Instant;

use super::area::Area;
use super::kept::Names;
use super::read::{self, Reader};
use crate::{Change, Epoch, Listing, Refused, Scope, ServiceName};

impl Area {
    fn read(&mut self, reader: &Reader, name: &ServiceName) -> Vec<Change> {
        let document = self.kept.document(name);
        let mut changes: Vec<Change> = document.into_iter().filter_map(|document| reader.document(document)).collect();
        let Some(service) = self.kept.service(name) else { return changes };
        let is_alone = self.index_of(name).is_some_and(|index| matches!(self.told_as[index], Scope::Service(_)));
        let is_named = is_alone && !self.looked_up.contains(name);
        let slices = self.kept.slices_of(name).collect();
        let known = read::Known { service, slices, pods: &self.kept.pods, is_named, is_described: document.is_some() };
        changes.extend(reader.read(&known, self.learned.entry(name.clone()).or_default(), Instant::now()));
        changes
    }

    /// For which scope it is read: the only one, or one of services in order.
    pub(super) fn index_of(&self, name: &ServiceName) -> Option<usize> {
        match self.told_as.as_slice() {
            [only] => only.holds(name).then_some(0),
            many => many.binary_search(&Scope::Service(name.clone())).ok(),
        }
    }

    /// What there is of each scope, as of `epoch`.
    pub(super) fn listings(&mut self, reader: &Reader, epoch: &Epoch) -> Vec<Listing> {
        if !self.held_back.is_empty() {
            return Vec::new();
        }
        let mut listings: Vec<Listing> =
            self.told_as.iter().map(|scope| Listing::empty(scope.clone(), epoch.clone())).collect();
        self.told.clear();
        self.learned.retain(|name, _| self.kept.service(name).is_some());
        for name in self.kept.names() {
            let Some(index) = self.index_of(&name) else { continue };
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
        // What is wanted since it was asked for is told by the next list.
        listings.retain(|listing| self.pick.covers(&listing.scope));
        for (listing, reason) in listings.iter_mut().zip(self.denied.iter().cycle()) {
            let key = format!("{}/documents", access_key(&listing.scope)).into();
            listing.refused.push(Refused { key, problems: vec![reason.clone()] });
        }
        listings
    }

    /// What is to be told of services that may have changed, by scope.
    pub(super) fn changes(&mut self, reader: &Reader, touched: &Names) -> BTreeMap<Scope, Vec<Change>> {
        let mut all: BTreeMap<Scope, Vec<Change>> = BTreeMap::new();
        // What is listed next says all of it.
        if !self.is_whole {
            return all;
        }
        for name in touched.difference(&self.held_back.clone()) {
            let Some(scope) = self.index_of(name).map(|index| self.told_as[index].clone()) else { continue };
            let mut changes = self.read(reader, name);
            let now: BTreeSet<Arc<str>> = changes.iter().map(|change| change_key(change).clone()).collect();
            let before = self.told.remove(name).unwrap_or_default();
            changes.extend(before.difference(&now).cloned().map(Change::Removed));
            if self.kept.service(name).is_none() {
                self.learned.remove(name);
            }
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
    pub(super) fn forbidden(&self, reason: &str) -> Vec<(Scope, Change)> {
        let refused = |scope: &Scope| {
            let key = access_key(scope).into();
            (scope.clone(), Change::Refused(Refused { key, problems: vec![reason.to_owned()] }))
        };
        self.told_as.iter().map(refused).collect()
    }
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
