//! Registrations in Kubernetes: an EndpointSlice for each service, and a Lease for the host that keeps them all.
//!
//! A write names the resourceVersion it replaces, and a removal the one it removes: who stood still changes nothing of
//! another's. Readers take the slices of a Lease that is not renewed for dead (`leases.rs`). Where Istio's WorkloadEntry is
//! known, each healthy place is one, too.

mod lease;
mod written;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::Method;
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::Instant;

use self::lease::HostLease;
use self::written::Keeper;
use super::client::{Asked, Call, Client};
use super::error::Error;
use super::objects::{LEASE_HOLDER, NOTES};
use super::settings::Settings;
use crate::register::{Answer, Found, Hold, Key, Over, Registrar, RegistrarError, address_towards};
use crate::yaml::printable;
use crate::{Health, Registration};

const JSON: &str = "application/json";
const ISTIO: &str = "/apis/networking.istio.io/v1";
/// How soon Istio's kinds are noticed that were not there.
const ISTIO_AGAIN: Duration = Duration::from_secs(300);

pub(crate) struct KubernetesRegistrar {
    name: String,
    settings: Settings,
    /// Of the Leases.
    namespace: String,
    client: Mutex<Client>,
    /// By instance.
    leases: Mutex<HashMap<String, HostLease>>,
    /// When it was asked for last whether Istio's WorkloadEntry is known, and the answer.
    istio: Mutex<Option<(Instant, bool)>>,
    /// What it could not be told for now: to be written once more.
    untold: Mutex<BTreeSet<Key>>,
}

impl From<Error> for RegistrarError {
    fn from(error: Error) -> RegistrarError {
        RegistrarError(error.to_string())
    }
}

/// Where objects of a kind lie, and one of them.
struct At {
    collection: String,
    name: String,
    /// `endpointslices in namespace shop`
    what: String,
}

impl At {
    fn new(group: &str, namespace: &str, plural: &str, name: String) -> At {
        At {
            collection: format!("{group}/namespaces/{namespace}/{plural}"),
            name,
            what: format!("{plural} in namespace {namespace}"),
        }
    }

    fn slice(key: &Key) -> At {
        At::new("/apis/discovery.k8s.io/v1", key.service.namespace(), "endpointslices", written::name_of(key))
    }

    fn workload_entry(key: &Key) -> At {
        At::new(ISTIO, key.service.namespace(), "workloadentries", written::name_of(key))
    }

    fn object(&self) -> String {
        format!("{}/{}", self.collection, self.name)
    }

    fn asked(&self, verb: &'static str) -> Asked {
        Asked { verb, resource: self.what.clone() }
    }
}

fn version_of(object: &Value) -> String {
    object["metadata"]["resourceVersion"].as_str().unwrap_or_default().to_owned()
}

/// Numbers in all versions there are; what is none matches nothing.
fn number(version: &str) -> u64 {
    version.parse().unwrap_or(0)
}

fn note<'a>(object: &'a Value, name: &str) -> &'a str {
    object["metadata"]["annotations"][format!("{NOTES}{name}")].as_str().unwrap_or_default()
}

/// What cannot be read fences nothing.
fn found(slice: &Value) -> Found {
    let address = slice["endpoints"][0]["addresses"][0].as_str().unwrap_or("an address that cannot be read");
    Found::only(note(slice, "epoch").parse().unwrap_or(0), number(&version_of(slice)), printable(address))
}

