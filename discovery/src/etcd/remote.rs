//! What the source asks of etcd, and its answers in the words of discovery.

use std::sync::Arc;

use meshd_etcd::api::KeyValue;
use meshd_etcd::api::event::EventType;
use meshd_etcd::{Client, Error, Prefix, Watches};
use meshd_identity::TrustDomain;

use super::keys;
use crate::resources::{self, ResourceChange, StoredKey};
use crate::stored::{self, Meaning};
use crate::{Change, Epoch, Provides, Scope, ServiceName};

/// Before the watches are looked at again: a millisecond or two.
const READ_AT_ONCE: usize = 128;

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
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Told {
    Service(Change),
    Resource(ResourceChange),
}

/// All there is of a part, each with a key of its own.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) epoch: Epoch,
    pub(super) told: Vec<Told>,
}

/// What `follow` needs; scripted in its tests.
pub(super) trait Remote: Send {
    type Watches: Stream + Send;

    /// The same, to be asked at the same time.
    fn another(&self) -> Self;
    fn list(&mut self, part: &Part) -> impl Future<Output = Result<Listed, Error>> + Send;
    /// Of which service a key says something.
    fn service_of(&self, key: &str) -> Option<ServiceName>;
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

#[derive(Clone)]
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
    pub(super) fn key(&self) -> &Arc<str> {
        match self {
            Told::Service(Change::Set(record)) => &record.key,
            Told::Resource(ResourceChange::Set(record)) => &record.key,
            Told::Service(Change::Removed(key)) | Told::Resource(ResourceChange::Removed(key)) => key,
            Told::Service(Change::Refused(refused)) => &refused.key,
            Told::Resource(ResourceChange::Refused(refused)) => &refused.key,
        }
    }

    pub(super) fn is_removal(&self) -> bool {
        matches!(self, Told::Service(Change::Removed(_)) | Told::Resource(ResourceChange::Removed(_)))
    }

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

impl Remote for Etcd {
    type Watches = EtcdWatches;

    fn another(&self) -> Etcd {
        self.clone()
    }

    async fn list(&mut self, part: &Part) -> Result<Listed, Error> {
        let listed = self.client.list(&self.keys.prefix(part)).await?;
        if listed.header.cluster_id == 0 {
            return Err(Error::gone("an answer did not say of which cluster it is"));
        }
        let mut told = Vec::with_capacity(listed.keys.len());
        for pairs in listed.keys.chunks(READ_AT_ONCE) {
            told.extend(pairs.iter().filter_map(|pair| self.keys.read(pair)));
            tokio::task::yield_now().await;
        }
        Ok(Listed { epoch: epoch(&listed.header), told })
    }

    fn service_of(&self, key: &str) -> Option<ServiceName> {
        match stored::meaning(&self.keys.base, key)? {
            Meaning::Service(service) | Meaning::Endpoint(service) => Some(service),
        }
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
