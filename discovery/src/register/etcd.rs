//! Registrations in etcd: a key below its service's prefix, under a lease of its own. A key is written or deleted only at
//! the revision it was last seen at, so that whoever stood still meanwhile changes nothing that is another's.

use std::net::IpAddr;
use std::sync::Arc;

use meshd_etcd::api::response_op::Response;
use meshd_etcd::api::{KeyValue, TxnRequest};
use meshd_etcd::{Client, Error, delete, get, put, unchanged};

use super::{Answer, Found, Hold, Key, Over, Registrar, RegistrarError, TTL, address_towards};
use crate::Registration;
use crate::etcd::keys;

pub(crate) struct EtcdRegistrar {
    pub(crate) name: String,
    pub(crate) base: String,
    pub(crate) client: Arc<Client>,
    /// `HOST:PORT` of each member.
    pub(crate) members: Vec<String>,
}

impl From<Error> for RegistrarError {
    fn from(error: Error) -> RegistrarError {
        RegistrarError(error.to_string())
    }
}

impl EtcdRegistrar {
    fn key(&self, key: &Key) -> String {
        keys::endpoint(&self.base, &key.service, &key.instance)
    }

    async fn put(&self, key: &Key, said: &Registration, version: i64, lease: i64) -> Result<Option<Hold>, Error> {
        let key = self.key(key);
        let value = serde_json::to_vec(said).expect("numbers and text are JSON");
        let request = TxnRequest {
            compare: vec![unchanged(key.clone(), version)],
            success: vec![put(key, value, lease)],
            failure: Vec::new(),
        };
        let answer = self.client.txn(request).await?;
        let revision = answer.header.map_or(0, |header| header.revision);
        Ok(answer.succeeded.then_some(Hold { lease, version: revision.unsigned_abs() }))
    }
}

fn revision(version: u64) -> i64 {
    i64::try_from(version).unwrap_or(i64::MAX)
}

/// What cannot be read fences nothing.
fn found(pair: &KeyValue) -> Found {
    let said: serde_json::Value = serde_json::from_slice(&pair.value).unwrap_or_default();
    let address = said["address"].as_str().unwrap_or("an address that cannot be read");
    Found::only(said["epoch"].as_u64().unwrap_or(0), pair.mod_revision.unsigned_abs(), address.to_owned())
}

impl Registrar for EtcdRegistrar {
    fn name(&self) -> &str {
        &self.name
    }

    fn address_here(&self) -> Answer<'_, IpAddr> {
        Box::pin(address_towards(&self.members))
    }

    fn find<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Found>> {
        Box::pin(async move {
            let request = TxnRequest { success: vec![get(self.key(key))], ..TxnRequest::default() };
            let answer = self.client.txn(request).await?;
            let range = answer.responses.into_iter().next().and_then(|one| one.response);
            match range {
                Some(Response::ResponseRange(range)) => Ok(range.kvs.first().map(found)),
                _ => Err(RegistrarError("etcd did not answer what is registered".to_owned())),
            }
        })
    }

    fn write<'a>(&'a self, key: &'a Key, said: &'a Registration, over: Over) -> Answer<'a, Option<Hold>> {
        Box::pin(async move {
            let version = match over {
                Over::Own(hold) => return Ok(self.put(key, said, revision(hold.version), hold.lease).await?),
                Over::Version(version) => revision(version),
            };
            let lease = self.client.grant(TTL.as_secs().cast_signed()).await?;
            let written = self.put(key, said, version, lease).await?;
            if written.is_none()
                && let Err(error) = self.client.revoke(lease).await
            {
                tracing::debug!(%error, "a lease that nothing hangs on ends by itself");
            }
            Ok(written)
        })
    }

    fn keep<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, bool> {
        Box::pin(async move {
            if !self.client.keep_alive(hold.lease).await? {
                return Ok(false);
            }
            let (_, modified) = self.client.modified(&self.key(key)).await?;
            Ok(modified == revision(hold.version))
        })
    }

    fn withdraw<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, ()> {
        Box::pin(async move {
            let name = self.key(key);
            let request = TxnRequest {
                compare: vec![unchanged(name.clone(), revision(hold.version))],
                success: vec![delete(name)],
                failure: Vec::new(),
            };
            self.client.txn(request).await?;
            if let Err(error) = self.client.revoke(hold.lease).await {
                tracing::debug!(%error, "a lease that nothing hangs on ends by itself");
            }
            Ok(())
        })
    }
}
