//! How hosts write down where a service runs, as JSON: the value of a key in etcd or in Consul's store.
//! docs/resources.md is its reference.

use std::net::IpAddr;

use meshd_identity::{SpiffeId, TrustDomain};
use serde::{Deserialize, Serialize};

use crate::documents::{DEFAULT_MESH_PORT, DEFAULT_WEIGHT, MAX_WEIGHT, is_of_a_host, is_plain_word};
use crate::yaml::printable;
use crate::{Health, Place, PortTarget, Transport};

/// A place takes a few hundred bytes; a value this long is no registration.
const MOST_BYTES: usize = 16 * 1024;
/// Ports of one service: so much is built for each place of it.
pub(crate) const MOST_PORTS: usize = 64;

/// Fields that are not known are passed over: a newer meshd may have written them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Registration {
    pub address: IpAddr,
    #[serde(default = "mesh_port")]
    pub mesh_port: u16,
    /// Ports of the service, each with the port of the program.
    pub ports: Vec<PortTarget>,
    /// Short (`ns/shop/sa/payments`) or in full; absent: the only one who may serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    #[serde(default)]
    pub transport: Transport,
    #[serde(default)]
    pub network: String,
    #[serde(default)]
    pub zone: String,
    #[serde(default = "weight")]
    pub weight: u32,
    #[serde(default)]
    pub health: Health,
    /// Grows with each life of the registration.
    #[serde(default)]
    pub epoch: u64,
    /// Of the program, as its operator calls it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
}

fn mesh_port() -> u16 {
    DEFAULT_MESH_PORT
}

fn weight() -> u32 {
    DEFAULT_WEIGHT
}

impl Registration {
    /// The place it names, or all that is wrong with it: `field: reason`.
    pub fn read(text: &[u8], trust_domain: &TrustDomain) -> Result<Place, Vec<String>> {
        if text.len() > MOST_BYTES {
            return Err(vec![format!("it has {} bytes and {MOST_BYTES} are allowed", text.len())]);
        }
        let registration: Registration = serde_json::from_slice(text)
            .map_err(|error| vec![format!("is no registration: {}", printable(&error.to_string()))])?;
        registration.place(trust_domain)
    }

    pub(crate) fn place(self, trust_domain: &TrustDomain) -> Result<Place, Vec<String>> {
        let mut problems = Vec::new();
        let mut refuse = |field: &str, reason: String| problems.push(format!("{field}: {reason}"));
        let address = self.address.to_canonical();
        if !is_of_a_host(address) {
            refuse("address", format!("{address} is not the address of a host; write the one peers dial"));
        }
        if self.ports.is_empty() {
            refuse("ports", "none is named; name each port of the service with the program's".to_owned());
        }
        if self.ports.len() > MOST_PORTS {
            refuse("ports", format!("{} are named and {MOST_PORTS} are allowed", self.ports.len()));
        }
        let twice = |n: usize| self.ports[..n].iter().any(|earlier| earlier.port == self.ports[n].port);
        if let Some(n) = (0..self.ports.len().min(MOST_PORTS)).find(|n| twice(*n)) {
            refuse("ports", format!("port {} is named twice; remove one of them", self.ports[n].port));
        }
        let zero = self.ports.iter().any(|served| served.port == 0 || served.target == 0);
        for (field, _) in [("meshPort", self.mesh_port == 0), ("ports", zero)].into_iter().filter(|(_, zero)| *zero) {
            refuse(field, "0 is no port; write 1 to 65535".to_owned());
        }
        for (field, word) in [("network", &self.network), ("zone", &self.zone)] {
            if !is_plain_word(word) {
                refuse(
                    field,
                    "at most 63 of a-z, A-Z, 0-9, `-`, `_` and `.` are allowed; choose a plain word".to_owned(),
                );
            }
        }
        if self.weight > MAX_WEIGHT {
            refuse("weight", format!("{} is too much; write 0 to {MAX_WEIGHT}", self.weight));
        }
        let identity = match self.identity.as_deref().map(|text| SpiffeId::parse_in(trust_domain, text)) {
            Some(Ok(identity)) if identity.is_system() => {
                refuse("identity", format!("`{}` is a host, which serves nothing; name a workload", identity.short()));
                None
            }
            Some(Err(error)) => {
                refuse("identity", error.to_string());
                None
            }
            Some(Ok(identity)) => Some(identity),
            None => None,
        };
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(Place {
            address,
            mesh_port: self.mesh_port,
            ports: self.ports,
            transport: self.transport,
            identity,
            network: self.network.into(),
            zone: self.zone.into(),
            weight: self.weight,
            health: self.health,
            epoch: self.epoch,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::trust_domain;

    #[test]
    fn the_least_a_registration_needs_is_an_address_and_a_port() {
        let text = br#"{"address":"10.0.0.1","ports":[{"port":80,"target":8080}],"invented":"later"}"#;
        let place = Registration::read(text, &trust_domain()).unwrap();
        let expected = Place { ports: vec![PortTarget { port: 80, target: 8080 }], ..crate::fake::place("10.0.0.1") };
        assert_eq!(place, expected);
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let text =
            br#"{"address":"0.0.0.0","ports":[],"zone":"a b","weight":9999999,"identity":"ns/meshd-system/sa/web"}"#;
        let problems = Registration::read(text, &trust_domain()).unwrap_err();
        for (problem, start) in
            problems.iter().zip(["address: 0.0.0.0", "ports: none", "zone: ", "weight: ", "identity: "])
        {
            assert!(problem.starts_with(start), "{problems:?}");
        }
        assert_eq!(problems.len(), 5);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Registration::read(&bytes, &trust_domain());
        }

        #[test]
        fn what_is_written_is_read(octet in 1u8..250, port in 1u16.., target in 1u16.., epoch in any::<u64>()) {
            let registration = Registration {
                address: [10, 0, 0, octet].into(), mesh_port: 15008, ports: vec![PortTarget { port, target }],
                identity: Some("ns/shop/sa/payments".into()), transport: Transport::Meshd, network: String::new(),
                zone: "a".into(), weight: 7, health: Health::Unhealthy, epoch, version: "1".into(),
            };
            let place = Registration::read(&serde_json::to_vec(&registration).unwrap(), &trust_domain()).unwrap();
            prop_assert_eq!((place.epoch, place.weight, place.ports), (epoch, 7, vec![PortTarget { port, target }]));
        }
    }
}
