//! A source that says what a test tells it to, and services to say.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use meshd_identity::{SpiffeId, TrustDomain};
use tokio::sync::{mpsc, oneshot, watch};

use crate::config::Configured;
use crate::{
    Belief, DEFAULT_MESH_PORT, Definition, Endpoint, Epoch, Health, Listing, Namespaces, Place, Protocol, Provides,
    Record, Scope, Service, ServiceName, ServicePort, Sink, Source, SourceEvent, SourceFuture, Transport, Wanted,
};

pub const TRUST_DOMAIN: &str = "example.org";

pub fn trust_domain() -> TrustDomain {
    TRUST_DOMAIN.parse().expect("a constant")
}

/// A scripted source with authority over everything, believed at once. It ends when its script is dropped.
pub fn source(name: &str) -> (Script, Configured) {
    source_of_resources(name, &[])
}

/// The same, which says routes and policies below these prefixes as well.
pub fn source_of_resources(name: &str, prefixes: &[&str]) -> (Script, Configured) {
    let (events, inbox) = mpsc::channel(16);
    let (tell, wanted) = oneshot::channel();
    let source = Box::new(Scripted {
        name: name.to_owned(),
        prefixes: prefixes.iter().map(|prefix| Arc::from(*prefix)).collect(),
        inbox: Arc::new(tokio::sync::Mutex::new(inbox)),
        tell: Mutex::new(Some(tell)),
    });
    let authority = Namespaces::everything();
    (
        Script { events, wanted: Mutex::new(Some(wanted)) },
        Configured { source, authority, provides: Provides::everything(), belief: Belief::Always, registrar: None },
    )
}

pub struct Script {
    events: mpsc::Sender<SourceEvent>,
    wanted: Mutex<Option<oneshot::Receiver<watch::Receiver<Wanted>>>>,
}

impl Script {
    pub async fn send(&self, event: SourceEvent) {
        self.events.send(event).await.expect("the watcher runs");
    }

    /// Everything the source says from now on.
    pub async fn publish(&self, records: impl IntoIterator<Item = Record>) {
        let records = records.into_iter().collect();
        let (scope, epoch) = (Scope::Everything, Epoch::default());
        self.send(SourceEvent::Listed(Listing { scope, epoch, records, refused: vec![] })).await;
    }

    /// What the source is asked for, once.
    pub async fn wanted(&self) -> watch::Receiver<Wanted> {
        let told = self.wanted.lock().expect("no test panics with it").take().expect("asked once");
        told.await.expect("the watcher runs")
    }

    pub async fn fail(&self, error: &str) {
        self.send(SourceEvent::Unavailable { error: error.to_owned() }).await;
    }
}

struct Scripted {
    name: String,
    prefixes: Vec<Arc<str>>,
    inbox: Arc<tokio::sync::Mutex<mpsc::Receiver<SourceEvent>>>,
    tell: Mutex<Option<oneshot::Sender<watch::Receiver<Wanted>>>>,
}

impl Source for Scripted {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "fake"
    }

    fn resource_prefixes(&self) -> Vec<Arc<str>> {
        self.prefixes.clone()
    }

    fn watch(&self, wanted: watch::Receiver<Wanted>, sink: Sink) -> SourceFuture {
        if let Some(tell) = self.tell.lock().expect("no test panics with it").take() {
            // Most scripts do not care.
            let _ = tell.send(wanted);
        }
        let inbox = self.inbox.clone();
        Box::pin(async move {
            let mut inbox = inbox.lock().await;
            while let Some(event) = inbox.recv().await {
                sink.send(event).await;
            }
        })
    }
}

/// A service on port 80 with its default identity, and one meshd endpoint per address (`ip` or `ip:port`).
pub fn service(name: &str, source: &str, addresses: &[&str]) -> Arc<Service> {
    let name: ServiceName = name.parse().expect("a service name");
    let identity = SpiffeId::workload(&trust_domain(), name.namespace(), name.name()).expect("a service name is valid");
    let endpoint = |address: &&str| {
        let dial = address.parse().or_else(|_| address.parse::<IpAddr>().map(|ip| (ip, DEFAULT_MESH_PORT).into()));
        let dial: SocketAddr = dial.expect("an address");
        Arc::new(Endpoint {
            service: name.clone(),
            port: 80,
            dial,
            target: (dial.ip(), 80).into(),
            transport: Transport::Meshd,
            identity: identity.clone(),
            network: "".into(),
            zone: "".into(),
            weight: 100,
            health: Health::Healthy,
            source: source.into(),
            rank: 0,
            by_authority: true,
            stale: false,
            epoch: 0,
        })
    };
    Arc::new(Service {
        ports: vec![ServicePort { port: 80, protocol: Protocol::Detect }],
        identities: vec![identity.clone()],
        allow_plaintext: false,
        addresses: vec![],
        source: source.into(),
        endpoints: addresses.iter().map(endpoint).collect(),
        name: name.clone(),
    })
}

/// A document that defines a service on port 80, with a place on the default mesh port per address.
pub fn record(name: &str, addresses: &[&str]) -> Record {
    let service: ServiceName = name.parse().expect("a service name");
    let identity =
        SpiffeId::workload(&trust_domain(), service.namespace(), service.name()).expect("a service name is valid");
    let definition = Definition {
        ports: vec![ServicePort { port: 80, protocol: Protocol::Detect }],
        identities: vec![identity],
        allow_plaintext: false,
        addresses: vec![],
    };
    Record {
        key: name.into(),
        origin: format!("fake/{name}").into(),
        service,
        definition: Some(Arc::new(definition)),
        places: addresses.iter().map(|address| Arc::new(place(address))).collect(),
    }
}

pub fn place(address: &str) -> Place {
    Place {
        address: address.parse().expect("an address"),
        mesh_port: DEFAULT_MESH_PORT,
        ports: vec![],
        transport: Transport::Meshd,
        identity: None,
        network: "".into(),
        zone: "".into(),
        weight: 100,
        health: Health::Healthy,
        epoch: 0,
    }
}

/// What a source says under a key, out of documents.
pub fn resources(key: &str, text: &str) -> crate::resources::ResourceRecord {
    let mut resources = Vec::new();
    for document in crate::resources::read(text, &trust_domain()) {
        if let Ok(crate::resources::Said::Resources(said)) = document.outcome {
            resources.extend(said);
        }
    }
    crate::resources::ResourceRecord { key: key.into(), origin: key.into(), resources }
}

/// A policy that allows a workload a service: the same name for both.
pub fn allowing(service: &str, policy: &str) -> String {
    let name: ServiceName = service.parse().expect("a service of a test");
    let (name, namespace) = (name.name(), name.namespace());
    format!(
        "apiVersion: meshd.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{ name: {policy}, namespace: {namespace} \
         }}\nspec: {{ targetRef: {{ kind: Service, name: {name} }}, rules: [ {{ from: [ {{ namespaces: [ {policy} ] }} ] }} ] }}\n"
    )
}
