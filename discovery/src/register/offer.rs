//! What a host has to say of a service it serves.

use std::fmt;
use std::net::IpAddr;

use meshd_identity::SpiffeId;

use crate::{Health, PortTarget, Registration, ServiceName, Transport};

/// One registration of one host, the same over all its lives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub service: ServiceName,
    /// A plain word, by the host's name.
    pub instance: String,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.service, self.instance)
    }
}

/// A service that this host serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub key: Key,
    /// Absent: the one this host has on the way to the backend.
    pub address: Option<IpAddr>,
    pub mesh_port: u16,
    pub ports: Vec<PortTarget>,
    pub identity: SpiffeId,
    pub network: String,
    pub zone: String,
    pub weight: u32,
    pub health: Health,
    /// Why it is not healthy, for the operator of this host alone.
    pub unwell: Option<String>,
    pub version: String,
}

impl Offer {
    pub(super) fn registration(&self, address: IpAddr, epoch: u64, takes_new: bool) -> Registration {
        Registration {
            address,
            mesh_port: self.mesh_port,
            ports: self.ports.clone(),
            identity: Some(self.identity.to_string()),
            transport: Transport::Meshd,
            network: self.network.clone(),
            zone: self.zone.clone(),
            weight: if takes_new { self.weight } else { 0 },
            health: self.health,
            epoch,
            version: self.version.clone(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fake::trust_domain;

    pub(crate) fn offer() -> Offer {
        Offer {
            key: Key { service: "payments.shop".parse().unwrap(), instance: "api-1".to_owned() },
            address: None,
            mesh_port: 15008,
            ports: vec![PortTarget { port: 80, target: 8080 }],
            identity: SpiffeId::workload(&trust_domain(), "shop", "payments").unwrap(),
            network: String::new(),
            zone: "a".to_owned(),
            weight: 100,
            health: Health::Healthy,
            unwell: None,
            version: "1.2".to_owned(),
        }
    }

    #[test]
    fn what_an_offer_says_is_read_as_the_same_place() {
        let said = offer().registration([10, 0, 0, 1].into(), 7, true);
        let place = Registration::read(&serde_json::to_vec(&said).unwrap(), &trust_domain()).unwrap();
        assert_eq!((place.address, place.epoch, place.weight), ([10, 0, 0, 1].into(), 7, 100));
        assert_eq!((place.identity, place.ports), (Some(offer().identity), offer().ports));
        assert_eq!(offer().registration([10, 0, 0, 1].into(), 7, false).weight, 0);
    }
}
