//! A Service with what is behind it, read as it would be from a cluster, for tests.

use std::collections::BTreeSet;
use std::sync::Arc;

use meshd_identity::SpiffeId;
use serde_json::Value;
use tokio::time::Instant;

use super::objects::{Kind, Object, Slice};
use super::read::{Known, Learned, Reader};
use super::samples::{objects, pod, service, slice};
use crate::fake::trust_domain;
use crate::{Change, Definition, Namespaces, Place, Record};

/// What is there, and how it is imported.
pub(super) struct Cluster {
    pub(super) service: Value,
    pub(super) slices: Vec<Value>,
    pub(super) pods: Vec<Value>,
    pub(super) is_named: bool,
    pub(super) is_described: bool,
    pub(super) authority: Namespaces,
}

impl Cluster {
    /// Two pods that take HBONE behind `payments`.
    pub(super) fn new() -> Cluster {
        Cluster {
            service: service("payments", &[]),
            slices: vec![slice("payments-x", &["10.0.0.1", "10.0.0.2"])],
            pods: vec![pod("payments-0", "payer", true), pod("payments-1", "payer", true)],
            is_named: true,
            is_described: false,
            authority: Namespaces::everything(),
        }
    }

    pub(super) fn of_nobody(slices: Vec<Value>) -> Cluster {
        let mut service = service("payments", &[]);
        service["spec"]["selector"] = Value::Null;
        Cluster { service, slices, pods: vec![], ..Cluster::new() }
    }

    pub(super) fn read_at(&self, learned: &mut Learned, now: Instant) -> Vec<Change> {
        let Some(Object::Service(service)) = objects(Kind::Service, std::slice::from_ref(&self.service)).pop() else {
            panic!("no service")
        };
        let slices: Vec<Slice> = objects(Kind::Slice, &self.slices).into_iter().map(only_slice).collect();
        let pods = objects(Kind::Pod, &self.pods).into_iter().map(|object| match object {
            Object::Pod(key, pod) => (key, pod),
            other => panic!("{other:?}"),
        });
        let known = Known {
            service: &service,
            slices: slices.iter().collect(),
            pods: &pods.collect(),
            is_named: self.is_named,
            is_described: self.is_described,
        };
        Reader { trust_domain: trust_domain(), authority: self.authority.clone(), dead: BTreeSet::new() }
            .read(&known, learned, now)
    }

    pub(super) fn read(&self) -> Vec<Change> {
        self.read_at(&mut Learned::default(), Instant::now())
    }

    pub(super) fn definition(&self) -> Option<Definition> {
        definition(&self.read())
    }

    pub(super) fn places(&self) -> Vec<Arc<Place>> {
        self.read().iter().filter_map(record).flat_map(|record| record.places.clone()).collect()
    }

    pub(super) fn problems(&self) -> Vec<String> {
        let problems = |change| match change {
            Change::Refused(refused) => refused.problems,
            _ => vec![],
        };
        self.read().into_iter().flat_map(problems).collect()
    }
}

fn only_slice(object: Object) -> Slice {
    match object {
        Object::Slice(slice) => slice,
        other => panic!("{other:?}"),
    }
}

fn record(change: &Change) -> Option<&Record> {
    match change {
        Change::Set(record) => Some(record),
        _ => None,
    }
}

pub(super) fn definition(changes: &[Change]) -> Option<Definition> {
    changes.iter().filter_map(record).find_map(|record| record.definition.as_deref().cloned())
}

pub(super) fn shorts(definition: &Definition) -> Vec<&str> {
    definition.identities.iter().map(SpiffeId::short).collect()
}
