//! What is in the backend: `s0.scale`, `s1.scale`, ..., each with endpoints that are replaced by new addresses.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Result, ensure};
use http::Method;
use meshd_discovery::{ServiceName, SourceKind};
use meshd_etcd::api::TxnRequest;
use meshd_etcd::{Client as Etcd, Settings, put};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinSet;

use crate::http::{Access, Client as Http};

const JSON: &str = "application/json";
const JSON_PATCH: &str = "application/json-patch+json";
pub(crate) const NAMESPACE: &str = "scale";

/// Changes come from many hosts: one that a backend takes its time for holds up those of the same service only.
const LANES: usize = 8;
/// In each lane. Then all wait, and are late from when they were due.
const MOST_WAITING: usize = 1000;

/// Who may write, which the source is not.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WriterConfig {
    kind: SourceKind,
    url: String,
    ca: PathBuf,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    /// Of Consul.
    token: Option<String>,
}

/// What was written, and when.
#[derive(Debug, Default)]
pub(crate) struct Board(Mutex<Written>);

#[derive(Debug, Default)]
struct Written {
    current: Vec<Vec<IpAddr>>,
    changed_at: HashMap<IpAddr, Instant>,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` of what was there from the start.
    pub(crate) fn changed_at(&self, address: IpAddr) -> Option<Instant> {
        self.lock().changed_at.get(&address).copied()
    }

    pub(crate) fn addresses(&self, service: usize) -> Vec<IpAddr> {
        self.lock().current[service].clone()
    }
}

pub(crate) fn service_name(service: usize) -> ServiceName {
    ServiceName::new(&format!("s{service}"), NAMESPACE).expect("two labels")
}

pub(crate) enum Backend {
    Etcd(Etcd),
    Consul(Http),
    Kubernetes(Http),
}

/// An endpoint's new address.
struct Change {
    service: usize,
    endpoint: usize,
    address: IpAddr,
}

pub(crate) struct Writer {
    /// Connections.
    backends: Vec<Backend>,
    /// To each of them, once changes are written.
    lanes: Vec<Sender<Change>>,
    board: Arc<Board>,
    random: fastrand::Rng,
    /// How many addresses were given away.
    addresses: u32,
}

impl Writer {
    pub(crate) fn open(config: &WriterConfig) -> Result<Self> {
        let backends = (0..LANES).map(|_| Backend::open(config.clone())).collect::<Result<_>>()?;
        let random = fastrand::Rng::with_seed(7);
        Ok(Self { backends, lanes: Vec::new(), board: Arc::default(), random, addresses: 0 })
    }

    pub(crate) fn board(&self) -> Arc<Board> {
        self.board.clone()
    }

    pub(crate) async fn fill(&mut self, services: usize, endpoints: usize) -> Result<()> {
        self.backends[0].create_namespace(NAMESPACE).await?;
        for service in 0..services {
            let addresses: Vec<IpAddr> = (0..endpoints).map(|_| self.next_address()).collect();
            self.backends[0].create(&service_name(service), &addresses).await?;
            self.board.lock().current.push(addresses);
        }
        Ok(())
    }

    /// From now on changes are written: those of a service one after the other. Done when this is dropped and they are.
    pub(crate) fn begin(&mut self) -> JoinSet<Result<()>> {
        let mut writing = JoinSet::new();
        for mut backend in self.backends.drain(..) {
            let (lane, mut changes) = channel(MOST_WAITING);
            self.lanes.push(lane);
            writing.spawn(async move {
                while let Some(Change { service, endpoint, address }) = changes.recv().await {
                    backend.replace(&service_name(service), endpoint, address).await?;
                }
                Ok(())
            });
        }
        writing
    }

    /// Replaces an endpoint of some service by a new one; of which.
    pub(crate) async fn change(&mut self, due: Instant) -> usize {
        let address = self.next_address();
        let (service, endpoint) = {
            let mut written = self.board.lock();
            let service = self.random.usize(..written.current.len());
            let endpoint = self.random.usize(..written.current[service].len());
            written.current[service][endpoint] = address;
            // Before it is sent: what the backend itself takes is part of it.
            written.changed_at.insert(address, due);
            (service, endpoint)
        };
        // A lane that failed ends the run.
        let _ = self.lanes[service % LANES].send(Change { service, endpoint, address }).await;
        service
    }

    fn next_address(&mut self) -> IpAddr {
        self.addresses += 1;
        IpAddr::V4(Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + self.addresses))
    }
}

impl Backend {
    pub(crate) fn open(config: WriterConfig) -> Result<Self> {
        let WriterConfig { kind, url, ca, cert, key, token } = config;
        Ok(match kind {
            SourceKind::Etcd => {
                let settings = Settings { endpoints: vec![url], ca: Some(ca), cert, key, ..Settings::default() };
                Backend::Etcd(Etcd::new(settings)?)
            }
            SourceKind::Consul => Backend::Consul(Http::new(Access { url, ca, cert, key, token })),
            SourceKind::Kubernetes => Backend::Kubernetes(Http::new(Access { url, ca, cert, key, token })),
            SourceKind::Files => anyhow::bail!("files change by themselves; name a backend"),
        })
    }

    pub(crate) async fn create_namespace(&mut self, namespace: &str) -> Result<()> {
        if let Self::Kubernetes(kubernetes) = self {
            let namespace = json!({ "metadata": { "name": namespace } });
            kubernetes.must(Method::POST, "/api/v1/namespaces", JSON, namespace.to_string()).await?;
        }
        Ok(())
    }

    pub(crate) async fn create(&mut self, service: &ServiceName, addresses: &[IpAddr]) -> Result<()> {
        let endpoints = addresses.iter().enumerate();
        match self {
            Self::Etcd(etcd) => {
                let document = put(key(service, "service"), document(service), 0);
                let endpoints = endpoints.map(|(endpoint, address)| registration(service, endpoint, *address));
                let success = std::iter::once(document).chain(endpoints).collect();
                etcd.txn(TxnRequest { success, ..TxnRequest::default() }).await?;
            }
            Self::Consul(consul) => {
                let path = format!("/v1/kv{}", key(service, "service"));
                consul.must(Method::PUT, &path, JSON, document(service)).await?;
                for (endpoint, address) in endpoints {
                    register(consul, service, endpoint, *address, Node::New).await?;
                }
            }
            Self::Kubernetes(kubernetes) => {
                let document = json!({
                    "metadata": { "name": service.name(), "annotations": { "meshd.dev/identities": identity(service) } },
                    "spec": { "ports": [{ "port": 80 }] },
                });
                let services = format!("/api/v1/namespaces/{}/services", service.namespace());
                kubernetes.must(Method::POST, &services, JSON, document.to_string()).await?;
                kubernetes.must(Method::POST, &slices(service), JSON, slice(service, addresses).to_string()).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn replace(&mut self, service: &ServiceName, endpoint: usize, address: IpAddr) -> Result<()> {
        match self {
            Self::Etcd(etcd) => {
                let success = vec![registration(service, endpoint, address)];
                let done = etcd.txn(TxnRequest { success, ..TxnRequest::default() }).await?;
                ensure!(done.succeeded, "etcd did not write");
                Ok(())
            }
            Self::Consul(consul) => register(consul, service, endpoint, address, Node::Known).await,
            Self::Kubernetes(kubernetes) => {
                let path = format!("/endpoints/{endpoint}/addresses/0");
                let patch = json!([{ "op": "replace", "path": path, "value": address }]);
                let slice = format!("{}/{}", slices(service), service.name());
                kubernetes.must(Method::PATCH, &slice, JSON_PATCH, patch.to_string()).await
            }
        }
    }
}

/// Of etcd, and of Consul's store.
fn key(service: &ServiceName, what: &str) -> String {
    format!("/meshd-discovery/v1/{}/{}/{what}", service.namespace(), service.name())
}

fn slices(service: &ServiceName) -> String {
    format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", service.namespace())
}

fn identity(service: &ServiceName) -> String {
    format!("ns/{}/sa/{}", service.namespace(), service.name())
}

fn document(service: &ServiceName) -> String {
    let document = json!({
        "apiVersion": "meshd.dev/v1alpha1", "kind": "MeshService",
        "metadata": { "name": service.name(), "namespace": service.namespace() },
        "spec": { "ports": [{ "port": 80 }] },
    });
    document.to_string()
}

fn registration(service: &ServiceName, endpoint: usize, address: IpAddr) -> meshd_etcd::api::RequestOp {
    let registration = json!({ "address": address, "ports": [{ "port": 80, "target": 80 }] });
    put(key(service, &format!("endpoints/h{endpoint}")), registration.to_string(), 0)
}

#[derive(PartialEq, Eq)]
enum Node {
    New,
    Known,
}

async fn register(
    consul: &mut Http,
    service: &ServiceName,
    endpoint: usize,
    address: IpAddr,
    node_is: Node,
) -> Result<()> {
    let node = json!({
        "Node": format!("n{endpoint}"), "Address": "10.0.0.1", "SkipNodeUpdate": node_is == Node::Known,
        "Service": { "Service": service.name(), "Address": address, "Port": 80,
            "Meta": { "meshd-namespace": service.namespace(), "meshd-transport": "meshd" } },
    });
    consul.must(Method::PUT, "/v1/catalog/register", JSON, node.to_string()).await
}

fn slice(service: &ServiceName, addresses: &[IpAddr]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| json!({ "addresses": [address] })).collect();
    json!({
        "metadata": { "name": service.name(), "labels": { "kubernetes.io/service-name": service.name() },
            "annotations": { "meshd.dev/transport": "meshd", "meshd.dev/identity": identity(service) } },
        "addressType": "IPv4", "ports": [{ "port": 80 }], "endpoints": endpoints,
    })
}
