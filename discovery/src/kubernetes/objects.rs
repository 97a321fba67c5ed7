//! Of Services, EndpointSlices and Pods, the few fields that say where a service runs, and our own documents. Nothing else is
//! kept.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::Error;
use super::leases;
use crate::{Protocol, ServiceName};

/// What operators write on objects for us.
pub(super) const NOTES: &str = "meshd.dev/";
/// On a slice: of which Service it is.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// On a slice, below [`NOTES`]: the Lease of the host that wrote it, and who must hold it.
pub(super) const LEASE: &str = "lease";
pub(super) const LEASE_HOLDER: &str = "lease-holder";

/// Annotations below [`NOTES`], without it.
pub(super) type Notes = BTreeMap<String, String>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Service,
    Slice,
    Pod,
    /// Of a host that registers.
    Lease,
    /// Ours.
    Mesh,
}

/// That somebody is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) name: String,
    pub(super) holder: String,
    /// Only whether it changes matters.
    pub(super) renewed: String,
    pub(super) lasts: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) name: ServiceName,
    pub(super) ports: Vec<Port>,
    /// Its ClusterIPs.
    pub(super) addresses: Vec<IpAddr>,
    /// Empty: somebody else says where it runs.
    pub(super) selector: BTreeMap<String, String>,
    /// A name elsewhere, which runs nowhere here.
    pub(super) is_external: bool,
    pub(super) notes: Notes,
}

/// TCP only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slice {
    /// `shop/payments-x2v4f`
    pub(super) key: Arc<str>,
    pub(super) service: ServiceName,
    /// Each name with the port of the programs.
    pub(super) ports: Vec<(String, u16)>,
    pub(super) endpoints: Vec<SliceEndpoint>,
    /// Endpoints that are names, not addresses.
    pub(super) is_of_names: bool,
    pub(super) notes: Notes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SliceEndpoint {
    /// Its first: all of them lead to the same program.
    pub(super) address: Option<IpAddr>,
    pub(super) state: State,
    pub(super) zone: Arc<str>,
    /// `shop/payments-7d9f`, and which of that name.
    pub(super) pod: Option<(Arc<str>, Life)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Ready,
    /// It ends, and still answers.
    Draining,
    Away,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) life: Life,
    /// Its service account.
    pub(super) account: Arc<str>,
    pub(super) labels: Labels,
    /// It takes HBONE, by Istio's own rule.
    pub(super) takes_hbone: bool,
}

/// Of a uid, as much as tells two pods of one name apart; 0 where none is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life(u64);

impl Life {
    fn of(uid: &str) -> Life {
        let mut hasher = DefaultHasher::new();
        uid.hash(&mut hasher);
        Life(if uid.is_empty() { 0 } else { hasher.finish().max(1) })
    }

    /// Nothing says that they are two.
    pub(super) fn may_be(self, other: Life) -> bool {
        self == other || self.0 == 0 || other.0 == 0
    }
}

/// Of labels, as much as tells whether a selector names them: there are many pods, and each has ten of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Labels(Box<[u64]>);

impl Labels {
    fn of<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Labels {
        Labels(labels.into_iter().map(Self::mark).collect())
    }

    /// Who chooses a label of the same mark could have chosen that label.
    fn mark(label: (&String, &String)) -> u64 {
        let mut hasher = DefaultHasher::new();
        label.hash(&mut hasher);
        hasher.finish()
    }

    pub(super) fn are_selected(&self, selector: &BTreeMap<String, String>) -> bool {
        !selector.is_empty() && selector.iter().all(|label| self.0.contains(&Self::mark(label)))
    }
}

/// A MeshService, as text: what it means the reader of documents knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mesh {
    pub(super) name: ServiceName,
    pub(super) text: Box<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Object {
    Service(Service),
    Slice(Slice),
    /// By its key, `shop/payments-7d9f`.
    Pod(Arc<str>, Pod),
    Lease(Lease),
    Mesh(Mesh),
}

