//! What a source says, in the form all sources share.

use std::net::IpAddr;
use std::sync::Arc;

use meshd_identity::SpiffeId;
use serde::{Deserialize, Serialize};

use crate::{Health, ServiceName, ServicePort, Transport};

/// Something a source says about one service, under a key of its own: a document, a registration, an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Unique within the source, and the same for as long as the thing exists.
    pub key: Arc<str>,
    /// Where to look for it, in messages: `payments.yaml:3`, or a key in a remote store.
    pub origin: Arc<str>,
    pub service: ServiceName,
    /// Only a document has one, and it is believed only of a source with authority for the namespace.
    pub definition: Option<Arc<Definition>>,
    pub places: Vec<Arc<Place>>,
}

/// What a service is, as opposed to where it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    pub ports: Vec<ServicePort>,
    /// Who may serve it. Empty: the source does not know now; those it knew before, else the one of the service's name.
    pub identities: Vec<SpiffeId>,
    pub allow_plaintext: bool,
    /// Stable addresses that programs know the service by, on its own ports; what a ClusterIP is.
    pub addresses: Vec<IpAddr>,
}

/// Where a service runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    pub address: IpAddr,
    pub mesh_port: u16,
    /// Which ports of the service it serves, each with the port of the program; empty: all, on the same numbers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortTarget>,
    pub transport: Transport,
    /// Who answers; `None`: the only one who may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<SpiffeId>,
    pub network: Arc<str>,
    pub zone: Arc<str>,
    pub weight: u32,
    pub health: Health,
    /// Of the life of a registration; fences what an earlier one said.
    pub epoch: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortTarget {
    pub port: u16,
    pub target: u16,
}

impl Place {
    /// The same program at the same address, whatever else is said of it.
    pub(crate) fn is_same_as(&self, other: &Place) -> bool {
        self.address == other.address
            && self.mesh_port == other.mesh_port
            && self.transport == other.transport
            && self.identity == other.identity
            && self.ports == other.ports
    }
}
