//! Routes and policies in Consul's store: what of an answer is new, and what of it is this host's concern. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use meshd_identity::TrustDomain;

use super::remote::{Pair, Query};
use crate::resources::{ResourceChange, ResourceNews, StoredKey};
use crate::{Epoch, Provides, SourceEvent, Wanted};

#[derive(Debug)]
pub(super) struct Resources {
    base: Arc<str>,
    provides: Provides,
    trust_domain: TrustDomain,
    wanted: Wanted,
    documents: BTreeMap<Arc<str>, Document>,
    /// The furthest index that was read. Those of a store fall by themselves, a while after a delete.
    position: u64,
    /// An index of the catalog went back: so did the store.
    went_back: bool,
    /// To be read once more, for the sake of what was passed over.
    due: bool,
}

#[derive(Debug)]
struct Document {
    modified: u64,
    /// `None`: of services nobody wants here.
    said: Option<ResourceChange>,
}

impl Resources {
    pub(super) fn new(base: Arc<str>, provides: Provides, trust_domain: TrustDomain) -> Resources {
        let (wanted, documents) = (Wanted::default(), BTreeMap::new());
        Resources { base, provides, trust_domain, wanted, documents, position: 0, went_back: false, due: false }
    }

    pub(super) fn query(&self) -> Query {
        Query::Resources(self.base.clone())
    }

    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    pub(super) fn resync(&mut self) {
        self.due = true;
    }

    pub(super) fn adjust(&mut self, wanted: &Wanted) {
        if wanted.is_same_as(&self.wanted) {
            return;
        }
        // What is passed over now may have been read, and the other way round.
        self.documents.clear();
        self.wanted = wanted.clone();
        self.due = true;
    }

    /// In another life of the store the same index may be of another text.
    pub(super) fn forget(&mut self) {
        self.documents.clear();
        self.position = 0;
    }

    pub(super) fn went_back(&mut self) {
        self.forget();
        self.went_back = true;
    }

    /// Only what was written since is understood anew.
    pub(super) fn take(&mut self, pairs: &[Pair], index: u64, cluster: Option<&Arc<str>>) -> Vec<SourceEvent> {
        let Some(store) = cluster.cloned() else { return Vec::new() };
        let mut before = std::mem::take(&mut self.documents);
        for pair in pairs {
            let stored = StoredKey::read(&self.base, &pair.key);
            let granted = |StoredKey(id): &StoredKey| self.provides.covers(id.kind, &id.namespace);
            let Some(stored) = stored.filter(granted) else { continue };
            let known = before.remove_entry(&*pair.key).filter(|(_, document)| document.modified == pair.modified);
            let (key, document) = known.unwrap_or_else(|| {
                let said = stored.document(&pair.key, &pair.value, &self.trust_domain);
                let concern = said.is_wanted(&self.wanted);
                (pair.key.as_str().into(), Document { modified: pair.modified, said: concern.then_some(said) })
            });
            self.documents.insert(key, document);
        }
        self.due = false;
        self.position = self.position.max(index);
        let went_back = std::mem::take(&mut self.went_back);
        let epoch = Epoch { store, position: if went_back { 0 } else { self.position } };
        let said = self.documents.values().filter_map(|document| document.said.clone());
        let listed = ResourceNews::listed(self.base.clone(), epoch, said);
        // After a list that no earlier one goes on in, where this life of the store is.
        let (prefix, position, changes) = (self.base.clone(), self.position, Vec::new());
        let goes_on = went_back.then(|| ResourceNews::Changed { prefix, position, changes });
        [Some(listed), goes_on].into_iter().flatten().map(SourceEvent::Resources).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Namespaces;
    use crate::fake::{allowing, trust_domain};

    fn pair(name: &str, modified: u64) -> Pair {
        let key = format!("meshd-resources/v1/shop/authorizationpolicy/{name}");
        Pair { key, modified, value: allowing("payments.shop", name).into_bytes() }
    }

    fn listed(events: &[SourceEvent]) -> (u64, Vec<&str>, usize) {
        match events {
            [SourceEvent::Resources(ResourceNews::Listed { epoch, records, refused, .. }), ..] => {
                (epoch.position, records.iter().map(|record| &*record.key).collect(), refused.len())
            }
            other => panic!("{other:?}"),
        }
    }

    fn resources() -> Resources {
        Resources::new("meshd-resources/v1".into(), Provides::everything(), trust_domain())
    }

    #[test]
    fn what_is_not_granted_is_passed_over_also_where_it_cannot_be_understood() {
        let provides = Provides { routes: Namespaces::everything(), ..Provides::default() };
        let mut ours = Resources::new("meshd-resources/v1".into(), provides, trust_domain());
        let bad = Pair { value: b"nonsense".to_vec(), ..pair("bad", 2) };
        let events = ours.take(&[pair("web", 1), bad], 5, Some(&"one".into()));
        assert_eq!(listed(&events), (5, vec![], 0));
    }

    #[test]
    fn the_same_index_in_another_life_of_the_store_is_of_another_text() {
        let mut resources = resources();
        resources.take(&[pair("a", 7)], 8, Some(&"one".into()));
        resources.forget();
        let other = Pair { value: b"kind: AuthorizationPolicy".to_vec(), ..pair("a", 7) };
        assert_eq!(listed(&resources.take(&[other], 8, Some(&"two".into()))).2, 1);
    }

    #[test]
    fn an_answer_is_the_list_and_an_index_that_falls_by_itself_is_no_other_life() {
        let (mut resources, cluster) = (resources(), Arc::from("one"));
        let events = resources.take(&[pair("a", 7), pair("b", 8)], 8, Some(&cluster));
        assert_eq!(listed(&events).0, 8);
        assert_eq!(listed(&events).1.len(), 2);
        let bad = Pair { value: b"kind: AuthorizationPolicy".to_vec(), ..pair("b", 9) };
        let events = resources.take(&[pair("a", 7), bad], 5, Some(&cluster));
        assert_eq!((listed(&events).0, listed(&events).1.len(), listed(&events).2), (8, 1, 1));
    }

    #[test]
    fn after_the_store_was_put_back_the_list_is_of_another_life() {
        let (mut resources, cluster) = (resources(), Arc::from("one"));
        resources.take(&[pair("a", 7)], 8, Some(&cluster));
        resources.went_back();
        let events = resources.take(&[], 4, Some(&cluster));
        assert_eq!((listed(&events).0, events.len()), (0, 2));
    }

    #[test]
    fn what_is_passed_over_is_read_again_when_something_new_is_wanted() {
        let mut resources = resources();
        assert!(!resources.is_due());
        resources.adjust(&Wanted { everything: true, ..Wanted::default() });
        assert!(resources.is_due());
        resources.take(&[], 1, Some(&Arc::from("one")));
        resources.adjust(&Wanted { everything: true, resync: 7, ..Wanted::default() });
        assert!(!resources.is_due());
    }
}
