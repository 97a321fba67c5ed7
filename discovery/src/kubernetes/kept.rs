//! What is kept of an area's objects, and which of them belong together. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::leases::Keeper;
use super::objects::{Kind, LEASE, LEASE_HOLDER, Mesh, Object, Pod, Service, Slice};
use crate::ServiceName;

/// Services that may have changed.
pub(super) type Names = BTreeSet<ServiceName>;

#[derive(Debug, Default)]
pub(super) struct Kept {
    services: HashMap<ServiceName, Service>,
    slices: HashMap<ServiceName, BTreeMap<Arc<str>, Slice>>,
    pub(super) pods: HashMap<Arc<str>, Pod>,
    documents: HashMap<ServiceName, Mesh>,
    /// Of which service a slice is.
    owners: HashMap<Arc<str>, ServiceName>,
    /// Which slices name a pod.
    named_by: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// Zones and accounts, each once.
    words: HashSet<Arc<str>>,
    /// Slices came or went that a Lease keeps.
    pub(super) keepers_changed: bool,
}

/// What became of an object.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) services: Names,
    /// A Service selects other pods than before.
    pub(super) selector: bool,
}

impl Changed {
    fn nothing() -> Changed {
        Changed::default()
    }

    fn of(service: ServiceName) -> Changed {
        Changed { services: [service].into(), selector: false }
    }
}

impl Kept {
    /// Before a list of a kind is taken.
    pub(super) fn clear(&mut self, kind: Kind) {
        match kind {
            Kind::Service => self.services.clear(),
            Kind::Slice => {
                let was_kept = self.keepers().next().is_some();
                self.keepers_changed |= was_kept;
                self.slices.clear();
                self.owners.clear();
                self.named_by.clear();
            }
            Kind::Pod => {
                self.pods.clear();
                self.words.clear();
            }
            Kind::Lease => {}
            Kind::Mesh => self.documents.clear(),
        }
    }

    /// Takes what is there now.
    pub(super) fn set(&mut self, object: Object) -> Changed {
        match object {
            Object::Service(service) => self.set_service(service),
            Object::Slice(slice) => self.set_slice(slice),
            Object::Pod(key, pod) => self.set_pod(key, pod),
            Object::Lease(_) => Changed::nothing(),
            Object::Mesh(document) if self.documents.get(&document.name) == Some(&document) => Changed::nothing(),
            Object::Mesh(document) => {
                let name = document.name.clone();
                self.documents.insert(name.clone(), document);
                Changed::of(name)
            }
        }
    }

    pub(super) fn remove(&mut self, object: Object) -> Changed {
        match object {
            Object::Service(service) => {
                let before = self.services.remove(&service.name);
                let selector = before.is_some_and(|before| !before.selector.is_empty());
                Changed { services: [service.name].into(), selector }
            }
            Object::Slice(slice) => {
                let before = self.take_slice(&slice.key);
                self.keepers_changed |= before.is_some_and(|before| keeper(&before).is_some());
                Changed::of(slice.service)
            }
            Object::Lease(_) => Changed::nothing(),
            // Another one has its name by now.
            Object::Pod(key, pod) if self.pods.get(&key).is_some_and(|known| !known.life.may_be(pod.life)) => {
                Changed::nothing()
            }
            Object::Pod(key, _) => {
                let was_there = self.pods.remove(&key).is_some();
                let services = if was_there { self.users_of(&key) } else { Names::new() };
                Changed { services, selector: false }
            }
            Object::Mesh(document) => {
                self.documents.remove(&document.name);
                Changed::of(document.name)
            }
        }
    }

    fn set_service(&mut self, service: Service) -> Changed {
        let name = service.name.clone();
        let nobody = BTreeMap::new();
        let selector = self.services.get(&name).map_or(&nobody, |before| &before.selector) != &service.selector;
        let before = self.services.insert(name.clone(), service);
        if before.as_ref() == self.services.get(&name) {
            return Changed::nothing();
        }
        Changed { services: [name].into(), selector }
    }

