//! What the source asks of etcd, and its answers in the words of discovery.

use std::sync::Arc;

use meshd_etcd::api::KeyValue;
use meshd_etcd::api::event::EventType;
use meshd_etcd::{Client, Error, Prefix, Watches};
use meshd_identity::TrustDomain;

use super::keys;
use crate::resources::{self, ResourceChange, ResourceNews, StoredKey};
use crate::{Change, Epoch, Listing, Provides, Scope, SourceEvent};

/// What is followed by a watch of its own. Policies come before what they are about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Resources,
    Services(Scope),
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Part::Resources => f.write_str("Resources"),
            Part::Services(scope) => scope.fmt(f),
        }
    }
}

/// Something that was written.
#[derive(Debug, PartialEq)]
pub(super) enum Told {
    Service(Change),
    Resource(ResourceChange),
}

/// What `follow` needs; scripted in its tests.
pub(super) trait Remote: Send {
    type Watches: Stream + Send;

    /// All there is, and as of which revision.
    fn list(&mut self, part: &Part) -> impl Future<Output = Result<(SourceEvent, u64), Error>> + Send;
    /// Below which key resources lie, if they are to be read.
    fn resources(&self) -> Option<Arc<str>>;
    /// Which cluster it is and how far, as the majority knows it.
    fn probe(&mut self) -> impl Future<Output = Result<Epoch, Error>> + Send;
    fn watch(&mut self, id: i64, part: &Part, from: u64) -> impl Future<Output = Result<Self::Watches, Error>> + Send;
    fn add(
        &mut self,
        watches: &mut Self::Watches,
        id: i64,
        part: &Part,
        from: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// The next call goes to another member.
    fn leave_member(&mut self);
    /// What went wrong, and what to do where that is known.
    fn explain(&self, error: &Error) -> String {
        error.to_string()
    }
}

pub(super) trait Stream {
    fn next(&mut self) -> impl Future<Output = Result<News, Error>> + Send;
    fn cancel(&mut self, id: i64) -> impl Future<Output = Result<(), Error>> + Send;
}

/// A message of a watch.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) id: i64,
    /// Each with the revision it was written in, in their order.
    pub(super) changes: Vec<(u64, Told)>,
    /// Etcd no longer has what the watch asked for.
    pub(super) compacted: bool,
    /// The watch was refused or ended; why.
    pub(super) ended: Option<String>,
}

pub(super) struct Etcd {
    pub(super) client: Arc<Client>,
    pub(super) keys: Keys,
}

pub(super) struct EtcdWatches {
    watches: Watches,
    keys: Keys,
}

/// Where keys lie, and what they mean.
#[derive(Clone)]
pub(super) struct Keys {
    pub(super) base: String,
    /// `None`: they are not read.
    pub(super) resources: Option<Arc<str>>,
    pub(super) provides: Provides,
    pub(super) trust_domain: TrustDomain,
}

impl Keys {
    fn prefix(&self, part: &Part) -> Prefix {
        match part {
            Part::Resources => Prefix::new(format!("{}/", self.resources.as_deref().unwrap_or(resources::BASE))),
            Part::Services(scope) => keys::prefix(&self.base, scope),
        }
    }

    fn stored(&self, key: &str) -> Option<StoredKey> {
        StoredKey::read(self.resources.as_deref()?, key)
    }

    /// A key of unknown form is passed over.
    fn read(&self, pair: &KeyValue) -> Option<Told> {
        let key = std::str::from_utf8(&pair.key).ok()?;
        match self.stored(key) {
            // Nor need it be understood.
            Some(StoredKey(id)) if !self.provides.covers(id.kind, &id.namespace) => None,
            Some(stored) => Some(Told::Resource(stored.document(key, &pair.value, &self.trust_domain))),
            None => keys::read(&self.base, pair, &self.trust_domain).map(Told::Service),
        }
    }

    fn deleted(&self, key: &[u8]) -> Option<Told> {
        let key = std::str::from_utf8(key).ok()?;
        Some(match self.stored(key) {
            Some(_) => Told::Resource(ResourceChange::Removed(key.into())),
            None => Told::Service(Change::Removed(key.into())),
        })
    }
}

fn epoch(header: &meshd_etcd::api::ResponseHeader) -> Epoch {
    Epoch { store: format!("{:x}", header.cluster_id).into(), position: header.revision.unsigned_abs() }
}

