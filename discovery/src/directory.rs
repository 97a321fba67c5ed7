use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Service, ServiceName};

/// An immutable picture of all services, shared by `Arc`. Between two versions an unchanged service is the same `Arc`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    services: BTreeMap<ServiceName, Arc<Service>>,
}

impl Directory {
    pub fn from_services(services: impl IntoIterator<Item = Arc<Service>>) -> Directory {
        Directory { services: services.into_iter().map(|service| (service.name.clone(), service)).collect() }
    }

    pub fn get(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// By text as it comes from the wire, `payments.shop`.
    pub fn find(&self, name: &str) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// In the order of their names.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.services.keys().any(|name| name.namespace() == namespace)
    }

    pub fn len(&self) -> usize {
        self.services.len()
    }

    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// True when every service is the same allocation in both: nothing to publish.
    pub(crate) fn is_same_as(&self, other: &Directory) -> bool {
        self.len() == other.len()
            && self.services().zip(other.services()).all(|(ours, theirs)| Arc::ptr_eq(ours, theirs))
    }
}