/// Names of a Service's ports, which slices have to bear.
fn port_names(service: &Value, key: &Key, said: &Registration) -> Result<BTreeMap<u16, String>, RegistrarError> {
    let ports = service["spec"]["ports"].as_array().into_iter().flatten();
    let named = ports.filter(|port| port["protocol"].as_str().is_none_or(|it| it == "TCP")).filter_map(|port| {
        let number = u16::try_from(port["port"].as_u64()?).ok()?;
        Some((number, port["name"].as_str().unwrap_or_default().to_owned()))
    });
    let names: BTreeMap<u16, String> = named.collect();
    match said.ports.iter().find(|served| !names.contains_key(&served.port)) {
        Some(missing) => Err(RegistrarError(format!(
            "the Service {}/{} has no TCP port {}, which is served here; add it there, or correct enrol.d",
            key.service.namespace(),
            key.service.name(),
            missing.port
        ))),
        None => Ok(names),
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

impl KubernetesRegistrar {
    pub(super) fn new(name: String, settings: Settings, namespace: String) -> KubernetesRegistrar {
        let client = Mutex::new(Client::new(settings.clone()));
        KubernetesRegistrar {
            name,
            settings,
            namespace,
            client,
            leases: Mutex::default(),
            istio: Mutex::default(),
            untold: Mutex::default(),
        }
    }

    async fn call(&self, method: Method, path: &str, body: Option<&Value>, asked: &Asked) -> Result<Value, Error> {
        let caller = self.client.lock().await.caller().await?;
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        let answer = caller.call(Call { method, path, content: JSON, body }, asked).await;
        if matches!(answer, Err(Error::Broken(_) | Error::Deadline(_) | Error::Unauthorized { .. })) {
            self.client.lock().await.leave();
        }
        serde_json::from_slice(&answer?).map_err(|error| Error::Garbled(error.to_string()))
    }

    async fn get(&self, at: &At) -> Result<Option<Value>, Error> {
        match self.call(Method::GET, &at.object(), None, &at.asked("get")).await {
            Ok(object) => Ok(Some(object)),
            Err(Error::Refused { status: 404, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates it, or replaces what it names the version of. `None`: something else is there.
    async fn put(&self, at: &At, object: &Value) -> Result<Option<Value>, Error> {
        let answer = if object["metadata"]["resourceVersion"].is_null() {
            self.call(Method::POST, &at.collection, Some(object), &at.asked("create")).await
        } else {
            self.call(Method::PUT, &at.object(), Some(object), &at.asked("update")).await
        };
        match answer {
            Ok(written) => Ok(Some(written)),
            Err(Error::Refused { status: 409, .. }) => Ok(None),
            Err(Error::Refused { status: 404, .. }) if !object["metadata"]["resourceVersion"].is_null() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Unless it is another's by now.
    async fn delete(&self, at: &At, version: &str) -> Result<(), Error> {
        let options = written::deletion(version);
        match self.call(Method::DELETE, &at.object(), Some(&options), &at.asked("delete")).await {
            Ok(_) | Err(Error::Refused { status: 404 | 409, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn lease_at(&self, name: &str) -> At {
        At::new("/apis/coordination.k8s.io/v1", &self.namespace, "leases", name.to_owned())
    }

    /// Renews the host's Lease, unless that was done just now; who holds it.
    async fn keep_lease(&self, instance: &str) -> Result<String, RegistrarError> {
        let mut leases = self.leases.lock().await;
        let lease = leases.entry(instance.to_owned()).or_default();
        let name = written::word_of(instance);
        let at = self.lease_at(&name);
        let began = Instant::now();
        if lease.is_fresh(began) {
            return Ok(lease.holder(instance));
        }
        if let Some(kept) = lease.kept().cloned() {
            let holder = lease.holder(instance);
            let keeper = Keeper { lease: &name, holder: &holder };
            let object = written::lease(&self.namespace, keeper, Some(&kept.version), kept.acquired, SystemTime::now());
            if let Some(written) = self.put(&at, &object).await? {
                lease.was_kept(version_of(&written), kept.acquired, began);
                return Ok(holder);
            }
            lease.was_lost();
        }
        let there = self.get(&at).await?.map(|object| lease::Found {
            holder: object["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned(),
            version: version_of(&object),
        });
        let taken_by = |holder: &str| {
            RegistrarError(format!(
                "another meshd keeps the Lease {}/{name} of this host's name (it is held by `{}`); if that host is a copy \
                 of this one, give it an identity of its own (meshd join)",
                self.namespace,
                printable(holder)
            ))
        };
        if !lease.takes(there.as_ref(), unix_ms(), began) {
            return Err(taken_by(there.as_ref().map_or("", |found| &found.holder)));
        }
        let (holder, acquired) = (lease.holder(instance), SystemTime::now());
        let keeper = Keeper { lease: &name, holder: &holder };
        let version = there.as_ref().map(|found| &*found.version);
        let object = written::lease(&self.namespace, keeper, version, acquired, acquired);
        match self.put(&at, &object).await? {
            Some(written) => {
                lease.was_kept(version_of(&written), acquired, began);
                Ok(holder)
            }
            None => Err(taken_by("somebody who just took it")),
        }
    }

    /// It keeps nothing any more.
    async fn release(&self, key: &Key) -> Result<(), RegistrarError> {
        let mut leases = self.leases.lock().await;
        let Some(lease) = leases.get_mut(&key.instance) else { return Ok(()) };
        lease.users.remove(key);
        if let Some(kept) = lease.kept().filter(|_| lease.users.is_empty()) {
            let at = self.lease_at(&written::word_of(&key.instance));
            self.delete(&at, &kept.version).await?;
            lease.was_lost();
        }
        Ok(())
    }

    async fn service(&self, key: &Key) -> Result<Value, RegistrarError> {
        let (name, namespace) = (key.service.name(), key.service.namespace());
        let service = self.get(&At::new("/api/v1", namespace, "services", name.to_owned())).await?;
        service.ok_or_else(|| {
            RegistrarError(format!(
                "there is no Service {namespace}/{name} in the cluster; create it, without a selector and with the ports \
                 served here"
            ))
        })
    }

    async fn knows_istio(&self) -> Result<bool, Error> {
        let mut known = self.istio.lock().await;
        if let Some((_, is)) = known.filter(|(at, is)| *is || at.elapsed() < ISTIO_AGAIN) {
            return Ok(is);
        }
        let asked = Asked { verb: "get", resource: ISTIO.to_owned() };
        let is = match self.call(Method::GET, ISTIO, None, &asked).await {
            Ok(group) => {
                let mut resources = group["resources"].as_array().into_iter().flatten();
                resources.any(|resource| resource["name"] == "workloadentries")
            }
            Err(Error::Refused { status: 404, .. }) => false,
            Err(error) => return Err(error),
        };
        *known = Some((Instant::now(), is));
        Ok(is)
    }

    /// Tells Istio of a place that takes calls, and takes away one that does not; never what a later life said.
    async fn tell_istio(
        &self,
        key: &Key,
        said: &Registration,
        names: &BTreeMap<u16, String>,
        keeper: Keeper<'_>,
    ) -> Result<(), Error> {
        if !self.knows_istio().await? {
            return Ok(());
        }
        let at = At::workload_entry(key);
        let there =
            self.get(&at).await?.map(|object| (note(&object, "epoch").parse().unwrap_or(0), version_of(&object)));
        if there.as_ref().is_some_and(|(epoch, _): &(u64, String)| *epoch > said.epoch) {
            return Ok(());
        }
        let takes_calls = said.weight > 0 && said.health == Health::Healthy;
        match (takes_calls, there) {
            (true, there) => {
                let version = there.map(|(_, version)| number(&version));
                let object = written::workload_entry(key, said, names, keeper, version);
                let written = self.put(&at, &object).await?;
                let reason = || "somebody else wrote it just now".to_owned();
                let asked = at.asked("update").to_string();
                written.map(drop).ok_or_else(|| Error::Refused { status: 409, asked, reason: reason() })
            }
            (false, Some((_, version))) => self.delete(&at, &version).await,
            (false, None) => Ok(()),
        }
    }

    async fn leave_istio(&self, key: &Key, holder: &str) -> Result<(), Error> {
        if !self.knows_istio().await? {
            return Ok(());
        }
        let at = At::workload_entry(key);
        match self.get(&at).await? {
            Some(object) if note(&object, LEASE_HOLDER) == holder => self.delete(&at, &version_of(&object)).await,
            _ => Ok(()),
        }
    }
}

impl Registrar for KubernetesRegistrar {
    fn name(&self) -> &str {
        &self.name
    }

    fn address_here(&self) -> Answer<'_, IpAddr> {
        Box::pin(async move {
            let access = self.settings.access().map_err(|error| RegistrarError(error.to_string()))?;
            address_towards(&[access.address]).await
        })
    }

    fn find<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Found>> {
        Box::pin(async move { Ok(self.get(&At::slice(key)).await?.as_ref().map(found)) })
    }

    fn write<'a>(&'a self, key: &'a Key, said: &'a Registration, over: Over) -> Answer<'a, Option<Hold>> {
        Box::pin(async move {
            let names = port_names(&self.service(key).await?, key, said)?;
            // First, so that a slice is never there without what keeps it.
            let holder = self.keep_lease(&key.instance).await?;
            let name = written::word_of(&key.instance);
            let keeper = Keeper { lease: &name, holder: &holder };
            let version = match over {
                Over::Own(hold) => hold.version,
                Over::Version(version) => version,
            };
            let slice = written::slice(key, said, &names, keeper, Some(version).filter(|version| *version > 0));
            let at = At::slice(key);
            let written = match self.put(&at, &slice).await {
                // The host has an address of the other family now, and that of a slice cannot change: it is written anew.
                Err(Error::Refused { status: 422, .. }) if version > 0 => {
                    self.delete(&at, &version.to_string()).await?;
                    None
                }
                written => written?,
            };
            let Some(written) = written else { return Ok(None) };
            if let Some(lease) = self.leases.lock().await.get_mut(&key.instance) {
                lease.users.insert(key.clone());
            }
            if let Err(error) = self.tell_istio(key, said, &names, keeper).await {
                tracing::warn!(source = self.name, %key, %error, "Istio is not told; who asks the mesh is");
                if !matches!(error, Error::Forbidden { .. }) {
                    self.untold.lock().await.insert(key.clone());
                }
            }
            Ok(Some(Hold { lease: 0, version: number(&version_of(&written)) }))
        })
    }

    fn keep<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, bool> {
        Box::pin(async move {
            let holder = self.keep_lease(&key.instance).await?;
            if self.untold.lock().await.remove(key) {
                return Ok(false);
            }
            let slice = self.get(&At::slice(key)).await?;
            let is_ours =
                |slice: &Value| number(&version_of(slice)) == hold.version && note(slice, LEASE_HOLDER) == holder;
            Ok(slice.as_ref().is_some_and(is_ours))
        })
    }

    fn withdraw<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, ()> {
        Box::pin(async move {
            let holder = self.leases.lock().await.get(&key.instance).map(|lease| lease.holder(&key.instance));
            self.delete(&At::slice(key), &hold.version.to_string()).await?;
            self.leave_istio(key, &holder.unwrap_or_default()).await?;
            self.release(key).await
        })
    }
}
