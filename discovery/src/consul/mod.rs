//! `kind = "consul"`: services of a Consul catalog, and documents in its store.
//!
//! ```text
//!            +--- no answer twice: back off (the probe alone asks then) <---------+
//!            v                                                                   |
//!   which cluster is it? ---> a watch for each query ---> answers, a probe every 10 s
//!            ^                                                 |         |
//!            +---- an index went back, or another cluster -----+         +--- every few minutes, or when asked: all is
//!                  (all is read anew, by a pause)                             asked once more, beside the watches
//!
//!   a watch:  ask from 0 ---> answer ---> ask from its index, for up to a minute ---> answer ...
//!                 ^                                   |
//!                 +------- index went back -----------+     error: back off, then from 0 again
//! ```
//! Queries: the documents in the store, the instances of each service that is wanted and, where all services or those of
//! a namespace are, their names. A scope is listed once all its queries were answered; then answers are told as changes.
//!
//! Consul answers with an empty list in many cases in which it should not be believed: a token that lost its rights, an
//! agent without servers, a catalog that was emptied. `remote.rs` judges the answer, `belief.rs` what is left of doubt.

mod client;
#[cfg(test)]
mod fake_agent;
mod follow;
mod known;
mod probe;
mod read;
mod registrar;
mod remote;
mod resources;
mod settings;
mod stamp;
mod store;
mod watch;

use std::sync::Arc;

use meshd_identity::{SYSTEM_NAMESPACE, TrustDomain};
use tokio::sync::watch as channel;

pub use settings::{Settings, SettingsError};

use self::read::{BASE, Reading};
use self::registrar::ConsulRegistrar;
use self::store::ConsulStore;
use crate::documents::is_plain_word;
use crate::name::check_label;
use crate::resources::base_for;
use crate::write::Keys;
use crate::{Provides, Sink, Source, SourceFuture, Wanted};

const DEFAULT_NAMESPACE: &str = "default";

pub struct ConsulSource {
    name: String,
    settings: Arc<Settings>,
    reading: Reading,
}

impl ConsulSource {
    /// Reads the files that `settings` names, so that a mistake in them ends the start.
    pub fn new(
        name: &str,
        settings: Settings,
        namespace: Option<&str>,
        base: Option<&str>,
        provides: Provides,
        trust_domain: TrustDomain,
    ) -> Result<ConsulSource, SettingsError> {
        settings.check()?;
        let namespace = namespace.unwrap_or(DEFAULT_NAMESPACE);
        check_label("namespace", namespace).map_err(|error| SettingsError::Namespace(error.to_string()))?;
        if namespace == SYSTEM_NAMESPACE {
            return Err(SettingsError::Namespace(format!("`{namespace}` is reserved for hosts; choose another")));
        }
        let resources = provides.has_resources().then(|| (base_for(base).trim_matches('/').into(), provides));
        let base = base.unwrap_or(BASE).trim_matches('/');
        if !base.split('/').all(|word| !word.is_empty() && is_plain_word(word)) {
            return Err(SettingsError::Prefix(base.to_owned()));
        }
        let reading = Reading { trust_domain, namespace: namespace.into(), base: base.into(), resources };
        Ok(ConsulSource { name: name.to_owned(), settings: Arc::new(settings), reading })
    }
}

impl ConsulSource {
    /// Reads and writes documents in the same Consul's store.
    pub(crate) fn store(&self, resources: &str) -> ConsulStore {
        let keys = Keys::new(&self.reading.base, resources.trim_matches('/'));
        ConsulStore::new(&self.name, keys, self.settings.clone())
    }

    /// Registers through the same agent.
    pub(crate) fn registrar(&self) -> ConsulRegistrar {
        ConsulRegistrar::new(self.name.clone(), self.settings.clone())
    }
}

impl Source for ConsulSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "consul"
    }

    fn resource_prefixes(&self) -> Vec<Arc<str>> {
        self.reading.resources.iter().map(|(base, _)| base.clone()).collect()
    }

    fn watch(&self, wanted: channel::Receiver<Wanted>, sink: Sink) -> SourceFuture {
        let client = client::Client::new(self.settings.clone());
        let remote = remote::Consul::new(client, self.reading.base.clone());
        Box::pin(follow::run(remote, self.reading.clone(), wanted, sink))
    }
}
