//! The domains we answer for, and which service a name in them means.

use hickory_proto::rr::rdata::SOA;
use hickory_proto::rr::{Name, RData, Record};
use meshd_discovery::{Directory, ServiceName};
use serde::Deserialize;

/// Seconds a "no such name" may be remembered: a service appears within this time.
pub(super) const NEGATIVE_TTL: u32 = 5;
/// Two labels of 63 bytes and their lengths must fit in front of it.
const MAX_ZONE: usize = 253 - 2 * 64;
/// Where Kubernetes has its services: `<service>.<namespace>.svc.<domain>`.
const KUBERNETES_SERVICES: &str = "svc";

/// A domain, for example `mesh`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct Zone {
    name: Name,
    soa: Record,
}

/// Without the root's dot, as people write it.
impl std::fmt::Display for Zone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name.to_ascii().trim_end_matches('.'))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    #[error("`{0}` is not a domain; use DNS labels of a-z, 0-9 and `-`, separated by dots, for example `mesh`")]
    Label(String),
    #[error("`{0}` is too long; service names must fit in front of it, so it may have {MAX_ZONE} bytes")]
    Long(String),
}

impl Zone {
    pub fn new(domain: &str) -> Result<Zone, ZoneError> {
        let bare = domain.strip_suffix('.').unwrap_or(domain);
        let shown = || domain.chars().take(260).flat_map(char::escape_debug).collect::<String>();
        if bare.len() > MAX_ZONE {
            return Err(ZoneError::Long(shown()));
        }
        let wrong = |_| ZoneError::Label(shown());
        if !bare.split('.').all(is_label) {
            return Err(ZoneError::Label(shown()));
        }
        let name = Name::from_ascii(format!("{bare}.")).map_err(wrong)?;
        let (server, mailbox) =
            (name.prepend_label("ns").map_err(wrong)?, name.prepend_label("hostmaster").map_err(wrong)?);
        // Nobody transfers this zone, so serial and timers mean nothing; MINIMUM is the negative TTL.
        let soa = SOA::new(server, mailbox, 1, 3600, 600, 86_400, NEGATIVE_TTL);
        let soa = Record::from_rdata(name.clone(), NEGATIVE_TTL, RData::SOA(soa));
        Ok(Zone { name, soa })
    }

    pub(super) fn soa(&self) -> &Record {
        &self.soa
    }

    /// The labels in front of the zone's own, or None for a name outside it.
    fn inside<'n>(&self, name: &'n Name) -> Option<Vec<&'n [u8]>> {
        let mut labels: Vec<&[u8]> = name.iter().collect();
        let inner = labels.len().checked_sub(self.name.iter().count())?;
        let ours = labels[inner..].iter().zip(self.name.iter()).all(|(theirs, ours)| theirs.eq_ignore_ascii_case(ours));
        labels.truncate(inner);
        ours.then_some(labels)
    }
}

fn is_label(label: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&label.len()) && label.bytes().all(allowed) && !label.starts_with('-') && !label.ends_with('-')
}

impl TryFrom<String> for Zone {
    type Error = ZoneError;

    fn try_from(domain: String) -> Result<Zone, ZoneError> {
        Zone::new(&domain)
    }
}

/// All our zones.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Zones {
    /// `payments.shop.mesh`.
    pub(super) mesh: Zone,
    /// `payments.shop.svc.cluster.local`.
    pub(super) kubernetes: Option<Zone>,
}

/// What the directory says about a name.
#[derive(Debug, PartialEq)]
pub(super) enum Place<'z> {
    Service(&'z Zone, ServiceName),
    Apex(&'z Zone),
    /// A namespace or `svc`: nothing to tell about it, but names below exist, and "no such name" would deny those too.
    Between(&'z Zone),
    /// The mesh domain is ours alone. The service of such a name, if it has the form of one.
    Nowhere(&'z Zone, Option<ServiceName>),
    /// The Kubernetes domain is shared with the cluster's own DNS: it may know more.
    NotKnownHere(&'z Zone, Option<ServiceName>),
    Outside,
}

impl Zones {
    pub(super) fn place<'z>(&'z self, name: &Name, directory: &Directory) -> Place<'z> {
        let mesh = self.mesh.inside(name).map(|labels| mesh_place(&self.mesh, &labels, directory));
        let shared = self.kubernetes.as_ref();
        let shared = shared.and_then(|zone| Some(kubernetes_place(zone, &zone.inside(name)?, directory)));
        match (mesh, shared) {
            // One inside the other: the deeper one was meant.
            (Some(mesh), Some(shared)) => {
                let depth = |zone: &Zone| zone.name.iter().count();
                let mesh_is_deeper = self.kubernetes.as_ref().is_some_and(|zone| depth(&self.mesh) > depth(zone));
                if mesh_is_deeper { mesh } else { shared }
            }
            (Some(place), None) | (None, Some(place)) => place,
            (None, None) => Place::Outside,
        }
    }
}

fn mesh_place<'z>(zone: &'z Zone, labels: &[&[u8]], directory: &Directory) -> Place<'z> {
    match labels {
        [] => Place::Apex(zone),
        labels => known(zone, labels, directory).unwrap_or_else(|| Place::Nowhere(zone, service(labels))),
    }
}

fn kubernetes_place<'z>(zone: &'z Zone, labels: &[&[u8]], directory: &Directory) -> Place<'z> {
    match labels {
        [] => Place::Apex(zone),
        [inner @ .., last] if last.eq_ignore_ascii_case(KUBERNETES_SERVICES.as_bytes()) => match inner {
            [] => Place::Between(zone),
            inner => known(zone, inner, directory).unwrap_or_else(|| Place::NotKnownHere(zone, service(inner))),
        },
        _ => Place::NotKnownHere(zone, None),
    }
}

fn known<'z>(zone: &'z Zone, labels: &[&[u8]], directory: &Directory) -> Option<Place<'z>> {
    match labels {
        [namespace] => directory.has_namespace(&text(namespace)?).then_some(Place::Between(zone)),
        labels => {
            service(labels).filter(|service| directory.get(service).is_some()).map(|name| Place::Service(zone, name))
        }
    }
}

fn service(labels: &[&[u8]]) -> Option<ServiceName> {
    let [name, namespace] = labels else { return None };
    ServiceName::new(&text(name)?, &text(namespace)?).ok()
}

/// Whether there may be services below such a name.
pub(super) fn may_be_a_namespace(zone: &Zone, name: &Name) -> bool {
    let labels = zone.inside(name);
    let is_one = |labels: &Vec<&[u8]>| labels.len() == 1 && text(labels[0]).is_some_and(|label| is_label(&label));
    labels.is_some_and(|labels| is_one(&labels))
}

fn text(label: &[u8]) -> Option<String> {
    String::from_utf8(label.to_ascii_lowercase()).ok()
}

impl Zones {
    /// What a resolver has to send to us, as routing domains: `mesh`, `svc.cluster.local`.
    pub(super) fn routed(&self) -> Vec<String> {
        let kubernetes = self.kubernetes.iter().map(|zone| format!("{KUBERNETES_SERVICES}.{zone}"));
        std::iter::once(self.mesh.to_string()).chain(kubernetes).collect()
    }
}