/// Etcd counts revisions in `i64`, from 1 on.
fn revision(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

impl Told {
    pub(super) fn service(self) -> Option<Change> {
        match self {
            Told::Service(change) => Some(change),
            Told::Resource(_) => None,
        }
    }

    pub(super) fn resource(self) -> Option<ResourceChange> {
        match self {
            Told::Resource(change) => Some(change),
            Told::Service(_) => None,
        }
    }
}

fn listing(scope: Scope, epoch: Epoch, told: impl Iterator<Item = Told>) -> Listing {
    let mut listing = Listing::empty(scope, epoch);
    for change in told.filter_map(Told::service) {
        match change {
            Change::Set(record) => listing.records.push(record),
            Change::Refused(refused) => listing.refused.push(refused),
            Change::Removed(_) => {}
        }
    }
    listing
}

impl Remote for Etcd {
    type Watches = EtcdWatches;

    async fn list(&mut self, part: &Part) -> Result<(SourceEvent, u64), Error> {
        let listed = self.client.list(&self.keys.prefix(part)).await?;
        if listed.header.cluster_id == 0 {
            return Err(Error::gone("an answer did not say of which cluster it is"));
        }
        let epoch = epoch(&listed.header);
        let position = epoch.position;
        let told = listed.keys.iter().filter_map(|pair| self.keys.read(pair));
        let event = match part {
            Part::Services(scope) => SourceEvent::Listed(listing(scope.clone(), epoch, told)),
            Part::Resources => {
                let prefix = self.keys.resources.clone().unwrap_or_default();
                SourceEvent::Resources(ResourceNews::listed(prefix, epoch, told.filter_map(Told::resource)))
            }
        };
        Ok((event, position))
    }

    fn resources(&self) -> Option<Arc<str>> {
        self.keys.resources.clone()
    }

    async fn probe(&mut self) -> Result<Epoch, Error> {
        let (header, _) = self.client.modified(&format!("{}/", self.keys.base)).await?;
        Ok(epoch(&header))
    }

    async fn watch(&mut self, id: i64, part: &Part, from: u64) -> Result<EtcdWatches, Error> {
        let watches = self.client.watches(id, &self.keys.prefix(part), revision(from)).await?;
        Ok(EtcdWatches { watches, keys: self.keys.clone() })
    }

    async fn add(&mut self, watches: &mut EtcdWatches, id: i64, part: &Part, from: u64) -> Result<(), Error> {
        watches.watches.add(id, &self.keys.prefix(part), revision(from)).await
    }

    fn explain(&self, error: &Error) -> String {
        if !error.is_denied() {
            return error.to_string();
        }
        let base = &self.keys.base;
        format!("{error}; `etcdctl role grant-permission ROLE read --prefix=true {base}/` lets a role read there")
    }

    fn leave_member(&mut self) {
        self.client.leave_member();
    }
}

impl Stream for EtcdWatches {
    async fn next(&mut self) -> Result<News, Error> {
        let message = self.watches.next().await?;
        let mut news = News { id: message.watch_id, compacted: message.compact_revision > 0, ..News::default() };
        news.ended = (message.canceled && !news.compacted).then_some(message.cancel_reason);
        for event in message.events {
            let deleted = event.r#type() == EventType::Delete;
            let Some(pair) = event.kv else { continue };
            let told = if deleted { self.keys.deleted(&pair.key) } else { self.keys.read(&pair) };
            news.changes.extend(told.map(|told| (pair.mod_revision.unsigned_abs(), told)));
        }
        Ok(news)
    }

    async fn cancel(&mut self, id: i64) -> Result<(), Error> {
        self.watches.cancel(id).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Namespaces;

    #[test]
    fn what_is_not_granted_is_passed_over_also_where_it_cannot_be_understood() {
        let provides = Provides { routes: Namespaces::everything(), ..Provides::default() };
        let (base, trust_domain) = (keys::BASE.to_owned(), crate::fake::trust_domain());
        let keys = Keys { base, resources: Some(resources::BASE.into()), provides, trust_domain };
        let told = |kind: &str| {
            let key = format!("{}/shop/{kind}/bad", resources::BASE);
            keys.read(&KeyValue { key: key.into(), value: "nonsense".into(), ..KeyValue::default() })
        };
        assert!(told("authorizationpolicy").is_none());
        assert!(matches!(told("httproute"), Some(Told::Resource(ResourceChange::Refused(_)))));
    }
}
