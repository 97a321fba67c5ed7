use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_identity::SpiffeId;
use serde::{Deserialize, Serialize};

use crate::ServiceName;

/// What the bytes of a port are declared to be. A declaration wins over detection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Detect,
    Tcp,
    Http,
    Http2,
    Grpc,
    Tls,
}

impl Protocol {
    pub const NAMES: [(&'static str, Protocol); 6] = [
        ("detect", Protocol::Detect),
        ("tcp", Protocol::Tcp),
        ("http", Protocol::Http),
        ("http2", Protocol::Http2),
        ("grpc", Protocol::Grpc),
        ("tls", Protocol::Tls),
    ];
}

/// How an endpoint is reached. A property of its record, never the outcome of a failed dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    #[default]
    Meshd,
    Hbone,
    Plaintext,
}

impl Transport {
    pub const NAMES: [(&'static str, Transport); 3] =
        [("meshd", Transport::Meshd), ("hbone", Transport::Hbone), ("plaintext", Transport::Plaintext)];
}

/// What the source says about an endpoint, as opposed to what dialling it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    #[default]
    Healthy,
    Unhealthy,
}

/// One place that serves one port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub service: ServiceName,
    /// The port of the service, which is what clients ask for.
    pub port: u16,
    /// Where to connect: the mesh listener, or the application itself when `transport` is plaintext.
    pub dial: SocketAddr,
    /// The application's own address and port: the authority of an HBONE CONNECT.
    pub target: SocketAddr,
    pub transport: Transport,
    /// Who must answer there.
    pub identity: SpiffeId,
    pub network: Arc<str>,
    pub zone: Arc<str>,
    pub weight: u32,
    pub health: Health,
    /// The name of the source that said so.
    pub source: Arc<str>,
    /// The precedence of that source; 0 comes first.
    pub rank: u8,
    /// That source may say what the service is.
    pub by_authority: bool,
    /// Its source no longer names it, which is not believed yet (`belief.rs`).
    pub stale: bool,
    /// Fences what an earlier life of the program's registration said; always 0 for files.
    pub epoch: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    pub port: u16,
    pub protocol: Protocol,
}

/// A service and everything that serves it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: ServiceName,
    pub ports: Vec<ServicePort>,
    /// Who may serve it; every endpoint's identity is one of these.
    pub identities: Vec<SpiffeId>,
    pub allow_plaintext: bool,
    /// Stable addresses that programs know the service by, on its own ports; what a ClusterIP is.
    pub addresses: Vec<IpAddr>,
    pub source: Arc<str>,
    pub endpoints: Vec<Arc<Endpoint>>,
}

impl Service {
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|candidate| candidate.port == port)
    }

    /// Where programs that know nothing of the mesh reach a port of it: raw addresses. A registration does not decide
    /// what is captured.
    pub fn raw_addresses(&self) -> impl Iterator<Item = (SocketAddr, u16)> {
        let endpoints = self
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.by_authority)
            .map(|endpoint| (endpoint.target, endpoint.port));
        let stable = self
            .addresses
            .iter()
            .flat_map(|address| self.ports.iter().map(|port| (SocketAddr::new(*address, port.port), port.port)));
        stable.chain(endpoints)
    }

    pub fn endpoints_on(&self, port: u16) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.endpoints.iter().filter(move |endpoint| endpoint.port == port)
    }

    /// The same service, with endpoints that did not change since `old` kept as the very same allocation, so that
    /// whoever holds state per endpoint sees which are new.
    pub(crate) fn keeping_endpoints_of(&self, old: &Service) -> Service {
        let keep = |new: &Arc<Endpoint>| old.endpoints.iter().find(|known| *known == new).unwrap_or(new).clone();
        Service { endpoints: self.endpoints.iter().map(keep).collect(), ..self.clone() }
    }
}
