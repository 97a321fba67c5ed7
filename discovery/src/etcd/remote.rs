//! What the source asks of etcd, and its answers in the words of discovery.

use std::sync::Arc;

use meshd_etcd::api::event::EventType;
use meshd_etcd::{Client, Error, Watches};
use meshd_identity::TrustDomain;

use super::keys;
use crate::{Change, Epoch, Listing, Scope};

/// What `follow` needs; scripted in its tests.
pub(super) trait Remote: Send {
    type Watches: Stream + Send;

    fn list(&mut self, scope: &Scope) -> impl Future<Output = Result<Listing, Error>> + Send;
    /// Which cluster it is and how far, as the majority knows it.
    fn probe(&mut self) -> impl Future<Output = Result<Epoch, Error>> + Send;
    fn watch(&mut self, id: i64, scope: &Scope, from: u64)
    -> impl Future<Output = Result<Self::Watches, Error>> + Send;
    fn add(
        &mut self,
        watches: &mut Self::Watches,
        id: i64,
        scope: &Scope,
        from: u64,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// The next call goes to another member.
    fn leave_member(&mut self);
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
    pub(super) changes: Vec<(u64, Change)>,
    /// Etcd no longer has what the watch asked for.
    pub(super) compacted: bool,
    /// The watch was refused or ended; why.
    pub(super) ended: Option<String>,
}

pub(super) struct Etcd {
    pub(super) client: Arc<Client>,
    pub(super) base: String,
    pub(super) trust_domain: TrustDomain,
}

pub(super) struct EtcdWatches {
    watches: Watches,
    base: String,
    trust_domain: TrustDomain,
}

fn epoch(header: &meshd_etcd::api::ResponseHeader) -> Epoch {
    Epoch { store: format!("{:x}", header.cluster_id).into(), position: header.revision.unsigned_abs() }
}

/// Etcd counts revisions in `i64`, from 1 on.
fn revision(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

impl Remote for Etcd {
    type Watches = EtcdWatches;

    async fn list(&mut self, scope: &Scope) -> Result<Listing, Error> {
        let listed = self.client.list(&keys::prefix(&self.base, scope)).await?;
        if listed.header.cluster_id == 0 {
            return Err(Error::gone("an answer did not say of which cluster it is"));
        }
        let mut listing = Listing::empty(scope.clone(), epoch(&listed.header));
        for pair in &listed.keys {
            match keys::read(&self.base, pair, &self.trust_domain) {
                Some(Change::Set(record)) => listing.records.push(record),
                Some(Change::Refused(refused)) => listing.refused.push(refused),
                Some(Change::Removed(_)) | None => {}
            }
        }
        Ok(listing)
    }

    async fn probe(&mut self) -> Result<Epoch, Error> {
        let (header, _) = self.client.modified(&format!("{}/", self.base)).await?;
        Ok(epoch(&header))
    }

    async fn watch(&mut self, id: i64, scope: &Scope, from: u64) -> Result<EtcdWatches, Error> {
        let watches = self.client.watches(id, &keys::prefix(&self.base, scope), revision(from)).await?;
        Ok(EtcdWatches { watches, base: self.base.clone(), trust_domain: self.trust_domain.clone() })
    }

    async fn add(&mut self, watches: &mut EtcdWatches, id: i64, scope: &Scope, from: u64) -> Result<(), Error> {
        watches.watches.add(id, &keys::prefix(&self.base, scope), revision(from)).await
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
            let change = if deleted {
                std::str::from_utf8(&pair.key).ok().map(|key| Change::Removed(key.into()))
            } else {
                keys::read(&self.base, &pair, &self.trust_domain)
            };
            news.changes.extend(change.map(|change| (pair.mod_revision.unsigned_abs(), change)));
        }
        Ok(news)
    }

    async fn cancel(&mut self, id: i64) -> Result<(), Error> {
        self.watches.cancel(id).await
    }
}
