//! What this host registers: the services that enrol.d says its units serve, and how well they are.

mod check;
mod exec;
mod listening;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use meshd_discovery::{DEFAULT_WEIGHT, Health, HostConfig, Key, Offer, PortTarget, Registrations, ServiceName};
use meshd_identity::SpiffeId;
use meshd_pki_client::Credentials;
use tokio::sync::watch;

use crate::enrol::{Delivery, Enrolment};
use crate::proxy::Shared;
use check::Checks;
use listening::Listening;

/// How soon a unit that stopped listening is registered as unhealthy; one dump of the host's listeners each.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Registers what is served here, for as long as meshd runs.
pub(crate) struct Offering {
    pub(crate) registrations: Arc<Registrations>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) credentials: watch::Receiver<Arc<Credentials>>,
    pub(crate) host: HostConfig,
    /// Where peers reach this host's meshd.
    pub(crate) mesh_port: u16,
}

impl Offering {
    pub(crate) async fn run(&self) {
        let mut checks = Checks::new(self.shared.mark);
        loop {
            let enrolment = self.shared.enrolment.load_full();
            if enrolment.deliveries().iter().any(|delivery| delivery.published.is_some()) {
                checks.turn(&enrolment, Instant::now());
                let (listening, credentials) = (Listening::now(), self.credentials.borrow().clone());
                let is_well = |delivery: &Delivery| {
                    if !credentials.workloads.contains_key(&delivery.owner.identity) {
                        return Err(format!("{} has no certificate now", delivery.owner.identity.short()));
                    }
                    if !listening.reaches(delivery.deliver) {
                        return Err(format!("nobody listens at {}", delivery.deliver));
                    }
                    checks.passes(delivery)
                };
                let offers = offers(&enrolment, &self.host, &credentials.host_id, self.mesh_port, is_well);
                self.registrations.offer(&offers);
            } else {
                self.registrations.offer(&[]);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// One registration for each service and identity, under the host's name. Pure.
fn offers(
    enrolment: &Enrolment,
    host: &HostConfig,
    host_id: &str,
    mesh_port: u16,
    is_well: impl Fn(&Delivery) -> Result<(), String>,
) -> Vec<Offer> {
    let mut groups: BTreeMap<(&ServiceName, &SpiffeId), Vec<&Delivery>> = BTreeMap::new();
    for delivery in enrolment.deliveries().iter().filter(|delivery| delivery.published.is_some()) {
        groups.entry((&delivery.service, &delivery.owner.identity)).or_default().push(delivery);
    }
    let mut named: BTreeSet<ServiceName> = BTreeSet::new();
    let offer = |((service, identity), mut group): ((&ServiceName, &SpiffeId), Vec<&Delivery>)| {
        group.sort_by_key(|delivery| delivery.port);
        let port = |delivery: &&Delivery| PortTarget { port: delivery.port, target: delivery.deliver.port() };
        // A second identity of one service on one host is told apart by its first port.
        let instance = match named.insert(service.clone()) {
            true => host_id.to_owned(),
            false => format!("{host_id}.{}", group[0].port),
        };
        let unwell = group.iter().find_map(|delivery| is_well(delivery).err());
        let published = || group.iter().filter_map(|delivery| delivery.published.as_ref());
        Offer {
            key: Key { service: service.clone(), instance },
            address: host.address,
            mesh_port,
            ports: group.iter().map(port).collect(),
            identity: identity.clone(),
            network: host.network.clone(),
            zone: host.zone.clone(),
            weight: published().find_map(|published| published.weight).unwrap_or(DEFAULT_WEIGHT),
            health: if unwell.is_none() { Health::Healthy } else { Health::Unhealthy },
            unwell,
            version: published().find_map(|published| published.version.clone()).unwrap_or_default(),
        }
    };
    groups.into_iter().map(offer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrol::{Reserved, load};

    const FILE: &str = r#"
[[workload]]
unit = "payments.service"
namespace = "shop"
name = "payments"
serve = [
    { service = "payments.shop", port = 443, deliver = "127.0.0.1:8443", weight = 50 },
    { service = "payments.shop", port = 80, deliver = "127.0.0.1:8080", version = "7" },
    { service = "secret.shop", port = 80, deliver = "127.0.0.1:9", publish = false },
]
[[workload]]
unit = "stats.service"
namespace = "shop"
name = "stats"
serve = [{ service = "payments.shop", port = 9090, deliver = "127.0.0.1:9090" }]
"#;

    fn enrolment(text: &str) -> Result<Enrolment, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.toml"), text).unwrap();
        load(dir.path(), &"demo.example".parse().unwrap(), &Reserved::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn ports_of_one_identity_are_one_registration_and_another_identity_has_its_own() {
        let host = HostConfig { zone: "rack-1".to_owned(), ..HostConfig::default() };
        let found = offers(&enrolment(FILE).unwrap(), &host, "api-1", 15008, |delivery| {
            if delivery.port == 443 { Err("no".to_owned()) } else { Ok(()) }
        });
        let keys: Vec<String> = found.iter().map(|offer| offer.key.to_string()).collect();
        assert_eq!(keys, ["payments.shop as api-1", "payments.shop as api-1.9090"]);
        let ports: Vec<(u16, u16)> = found[0].ports.iter().map(|served| (served.port, served.target)).collect();
        assert_eq!(ports, [(80, 8080), (443, 8443)]);
        assert_eq!((found[0].weight, &*found[0].version, &*found[0].zone), (50, "7", "rack-1"));
        assert_eq!((found[0].health, found[1].health), (Health::Unhealthy, Health::Healthy));
        assert_eq!(found[1].identity.short(), "ns/shop/sa/stats");
    }

    #[test]
    fn one_registration_has_one_weight() {
        let error = enrolment(&FILE.replace("version = \"7\"", "weight = 51")).unwrap_err();
        assert!(error.contains("workload.serve.weight") && error.contains("it is 51 here and 50 at"), "{error}");
    }
}