/// What a list says.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub(super) objects: Vec<Object>,
    pub(super) position: String,
    /// Where the next page begins.
    pub(super) more: Option<String>,
}

/// A line of a watch.
#[derive(Debug)]
pub(super) enum Event {
    Set(Object, String),
    Gone(Object, String),
    /// Nothing happened up to there.
    Bookmark(String),
    /// The history that the watch needs is no longer kept.
    Expired,
    Failed(String),
    /// An object that cannot be one of a service of the mesh.
    Other(String),
}

pub(super) fn read_list(kind: Kind, text: &[u8]) -> Result<Listed, Error> {
    match kind {
        Kind::Service => read_list_of::<RawService>(text),
        Kind::Slice => read_list_of::<RawSlice>(text),
        Kind::Pod => read_list_of::<RawPod>(text),
        Kind::Lease => read_list_of::<RawLease>(text),
        Kind::Mesh => read_list_of::<RawMesh>(text),
    }
}

pub(super) fn read_event(kind: Kind, line: &[u8]) -> Result<Event, Error> {
    match kind {
        Kind::Service => read_event_of::<RawService>(line),
        Kind::Slice => read_event_of::<RawSlice>(line),
        Kind::Pod => read_event_of::<RawPod>(line),
        Kind::Lease => read_event_of::<RawLease>(line),
        Kind::Mesh => read_event_of::<RawMesh>(line),
    }
}

fn read_event_of<T: Reduce>(line: &[u8]) -> Result<Event, Error> {
    let mut event = match parse::<RawEvent<T>>(line) {
        Ok(event) if event.r#type != "ERROR" => event,
        // A Status, which is an object of another kind.
        other => {
            let head: RawEvent<Head> = parse(line)?;
            return match (head.r#type.as_str(), head.object.code) {
                ("ERROR", 410) => Ok(Event::Expired),
                ("ERROR", _) => Ok(Event::Failed(head.object.message)),
                _ => Err(other.err().unwrap_or_else(|| Error::Garbled("an event of no kind".to_owned()))),
            };
        }
    };
    let position = std::mem::take(&mut event.object.metadata().resource_version);
    if event.r#type == "BOOKMARK" {
        return Ok(Event::Bookmark(position));
    }
    Ok(match (event.object.reduce(), event.r#type.as_str()) {
        (Some(object), "ADDED" | "MODIFIED") => Event::Set(object, position),
        (Some(object), "DELETED") => Event::Gone(object, position),
        _ => Event::Other(position),
    })
}

/// Which life of the store it is, and how far: a list of the one namespace every cluster has.
pub(super) fn read_life(text: &[u8]) -> Result<(String, u64), Error> {
    let list: RawList<Bare> = parse(text)?;
    let Some(namespace) = list.items.unwrap_or_default().into_iter().next() else {
        return Err(Error::NotReady("the namespace kube-system is not there".to_owned()));
    };
    Ok((namespace.metadata.uid, list.metadata.resource_version.parse().unwrap_or(0)))
}

/// The words of a refusal.
pub(super) fn read_refusal(text: &[u8]) -> String {
    let said = serde_json::from_slice::<Head>(text).map(|status| status.message).unwrap_or_default();
    let said = if said.is_empty() { String::from_utf8_lossy(text).into_owned() } else { said };
    said.chars().take(400).flat_map(|c| if c == '"' { vec!['`'] } else { c.escape_debug().collect() }).collect()
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(text).map_err(|error| Error::Garbled(error.to_string()))
}

