//! `kind = "etcd"`: what hosts and operators wrote to an etcd cluster.
//!
//! ```text
//!            +--------- error, other member, back off <--------------+
//!            v                                                        |
//!   list each scope wanted ---> watch each from its revision ---> events, probes every 2 s
//!            ^                        |                               |
//!            +---- compacted ---------+      every few minutes, or when asked: list again, beside the watch
//! ```
//! Where an endpoint cannot be reached, its service alone is listed again. What the watches tell while a list is under way is
//! told at once, and the list is brought up to it.
//!
//! A list says which cluster it is of and at what revision (its epoch). Events at or below the revision of a list that came
//! after they were sent are old news. A probe asks the majority, so a member cut off from it is left.

mod beside;
mod follow;
pub(crate) mod keys;
mod remote;
mod store;

use std::sync::Arc;

use meshd_etcd::{Client, Error, Settings};
use meshd_identity::TrustDomain;
use tokio::sync::watch;

pub(crate) use self::store::EtcdStore;
use crate::register::etcd::EtcdRegistrar;
use crate::resources::base_for;
use crate::write::Keys;
use crate::{Provides, Sink, Source, SourceFuture, Wanted};

/// Where etcd is by default; https:// where it is not on this host.
pub(crate) const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:2379";

pub struct EtcdSource {
    name: String,
    base: String,
    /// Where routes and policies lie, if they are to be read.
    resources: Option<Arc<str>>,
    provides: Provides,
    client: Arc<Client>,
    /// `HOST:PORT` of each.
    members: Vec<String>,
    trust_domain: TrustDomain,
}

impl EtcdSource {
    /// Reads the files that `settings` names, so that a mistake in them ends the start.
    pub fn new(
        name: &str,
        settings: Settings,
        base: Option<&str>,
        provides: Provides,
        trust_domain: TrustDomain,
    ) -> Result<EtcdSource, Error> {
        let resources = provides.has_resources().then(|| base_for(base).into());
        let base = base.unwrap_or(keys::BASE).trim_end_matches('/').to_owned();
        let members = settings.addresses()?;
        let client = Arc::new(Client::new(settings)?);
        Ok(EtcdSource { name: name.to_owned(), base, resources, provides, client, members, trust_domain })
    }

    /// Registers over the source's own connection.
    pub(crate) fn registrar(&self) -> EtcdRegistrar {
        let EtcdSource { name, base, client, members, .. } = self;
        EtcdRegistrar { name: name.clone(), base: base.clone(), client: client.clone(), members: members.clone() }
    }

    /// Reads and writes documents over the source's own connection.
    pub(crate) fn store(&self, resources: &str) -> EtcdStore {
        EtcdStore::new(&self.name, Keys::new(&self.base, resources), self.client.clone())
    }
}

impl Source for EtcdSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "etcd"
    }

    fn resource_prefixes(&self) -> Vec<Arc<str>> {
        self.resources.iter().cloned().collect()
    }

    fn watch(&self, wanted: watch::Receiver<Wanted>, sink: Sink) -> SourceFuture {
        let keys = remote::Keys {
            base: self.base.clone(),
            resources: self.resources.clone(),
            provides: self.provides.clone(),
            trust_domain: self.trust_domain.clone(),
        };
        let remote = remote::Etcd { client: self.client.clone(), keys };
        Box::pin(follow::run(remote, wanted, sink))
    }
}
