//! Documents in Consul's store: each is written and deleted only at the index it was read at (`?cas=`).

use std::sync::Arc;
use std::time::Duration;

use data_encoding::BASE64;
use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde::Deserialize;

use super::client::{Call, Client, Reply};
use super::settings::Settings;
use crate::write::{Answer, Keys, Kind, Over, ResourceName, Store, StoreError, Stored, Write, understand};
use crate::yaml::printable;

const DEADLINE: Duration = Duration::from_secs(5);

pub(crate) struct ConsulStore {
    name: String,
    keys: Keys,
    settings: Arc<Settings>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Pair {
    key: String,
    modify_index: u64,
    value: Option<String>,
}

impl ConsulStore {
    pub(super) fn new(name: &str, keys: Keys, settings: Arc<Settings>) -> ConsulStore {
        ConsulStore { name: name.to_owned(), keys, settings }
    }

    /// By a connection of its own, so that it is carried out once.
    async fn call(&self, method: Method, path: &str, body: Bytes) -> Result<Reply, StoreError> {
        let mut client = Client::new(self.settings.clone());
        let token = client.token().map_err(|error| StoreError::Refused(error.to_string()))?;
        let unknown = if method == Method::GET { "" } else { "; whether it was done is not known: do it again" };
        let reply = client.call(&Call { method, path, body }, token.as_ref(), DEADLINE).await;
        reply.map_err(|error| StoreError::Unreachable(format!("source {}: {error}{unknown}", self.name)))
    }

    async fn pairs(&self, kind: Kind, key: &str, options: &str) -> Result<Vec<Pair>, StoreError> {
        let reply = self.call(Method::GET, &format!("/v1/kv/{key}{options}"), Bytes::new()).await?;
        match reply.status {
            StatusCode::NOT_FOUND | StatusCode::OK if reply.is_filtered() => {
                Err(self.denied("read", kind, key, "it hides it"))
            }
            StatusCode::NOT_FOUND => Ok(Vec::new()),
            StatusCode::OK => serde_json::from_slice(&reply.body).map_err(|error| {
                StoreError::Refused(format!(
                    "what Consul says of {key} cannot be read: {}",
                    printable(&error.to_string())
                ))
            }),
            _ => Err(self.refused("read", kind, key, &reply)),
        }
    }

    fn read_pair(resource: ResourceName, pair: &Pair) -> Stored {
        let value = BASE64.decode(pair.value.as_deref().unwrap_or_default().as_bytes()).unwrap_or_default();
        let (by, document) = understand(&String::from_utf8_lossy(&value));
        Stored { resource, origin: pair.key.clone(), version: pair.modify_index.to_string(), by, document }
    }

    async fn find(&self, resource: &ResourceName) -> Result<Option<Stored>, StoreError> {
        let pairs = self.pairs(resource.kind, &self.keys.key(resource), "").await?;
        Ok(pairs.first().map(|pair| Self::read_pair(resource.clone(), pair)))
    }

    async fn change(&self, resource: &ResourceName, method: Method, cas: &str, body: String) -> Result<(), StoreError> {
        let key = self.keys.key(resource);
        let reply = self.call(method, &format!("/v1/kv/{key}{cas}"), body.into()).await?;
        match (reply.status, reply.body.trim_ascii()) {
            (StatusCode::OK, b"true") => Ok(()),
            (StatusCode::OK, b"false") => Err(StoreError::changed(resource, self.find(resource).await?.as_ref())),
            _ => Err(self.refused("write", resource.kind, &key, &reply)),
        }
    }

    fn refused(&self, verb: &str, kind: Kind, key: &str, reply: &Reply) -> StoreError {
        let said = reply.said();
        match reply.status {
            StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => self.denied(verb, kind, key, &said),
            status if status.is_server_error() => StoreError::Unreachable(format!(
                "Consul of source {} does not {verb} {key}: {said} ({status})",
                self.name
            )),
            status => {
                StoreError::Refused(format!("Consul of source {} does not {verb} {key}: {said} ({status})", self.name))
            }
        }
    }

    fn denied(&self, verb: &str, kind: Kind, key: &str, said: &str) -> StoreError {
        StoreError::Denied(format!(
            "Consul of source {} does not let this token {verb} {key} ({said}); add `key_prefix \"{}\" {{ policy = \
             \"{verb}\" }}` to its policy, or show another one (--token-file)",
            self.name,
            self.keys.prefix(kind, None)
        ))
    }
}

impl Store for ConsulStore {
    fn name(&self) -> &str {
        &self.name
    }

    fn list<'a>(&'a self, kind: Kind, namespace: Option<&'a str>) -> Answer<'a, Vec<Stored>> {
        Box::pin(async move {
            let pairs = self.pairs(kind, &self.keys.prefix(kind, namespace), "?recurse=true").await?;
            let document = |pair: &Pair| Some(Self::read_pair(self.keys.resource(kind, &pair.key)?, pair));
            Ok(pairs.iter().filter_map(document).collect())
        })
    }

    fn get<'a>(&'a self, resource: &'a ResourceName) -> Answer<'a, Option<Stored>> {
        Box::pin(self.find(resource))
    }

    fn write<'a>(&'a self, write: Write<'a>) -> Answer<'a, bool> {
        Box::pin(async move {
            let cas = match write.over {
                Over::Nothing => "?cas=0".to_owned(),
                Over::Version(version) => format!("?cas={version}"),
                Over::Anything => String::new(),
            };
            if !write.dry_run {
                let body = write.manifest.signed(write.by);
                self.change(&write.manifest.resource, Method::PUT, &cas, body).await?;
            }
            Ok(true)
        })
    }

    fn remove<'a>(&'a self, resource: &'a ResourceName, version: Option<&'a str>) -> Answer<'a, ()> {
        Box::pin(async move {
            let cas = version.map_or(String::new(), |version| format!("?cas={version}"));
            self.change(resource, Method::DELETE, &cas, String::new()).await
        })
    }
}