fn read_list_of<T: Reduce>(text: &[u8]) -> Result<Listed, Error> {
    let list: RawList<T> = parse(text)?;
    Ok(Listed {
        objects: list.items.unwrap_or_default().into_iter().filter_map(Reduce::reduce).collect(),
        position: list.metadata.resource_version,
        more: Some(list.metadata.r#continue).filter(|token| !token.is_empty()),
    })
}

// What the API server sends: a field may be null wherever it may be missing.

#[derive(Deserialize)]
struct RawList<T> {
    #[serde(default)]
    metadata: ListMeta,
    items: Option<Vec<T>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ListMeta {
    resource_version: String,
    r#continue: String,
}

#[derive(Deserialize)]
struct RawEvent<T> {
    r#type: String,
    object: T,
}

/// What a Status has.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Head {
    code: u16,
    message: String,
}

#[derive(Deserialize)]
struct Bare {
    metadata: Meta,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    name: String,
    namespace: String,
    uid: String,
    resource_version: String,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
}

impl Meta {
    fn key(&self) -> Arc<str> {
        format!("{}/{}", self.namespace, self.name).into()
    }

    fn label(&self, name: &str) -> Option<&str> {
        self.labels.as_ref()?.get(name).map(String::as_str)
    }

    fn notes(&self) -> Notes {
        let all = self.annotations.iter().flatten();
        all.filter_map(|(key, value)| Some((key.strip_prefix(NOTES)?.to_owned(), value.clone()))).collect()
    }
}

trait Reduce: DeserializeOwned {
    fn metadata(&mut self) -> &mut Meta;
    fn reduce(self) -> Option<Object>;
}

#[derive(Deserialize)]
struct RawService {
    metadata: Meta,
    #[serde(default)]
    spec: ServiceSpec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ServiceSpec {
    r#type: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    selector: Option<BTreeMap<String, String>>,
    ports: Option<Vec<RawPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    /// A slice may leave it out: all ports.
    port: Option<u16>,
    protocol: Option<String>,
    app_protocol: Option<String>,
}

impl RawPort {
    fn is_tcp(&self) -> bool {
        self.protocol.as_deref().is_none_or(|protocol| protocol == "TCP")
    }

    /// What Kubernetes, Istio and gRPC agree on; anything else is detected.
    fn declared(&self) -> Protocol {
        match self.app_protocol.as_deref().unwrap_or_default().to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "http" => Protocol::Http,
            "http2" | "h2c" | "kubernetes.io/h2c" => Protocol::Http2,
            "grpc" => Protocol::Grpc,
            "https" | "tls" => Protocol::Tls,
            _ => Protocol::Detect,
        }
    }
}

impl Reduce for RawService {
    fn metadata(&mut self) -> &mut Meta {
        &mut self.metadata
    }

    fn reduce(self) -> Option<Object> {
        let ports = self.spec.ports.iter().flatten().filter(|port| port.is_tcp()).filter_map(|raw| {
            let name = raw.name.clone().unwrap_or_default();
            Some(Port { name, port: raw.port?, protocol: raw.declared() })
        });
        Some(Object::Service(Service {
            name: ServiceName::new(&self.metadata.name, &self.metadata.namespace).ok()?,
            ports: ports.collect(),
            // A headless one has the word `None`.
            addresses: self.spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect(),
            selector: self.spec.selector.unwrap_or_default(),
            is_external: self.spec.r#type.as_deref() == Some("ExternalName"),
            notes: self.metadata.notes(),
        }))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSlice {
    metadata: Meta,
    #[serde(default)]
    address_type: String,
    endpoints: Option<Vec<RawEndpoint>>,
    ports: Option<Vec<RawPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Option<Vec<String>>,
    conditions: Option<Conditions>,
    target_ref: Option<TargetRef>,
    zone: Option<String>,
}

#[derive(Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Conditions {
    /// Not said is good, as the API has it.
    fn state(&self) -> State {
        let ready = self.ready.unwrap_or(true);
        match (ready, self.terminating.unwrap_or(false), self.serving.unwrap_or(ready)) {
            (true, ..) => State::Ready,
            (false, true, true) => State::Draining,
            _ => State::Away,
        }
    }
}

#[derive(Deserialize)]
struct TargetRef {
    kind: Option<String>,
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
}

impl RawEndpoint {
    fn reduce(self, namespace: &str) -> SliceEndpoint {
        let pod = self.target_ref.filter(|target| target.kind.as_deref() == Some("Pod")).and_then(|target| {
            let namespace = target.namespace.as_deref().unwrap_or(namespace);
            Some((format!("{namespace}/{}", target.name?).into(), Life::of(&target.uid.unwrap_or_default())))
        });
        SliceEndpoint {
            address: self.addresses.iter().flatten().next().and_then(|text| text.parse::<IpAddr>().ok()),
            state: self.conditions.unwrap_or_default().state(),
            zone: self.zone.unwrap_or_default().into(),
            pod,
        }
    }
}

impl Reduce for RawSlice {
    fn metadata(&mut self) -> &mut Meta {
        &mut self.metadata
    }

    fn reduce(self) -> Option<Object> {
        let namespace = &self.metadata.namespace;
        let service = ServiceName::new(self.metadata.label(SERVICE_NAME)?, namespace).ok()?;
        let ports = self.ports.iter().flatten().filter(|port| port.is_tcp());
        Some(Object::Slice(Slice {
            key: self.metadata.key(),
            service,
            ports: ports.filter_map(|raw| Some((raw.name.clone().unwrap_or_default(), raw.port?))).collect(),
            is_of_names: self.address_type == "FQDN",
            notes: self.metadata.notes(),
            endpoints: self.endpoints.into_iter().flatten().map(|endpoint| endpoint.reduce(namespace)).collect(),
        }))
    }
}

#[derive(Deserialize)]
struct RawLease {
    metadata: Meta,
    #[serde(default)]
    spec: LeaseSpec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LeaseSpec {
    holder_identity: Option<String>,
    lease_duration_seconds: Option<u64>,
    renew_time: Option<String>,
}

impl Reduce for RawLease {
    fn metadata(&mut self) -> &mut Meta {
        &mut self.metadata
    }

    fn reduce(self) -> Option<Object> {
        Some(Object::Lease(Lease {
            name: self.metadata.name,
            holder: self.spec.holder_identity.unwrap_or_default(),
            renewed: self.spec.renew_time.unwrap_or_default(),
            lasts: leases::lasts(self.spec.lease_duration_seconds),
        }))
    }
}

#[derive(Deserialize)]
struct RawPod {
    metadata: Meta,
    #[serde(default)]
    spec: PodSpec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    service_account_name: Option<String>,
}

impl Reduce for RawPod {
    fn metadata(&mut self) -> &mut Meta {
        &mut self.metadata
    }

    fn reduce(self) -> Option<Object> {
        let redirected = |annotations: &BTreeMap<String, String>| {
            annotations.get("ambient.istio.io/redirection").is_some_and(|value| value == "enabled")
        };
        let takes_hbone = self.metadata.annotations.as_ref().is_some_and(redirected)
            || self.metadata.label("networking.istio.io/tunnel") == Some("http");
        let account = self.spec.service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default");
        let (key, life) = (self.metadata.key(), Life::of(&self.metadata.uid));
        let labels = Labels::of(self.metadata.labels.iter().flatten());
        Some(Object::Pod(key, Pod { life, account: account.into(), labels, takes_hbone }))
    }
}

#[derive(Deserialize)]
struct RawMesh {
    metadata: Meta,
    #[serde(default)]
    spec: serde_json::Value,
}

impl Reduce for RawMesh {
    fn metadata(&mut self) -> &mut Meta {
        &mut self.metadata
    }

    fn reduce(self) -> Option<Object> {
        let Meta { name, namespace, .. } = self.metadata;
        let document = serde_json::json!({
            "apiVersion": "meshd.dev/v1alpha1", "kind": "MeshService",
            "metadata": { "name": name, "namespace": namespace }, "spec": self.spec,
        });
        let name = ServiceName::new(&name, &namespace).ok()?;
        Some(Object::Mesh(Mesh { name, text: document.to_string().into() }))
    }
}

#[cfg(test)]
#[path = "objects_tests.rs"]
mod tests;
