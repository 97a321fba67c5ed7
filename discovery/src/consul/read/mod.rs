//! What Consul's answers mean.

mod instance;

use std::sync::Arc;

use meshd_identity::TrustDomain;

pub(super) use instance::Instance;

use super::remote::Pair;
use crate::stored::{self, Meaning};
use crate::{Change, Provides, ServiceName};

/// Below which the documents lie, unless told otherwise.
pub(super) const BASE: &str = "meshd-discovery/v1";

/// What it takes to understand an answer.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) trust_domain: TrustDomain,
    /// Of instances that do not say theirs.
    pub(super) namespace: Arc<str>,
    pub(super) base: Arc<str>,
    /// Where routes and policies lie, if they are to be read, and which of them.
    pub(super) resources: Option<(Arc<str>, Provides)>,
}

/// What lies under a key of the store.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Document {
    pub(super) service: ServiceName,
    pub(super) modified: u64,
    pub(super) said: Arc<Change>,
}

impl Document {
    /// `None`: of any namespace.
    pub(super) fn is_of(&self, namespace: Option<&str>) -> bool {
        namespace.is_none_or(|namespace| self.service.namespace() == namespace)
    }
}

impl Reading {
    /// Of which service a key holds the document; other keys are passed over, a newer meshd may have written them.
    pub(super) fn service_of(&self, key: &str) -> Option<ServiceName> {
        match stored::meaning(&self.base, key)? {
            Meaning::Service(service) => Some(service),
            Meaning::Endpoint(_) => None,
        }
    }

    pub(super) fn document(&self, service: ServiceName, pair: &Pair) -> Document {
        let meaning = Meaning::Service(service.clone());
        let said = stored::read(&pair.key, meaning, &pair.value, &self.trust_domain);
        Document { service, modified: pair.modified, said: Arc::new(said) }
    }

    /// What an entry of the answer about a service says, if it is one of that name. An error where it has no name itself.
    pub(super) fn instance(&self, name: &str, text: &[u8]) -> Result<Option<Instance>, serde_json::Error> {
        instance::read(name, text, self)
    }
}
