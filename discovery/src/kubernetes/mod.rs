//! `kind = "kubernetes"`: Services of a cluster, their EndpointSlices, the pods behind them, and documents of ours.
//!
//! ```text
//!              +-------------------- error: back off, new connection <---------------------+
//!              v                                                                           |
//!   probe ---> list what is due ---> watch each kind from where its list was ---> events, probes every 5 s
//!              ^     (Service, slices, its pods)      ^                                |   |   |
//!              |                                      +--- its end (5 min), or 150 s of silence
//!              +--- 410 Gone; other selector; every few minutes, or when asked ------------+   |
//!              +--- forgotten how far it was: another kube-system, or a resourceVersion that went back
//! ```
//! What is read together is an area: a service imported by name (a watch for each kind, which select at the server), or a
//! namespace or the cluster for patterns, and for more than 8 services of a namespace (a watch for each kind; slices and pods
//! are selected by the names of the services and by a label their selectors share, as far as that goes: `pick.rs`). All
//! kinds of an area are listed before anything is told of it; afterwards an event is told as soon as it is there, also while
//! the area is listed again: its watches go on, and what they told meanwhile is not taken back. A pod that a slice names and
//! that is not known yet is left out until its own watch tells of it, milliseconds later. Of an endpoint that cannot be
//! reached, its service alone is read again (`reread.rs`).
//!
//! How far the store is comes from the probe, a consistent read of one namespace, and not from the objects: kinds may lie in
//! different etcds. It goes by every connection that carries watches: each may lead to another server. What may not be read
//! (403), or is refused for another reason, is trouble of its area alone and keeps what it said. Nothing that is not read
//! here is kept of an object: a pod is its name, uid, account, marks of its labels and whether it takes HBONE.
//!
//! Why no client crate: docs/adr/0013.

mod area;
mod catch_up;
mod client;
mod error;
#[cfg(test)]
mod fake_server;
mod follow;
mod hosts;
mod kept;
mod leases;
mod lists;
mod objects;
mod pick;
mod read;
mod registrar;
mod remote;
mod reread;
mod resources;
#[cfg(test)]
mod samples;
mod settings;
mod store;
mod work;

use std::collections::BTreeSet;
use std::sync::Arc;

use meshd_identity::{SYSTEM_NAMESPACE, TrustDomain};
use tokio::sync::watch;

pub use settings::Settings as KubernetesSettings;

use crate::name::check_label;
use crate::{Namespaces, Provides, Sink, Source, SourceFuture, Wanted};
use client::Client;
use leases::Leases;
use read::Reader;
use registrar::KubernetesRegistrar;
use remote::ApiServer;
use resources::Followed;
use store::KubernetesStore;

pub struct KubernetesSource {
    name: String,
    settings: KubernetesSettings,
    /// Where hosts that register have their Leases.
    namespace: String,
    authority: Namespaces,
    provides: Provides,
    trust_domain: TrustDomain,
}

impl KubernetesSource {
    /// Reads the files that `settings` names, so that a mistake in them ends the start.
    pub fn new(
        name: &str,
        settings: KubernetesSettings,
        namespace: Option<&str>,
        authority: Namespaces,
        provides: Provides,
        trust_domain: TrustDomain,
    ) -> Result<KubernetesSource, String> {
        settings.access().map_err(|error| error.to_string())?;
        let namespace = namespace.unwrap_or(SYSTEM_NAMESPACE);
        check_label("namespace", namespace).map_err(|error| error.to_string())?;
        let (name, namespace) = (name.to_owned(), namespace.to_owned());
        Ok(KubernetesSource { name, settings, namespace, authority, provides, trust_domain })
    }

    /// Registers over connections of its own: a list that takes long must not cost a host its Lease.
    pub(crate) fn registrar(&self) -> KubernetesRegistrar {
        KubernetesRegistrar::new(self.name.clone(), self.settings.clone(), self.namespace.clone())
    }

    /// Reads and writes documents in the same cluster.
    pub(crate) fn store(&self) -> KubernetesStore {
        KubernetesStore::new(&self.name, self.settings.clone())
    }
}

impl Source for KubernetesSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "kubernetes"
    }

    fn resource_prefixes(&self) -> Vec<Arc<str>> {
        self.provides.kinds().into_iter().map(resources::prefix).collect()
    }

    fn watch(&self, wanted: watch::Receiver<Wanted>, sink: Sink) -> SourceFuture {
        let reader = Reader {
            trust_domain: self.trust_domain.clone(),
            authority: self.authority.clone(),
            dead: BTreeSet::new(),
        };
        let remote = ApiServer(Client::new(self.settings.clone()));
        let life = watch::Sender::default();
        let followed = Followed {
            kinds: self.provides.kinds(),
            provides: self.provides.clone(),
            trust_domain: self.trust_domain.clone(),
            wanted: wanted.clone(),
            life: life.subscribe(),
            sink: sink.clone(),
        };
        let settings = self.settings.clone();
        let resources = resources::run(move || Client::new(settings.clone()), followed);
        let services = follow::run(remote, reader, Leases::new(self.namespace.clone()), wanted, sink, life);
        // Neither ends, except by a defect; both are then begun anew.
        Box::pin(async move {
            tokio::select! {
                () = services => {}
                () = resources => {}
            }
        })
    }
}
