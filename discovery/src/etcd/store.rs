//! Documents in etcd: each is written in one transaction, only over the revision it was read at.

use std::sync::Arc;

use meshd_etcd::api::response_op::Response;
use meshd_etcd::api::{Compare, KeyValue, RequestOp, TxnRequest};
use meshd_etcd::{Client, Error, Prefix, delete, get, put, unchanged};

use crate::write::{Answer, Keys, Kind, Over, ResourceName, Store, StoreError, Stored, Write, understand};

/// No lease: what an operator wrote stays.
const FOR_GOOD: i64 = 0;

pub(crate) struct EtcdStore {
    name: String,
    keys: Keys,
    client: Arc<Client>,
}

impl EtcdStore {
    pub(super) fn new(name: &str, keys: Keys, client: Arc<Client>) -> EtcdStore {
        EtcdStore { name: name.to_owned(), keys, client }
    }

    async fn read(&self, resource: &ResourceName) -> Result<Option<Stored>, StoreError> {
        let key = self.keys.key(resource);
        let alone = Prefix { key: key.clone().into_bytes(), end: format!("{key}\0").into_bytes() };
        let listed =
            self.client.list(&alone).await.map_err(|error| self.trouble("read", resource.kind, &key, &error))?;
        Ok(listed.keys.first().map(|pair| read_pair(resource.clone(), pair)))
    }

    /// Only while the key is as `compare` says; else what is there.
    async fn change(&self, resource: &ResourceName, compare: Vec<Compare>, act: RequestOp) -> Result<(), StoreError> {
        let key = self.keys.key(resource);
        let request = TxnRequest { compare, success: vec![act], failure: vec![get(key.clone())] };
        let answer =
            self.client.txn(request).await.map_err(|error| self.trouble("write", resource.kind, &key, &error))?;
        if answer.succeeded {
            return Ok(());
        }
        let now = first(answer.responses).map(|pair| read_pair(resource.clone(), &pair));
        Err(StoreError::changed(resource, now.as_ref()))
    }

    fn trouble(&self, verb: &str, kind: Kind, key: &str, error: &Error) -> StoreError {
        let source = &self.name;
        if error.is_denied() {
            let right = if verb == "write" { "readwrite" } else { "read" };
            return StoreError::Denied(format!(
                "etcd of source {source} does not let this user {verb} {key}: {error}; `etcdctl role grant-permission ROLE \
                 {right} --prefix=true {}`, or show other credentials (--cert and --key, --username and --password-file)",
                self.keys.prefix(kind, None)
            ));
        }
        match error {
            Error::Refused(_) if !error.is_gone() => {
                StoreError::Refused(format!("etcd of source {source} does not {verb} {key}: {error}"))
            }
            _ => {
                let unknown = if verb == "write" { "; whether it was written is not known: do it again" } else { "" };
                StoreError::Unreachable(format!("etcd of source {source}: {error}{unknown}"))
            }
        }
    }
}

fn first(responses: Vec<meshd_etcd::api::ResponseOp>) -> Option<KeyValue> {
    responses.into_iter().find_map(|response| match response.response {
        Some(Response::ResponseRange(range)) => range.kvs.into_iter().next(),
        _ => None,
    })
}

fn read_pair(resource: ResourceName, pair: &KeyValue) -> Stored {
    let (by, document) = understand(&String::from_utf8_lossy(&pair.value));
    let origin = String::from_utf8_lossy(&pair.key).into_owned();
    Stored { resource, origin, version: pair.mod_revision.to_string(), by, document }
}

/// What is to be there, by the version that was read.
fn expected(key: &str, version: &str) -> Vec<Compare> {
    // What is no revision was never read here: no key has revision -1.
    vec![unchanged(key, version.parse().unwrap_or(-1))]
}

impl Store for EtcdStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn list<'a>(&'a self, kind: Kind, namespace: Option<&'a str>) -> Answer<'a, Vec<Stored>> {
        Box::pin(async move {
            let prefix = self.keys.prefix(kind, namespace);
            let listed = self.client.list(&Prefix::new(prefix.clone())).await;
            let listed = listed.map_err(|error| self.trouble("read", kind, &prefix, &error))?;
            let document = |pair: &KeyValue| {
                Some(read_pair(self.keys.resource(kind, std::str::from_utf8(&pair.key).ok()?)?, pair))
            };
            Ok(listed.keys.iter().filter_map(document).collect())
        })
    }

    fn get<'a>(&'a self, resource: &'a ResourceName) -> Answer<'a, Option<Stored>> {
        Box::pin(self.read(resource))
    }

    fn write<'a>(&'a self, write: Write<'a>) -> Answer<'a, bool> {
        Box::pin(async move {
            let resource = &write.manifest.resource;
            let key = self.keys.key(resource);
            let compare = match write.over {
                Over::Nothing => expected(&key, "0"),
                Over::Version(version) => expected(&key, version),
                Over::Anything => Vec::new(),
            };
            if !write.dry_run {
                let value = write.manifest.signed(write.by);
                self.change(resource, compare, put(key, value, FOR_GOOD)).await?;
            }
            Ok(true)
        })
    }

    fn remove<'a>(&'a self, resource: &'a ResourceName, version: Option<&'a str>) -> Answer<'a, ()> {
        Box::pin(async move {
            let key = self.keys.key(resource);
            let compare = version.map_or(Vec::new(), |version| expected(&key, version));
            self.change(resource, compare, delete(key)).await
        })
    }
}
