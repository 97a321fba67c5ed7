//! WHERE to: from the address the application dialled to the service that owns it. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_discovery::{Directory, Protocol, Service, ServiceName};

use crate::dns::Vips;
use crate::fault::Fault;

/// The service meant, and its port.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub service: Arc<Service>,
    pub port: u16,
    pub protocol: Protocol,
}

pub(super) fn service(
    directory: &Directory,
    vips: &Vips,
    raw: &RawPlaces,
    original: SocketAddr,
) -> Result<Place, Fault> {
    let virtual_ip = vips.service_of(original.ip()).map(|name| (name, original.port()));
    let (name, port) = virtual_ip.or_else(|| raw.0.get(&original).cloned()).ok_or(Fault::NoService)?;
    let service = directory.get(&name).ok_or(Fault::NoService)?;
    let port = service.port(port).ok_or(Fault::NoService)?;
    Ok(Place { service: service.clone(), port: port.port, protocol: port.protocol })
}

/// Raw addresses that are captured, and the service and port each one means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawPlaces(BTreeMap<SocketAddr, (ServiceName, u16)>);

/// Never captured: SSH must work whatever a document says.
const SSH: u16 = 22;

impl RawPlaces {
    /// Those of the services named in `[capture] raw`, and what an operator should know about them.
    pub fn of(directory: &Directory, raw: &BTreeSet<ServiceName>) -> (RawPlaces, Vec<String>) {
        let (mut places, mut problems) = (BTreeMap::new(), Vec::new());
        for name in raw {
            let Some(service) = directory.get(name) else {
                problems.push(format!("[capture] raw names {name}, which no source defines"));
                continue;
            };
            for (address, port) in service.raw_addresses() {
                if address.port() == SSH || !may_be_captured(address.ip()) {
                    problems.push(format!("{address} of {name} is never captured: SSH, loopback or link-local"));
                    continue;
                }
                let place = (name.clone(), port);
                let first = places.entry(address).or_insert_with(|| place.clone());
                if *first != place {
                    let (first, port) = &*first;
                    problems.push(format!("{address} of {name} is taken for {first}:{port}, which has it, too"));
                }
            }
        }
        (RawPlaces(places), problems)
    }

    pub fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.0.keys().copied().collect()
    }

    /// Those of `earlier` as well: connections the kernel captured a moment ago are still on their way here.
    pub fn and(&self, earlier: &RawPlaces) -> RawPlaces {
        let mut both = earlier.clone();
        both.0.extend(self.0.clone());
        both
    }
}

/// Link-local includes the metadata services of clouds.
fn may_be_captured(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use meshd_discovery::fake;

    use super::*;

    fn places(services: &[(&str, &[&str])], raw: &[&str]) -> (RawPlaces, Vec<String>) {
        let services = services.iter().map(|(name, addresses)| fake::service(name, "files", addresses));
        RawPlaces::of(&Directory::from_services(services), &raw.iter().map(|name| name.parse().unwrap()).collect())
    }

    #[test]
    fn only_services_that_are_named_have_raw_places() {
        let (places, problems) = places(&[("a.shop", &["10.0.0.1"]), ("b.shop", &["10.0.0.2"])], &["a.shop", "c.shop"]);
        assert_eq!(places.addresses(), ["10.0.0.1:80".parse().unwrap()].into());
        assert!(problems[0].contains("c.shop, which no source defines"), "{problems:?}");
    }

    #[test]
    fn an_address_of_two_services_is_the_firsts() {
        let both: &[(&str, &[&str])] = &[("b.shop", &["10.0.0.1"]), ("a.shop", &["10.0.0.1"])];
        let (places, problems) = places(both, &["b.shop", "a.shop"]);
        assert_eq!(places.0[&"10.0.0.1:80".parse().unwrap()].0.as_str(), "a.shop");
        assert_eq!(problems, ["10.0.0.1:80 of b.shop is taken for a.shop:80, which has it, too"]);
    }

    #[test]
    fn loopback_and_metadata_services_have_no_raw_places() {
        let (places, problems) =
            places(&[("a.shop", &["127.0.0.1", "169.254.169.254", "fe80::1", "::1"])], &["a.shop"]);
        assert_eq!((places, problems.len()), (RawPlaces::default(), 4));
    }

    #[test]
    fn what_was_captured_before_a_change_still_has_a_place() {
        let (before, _) = places(&[("a.shop", &["10.0.0.1"])], &["a.shop"]);
        let (after, _) = places(&[("a.shop", &["10.0.0.2"])], &["a.shop"]);
        assert_eq!(after.and(&before).addresses().len(), 2);
    }
}