    fn set_slice(&mut self, mut slice: Slice) -> Changed {
        let (key, name) = (slice.key.clone(), slice.service.clone());
        let before = self.take_slice(&key);
        self.keepers_changed |= before.as_ref().and_then(keeper) != keeper(&slice);
        let mut changed = Changed::of(name.clone());
        changed.services.extend(before.map(|before| before.service));
        for endpoint in &mut slice.endpoints {
            endpoint.zone = self.word(&endpoint.zone);
            let Some((pod, _)) = &mut endpoint.pod else { continue };
            if let Some((known, _)) = self.pods.get_key_value(pod) {
                *pod = known.clone();
            }
            let slices = self.named_by.entry(pod.clone()).or_default();
            if !slices.contains(&key) {
                slices.reserve_exact(1);
                slices.push(key.clone());
            }
        }
        self.owners.insert(key.clone(), name.clone());
        self.slices.entry(name).or_default().insert(key, slice);
        changed
    }

    fn take_slice(&mut self, key: &Arc<str>) -> Option<Slice> {
        let name = self.owners.remove(key)?;
        let slices = self.slices.get_mut(&name)?;
        let slice = slices.remove(key)?;
        if slices.is_empty() {
            self.slices.remove(&name);
        }
        for (pod, _) in slice.endpoints.iter().filter_map(|endpoint| endpoint.pod.as_ref()) {
            let Some(slices) = self.named_by.get_mut(pod) else { continue };
            slices.retain(|slice| slice != key);
            if slices.is_empty() {
                self.named_by.remove(pod);
            }
        }
        Some(slice)
    }

    fn set_pod(&mut self, key: Arc<str>, mut pod: Pod) -> Changed {
        // Most of what happens to a pod does not matter to us.
        if self.pods.get(&key) == Some(&pod) {
            return Changed::nothing();
        }
        pod.account = self.word(&pod.account);
        let services = self.users_of(&key);
        let key = self.named_by.get_key_value(&key).map_or(key, |(named, _)| named.clone());
        self.pods.insert(key, pod);
        Changed { services, selector: false }
    }

    /// The same text, kept once.
    fn word(&mut self, word: &Arc<str>) -> Arc<str> {
        if let Some(known) = self.words.get(word) {
            return known.clone();
        }
        self.words.insert(word.clone());
        word.clone()
    }

    fn users_of(&self, pod: &Arc<str>) -> Names {
        let slices = self.named_by.get(pod).into_iter().flatten();
        slices.filter_map(|slice| self.owners.get(slice)).cloned().collect()
    }

    pub(super) fn service(&self, name: &ServiceName) -> Option<&Service> {
        self.services.get(name)
    }

    pub(super) fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    pub(super) fn slices_of(&self, name: &ServiceName) -> impl Iterator<Item = &Slice> {
        self.slices.get(name).into_iter().flat_map(BTreeMap::values)
    }

    pub(super) fn document(&self, name: &ServiceName) -> Option<&Mesh> {
        self.documents.get(name)
    }

    /// All of which something is said.
    pub(super) fn names(&self) -> Names {
        self.services.keys().chain(self.documents.keys()).cloned().collect()
    }

    /// Who keeps slices that are known.
    pub(super) fn keepers(&self) -> impl Iterator<Item = Keeper> {
        self.slices.values().flat_map(BTreeMap::values).filter_map(keeper)
    }

    /// Services with a slice of one of these.
    pub(super) fn kept_by(&self, keepers: &BTreeSet<Keeper>) -> Names {
        let is_kept = |slice: &Slice| keeper(slice).is_some_and(|keeper| keepers.contains(&keeper));
        let kept = self.slices.iter().filter(|(_, slices)| slices.values().any(is_kept));
        kept.map(|(service, _)| service.clone()).collect()
    }
}

/// Of a slice that a registering host wrote.
pub(super) fn keeper(slice: &Slice) -> Option<Keeper> {
    let holder = slice.notes.get(LEASE_HOLDER).cloned().unwrap_or_default();
    Some((slice.notes.get(LEASE)?.clone(), holder))
}
