//! A source that says what a test tells it to, and services to say.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_identity::{SpiffeId, TrustDomain};
use tokio::sync::mpsc;

use crate::config::Configured;
use crate::{
    Authority, DEFAULT_MESH_PORT, Endpoint, Health, Offer, Protocol, Service, ServiceName, ServicePort, Sink, Source,
    SourceEvent, SourceFuture, Transport,
};

pub const TRUST_DOMAIN: &str = "example.org";

pub fn trust_domain() -> TrustDomain {
    TRUST_DOMAIN.parse().expect("a constant")
}

/// A scripted source with authority over everything. It ends when its script is dropped.
pub fn source(name: &str) -> (Script, Configured) {
    let (events, inbox) = mpsc::channel(16);
    let source = Box::new(Scripted { name: name.to_owned(), inbox });
    (Script { events }, Configured { source, authority: Authority::everything() })
}

pub struct Script {
    events: mpsc::Sender<SourceEvent>,
}

impl Script {
    pub async fn send(&self, event: SourceEvent) {
        self.events.send(event).await.expect("the watcher runs");
    }

    /// Everything the source offers from now on.
    pub async fn publish(&self, services: impl IntoIterator<Item = Arc<Service>>) {
        let offer = |service: Arc<Service>| Offer { origin: format!("fake/{}", service.name).into(), service };
        self.send(SourceEvent::Snapshot { offers: services.into_iter().map(offer).collect(), problems: vec![] }).await;
    }

    pub async fn fail(&self, error: &str) {
        self.send(SourceEvent::Unavailable { error: error.to_owned() }).await;
    }
}

struct Scripted {
    name: String,
    inbox: mpsc::Receiver<SourceEvent>,
}

impl Source for Scripted {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> &'static str {
        "fake"
    }

    fn watch(mut self: Box<Self>, sink: Sink) -> SourceFuture {
        Box::pin(async move {
            while let Some(event) = self.inbox.recv().await {
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
            network: String::new(),
            zone: String::new(),
            weight: 100,
            health: Health::Healthy,
            source: source.into(),
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
