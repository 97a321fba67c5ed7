use std::sync::Arc;

use rpds::RedBlackTreeMapSync;

use crate::resources::Attachments;
use crate::{Service, ServiceName};

/// An immutable picture of all services. A changed one is made of the old one without copying what did not change:
/// versions share their parts, and an unchanged service is the same `Arc` in both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Directory {
    services: RedBlackTreeMapSync<ServiceName, Arc<Service>>,
    resources: Attachments,
}

impl Directory {
    pub fn from_services(services: impl IntoIterator<Item = Arc<Service>>) -> Directory {
        let services = services.into_iter().map(|service| (service.name.clone(), service)).collect();
        Directory { services, resources: Attachments::default() }
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
        self.services.size()
    }

    pub fn is_empty(&self) -> bool {
        self.services.is_empty()
    }

    /// The same picture with one service replaced, or taken out.
    pub(crate) fn with(&self, name: &ServiceName, service: Option<Arc<Service>>) -> Directory {
        let services = match service {
            Some(service) => self.services.insert(name.clone(), service),
            None => self.services.remove(name),
        };
        Directory { services, resources: self.resources.clone() }
    }

    /// Routes and policies, also of services that are not in it.
    pub fn resources(&self) -> &Attachments {
        &self.resources
    }

    pub(crate) fn with_resources(&self, resources: Attachments) -> Directory {
        Directory { services: self.services.clone(), resources }
    }
}
