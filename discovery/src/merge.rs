//! What all sources say of one service becomes one service. Pure.

use std::collections::hash_map::Entry as Slot;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_identity::{SpiffeId, TrustDomain};

use crate::held::{Entry, Held};
use crate::registration::MOST_PORTS;
use crate::{Definition, Endpoint, Namespaces, Place, Protocol, Service, ServiceName, ServicePort, Transport};

/// One source's contribution; layers are given in order of precedence, first wins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) source: &'a Arc<str>,
    /// Where it may say what a service is.
    pub(crate) authority: &'a Namespaces,
    /// Where it may say that a service runs.
    pub(crate) endpoints: &'a Namespaces,
    pub(crate) held: &'a Held,
}

impl Layer<'_> {
    /// It does not define the service, or it was read.
    fn has_its_say(&self, name: &ServiceName) -> bool {
        !self.authority.covers(name.namespace()) || self.held.has_read(name)
    }
}

/// What became of what one source says of one service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Part {
    /// It says what the service is, and holds.
    pub(crate) defines: bool,
    /// It says what the service is, and a source of higher precedence holds.
    pub(crate) shadowed: bool,
    pub(crate) endpoints: usize,
    /// Full messages.
    pub(crate) refused: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Merged {
    pub(crate) service: Option<Arc<Service>>,
    /// One for each layer.
    pub(crate) parts: Vec<Part>,
}

/// The definition is that of the first layer that has one and authority for the namespace. Endpoints are those of all
/// layers, as far as the definition lets them serve; of a place that two name, the first. A service that nobody
/// defines has its default identity and the ports its places name. What equals `previous` keeps its allocation.
pub(crate) fn merge(
    name: &ServiceName,
    trust_domain: &TrustDomain,
    previous: Option<&Arc<Service>>,
    layers: &[Layer<'_>],
) -> Merged {
    let mut parts = vec![Part::default(); layers.len()];
    let defined = define(name, layers, &mut parts);
    let (definition, source) = match defined {
        Some(found) => found,
        // Who has not been read yet may define it.
        None if !layers.iter().all(|layer| layer.has_its_say(name)) => return Merged { service: None, parts },
        None => match implied(name, trust_domain, layers) {
            Some(found) => found,
            None => {
                explain_undefined(name, layers, &mut parts);
                return Merged { service: None, parts };
            }
        },
    };
    let mut service = Service {
        name: name.clone(),
        ports: definition.ports.clone(),
        identities: who_may_serve(&definition, name, trust_domain),
        allow_plaintext: definition.allow_plaintext,
        addresses: definition.addresses.clone(),
        source,
        endpoints: Vec::new(),
    };
    let mut seen = Seen::new();
    for (rank, (layer, part)) in layers.iter().zip(&mut parts).enumerate() {
        add_endpoints(&mut service, rank, layer, part, &mut seen);
    }
    Merged { service: Some(reuse(previous, service)), parts }
}

fn define(name: &ServiceName, layers: &[Layer<'_>], parts: &mut [Part]) -> Option<(Arc<Definition>, Arc<str>)> {
    let mut found: Option<(Arc<Definition>, Arc<str>)> = None;
    for (layer, part) in layers.iter().zip(parts) {
        let mut origin: Option<&Arc<str>> = None;
        for entry in layer.held.of(name) {
            let Some(definition) = entry.definition() else { continue };
            if !layer.authority.covers(name.namespace()) {
                part.refused.push(no_authority(layer.source, name, &entry.record.origin));
            } else if let Some(first) = origin {
                part.refused.push(duplicate(&entry.record.origin, name, first));
            } else if found.is_some() {
                part.shadowed = true;
            } else {
                found = Some((definition.clone(), layer.source.clone()));
                (origin, part.defines) = (Some(&entry.record.origin), true);
            }
        }
    }
    found
}

fn who_may_serve(definition: &Definition, name: &ServiceName, trust_domain: &TrustDomain) -> Vec<SpiffeId> {
    if !definition.identities.is_empty() {
        return definition.identities.clone();
    }
    let default = SpiffeId::workload(trust_domain, name.namespace(), name.name()).ok();
    default.into_iter().filter(|identity| !identity.is_system()).collect()
}

/// A service that runs somewhere and that nobody describes: who may serve it is not up to the source then.
fn implied(
    name: &ServiceName,
    trust_domain: &TrustDomain,
    layers: &[Layer<'_>],
) -> Option<(Arc<Definition>, Arc<str>)> {
    let (mut ports, mut source): (Vec<ServicePort>, Option<Arc<str>>) = (Vec::new(), None);
    for layer in layers.iter().filter(|layer| layer.endpoints.covers(name.namespace())) {
        for (place, _) in layer.held.of(name).filter(|entry| entry.definition().is_none()).flat_map(places) {
            for served in &place.ports {
                source.get_or_insert_with(|| layer.source.clone());
                if ports.len() < MOST_PORTS && !ports.iter().any(|port| port.port == served.port) {
                    ports.push(ServicePort { port: served.port, protocol: Protocol::default() });
                }
            }
        }
    }
    ports.sort_by_key(|port| port.port);
    let identity = SpiffeId::workload(trust_domain, name.namespace(), name.name()).ok()?;
    if identity.is_system() {
        return None;
    }
    let definition = Definition { ports, identities: vec![identity], allow_plaintext: false, addresses: Vec::new() };
    Some((Arc::new(definition), source?))
}

/// Says of every layer that names places why nobody uses them.
fn explain_undefined(name: &ServiceName, layers: &[Layer<'_>], parts: &mut [Part]) {
    for (layer, part) in layers.iter().zip(parts) {
        let may = layer.endpoints.covers(name.namespace());
        for entry in layer.held.of(name).filter(|entry| entry.definition().is_none()) {
            part.refused.push(match may {
                false => no_endpoints(layer.source, name, &entry.record.origin),
                true => format!(
                    "{}: service {name} is defined nowhere, and no port is named here; add a MeshService document to a \
                     source with authority for `{}`, or name the ports",
                    entry.record.origin,
                    name.namespace()
                ),
            });
        }
    }
}

/// The places of a record, those it is doubted to have lost last.
fn places(entry: &Entry) -> impl Iterator<Item = (&Arc<Place>, bool)> {
    let live = entry.record.places.iter().map(|place| (place, false));
    live.chain(entry.stale.iter().map(|(place, _)| (place, true)))
}

/// Which endpoint stands for a place.
type Seen = HashMap<(u16, SocketAddr, SocketAddr, SpiffeId), usize>;

/// Each reason with the first place it holds for, and for how many: a thousand may be wrong in the same way.
type RefusedPlaces = BTreeMap<String, (IpAddr, usize)>;

fn add_endpoints(service: &mut Service, rank: usize, layer: &Layer<'_>, part: &mut Part, seen: &mut Seen) {
    let may = layer.endpoints.covers(service.name.namespace());
    let may_define = layer.authority.covers(service.name.namespace());
    let name = service.name.clone();
    for entry in layer.held.of(&name) {
        // Places inside a document are as much as its definition; without authority it was refused as a whole.
        if entry.definition().is_some() && !may_define {
            continue;
        }
        if entry.definition().is_none() && !may {
            part.refused.push(no_endpoints(layer.source, &name, &entry.record.origin));
            continue;
        }
        let mut refused = RefusedPlaces::new();
        for (place, stale) in places(entry) {
            match check(place, service, may_define) {
                Ok(identity) => part.endpoints += add_place(service, place, identity, stale, rank, layer, seen),
                Err(reason) => refused.entry(reason).or_insert((place.address, 0)).1 += 1,
            }
        }
        part.refused.extend(refused.into_iter().map(|(reason, (first, number))| {
            let others = if number > 1 { format!(" and {} more", number - 1) } else { String::new() };
            format!("{}: {first}{others}: {reason}", entry.record.origin)
        }));
    }
}

/// Who answers at a place, if it may serve. Plaintext proves nobody's identity, so it takes more than a registration.
fn check(place: &Place, service: &Service, by_authority: bool) -> Result<SpiffeId, String> {
    if place.transport == Transport::Plaintext && !by_authority {
        return Err(format!(
            "plaintext is taken only from a source with authority for `{}`, because nobody proves who answers there",
            service.name.namespace()
        ));
    }
    if place.transport == Transport::Plaintext && !service.allow_plaintext {
        return Err(format!(
            "plaintext is not allowed for {}; set `spec.allowPlaintext: true` in its MeshService (on a Kubernetes Service: \
             annotation `meshd.dev/allow-plaintext: \"true\"`) if traffic may go unencrypted and unauthenticated",
            service.name
        ));
    }
    let allowed = || service.identities.iter().map(|id| format!("`{}`", id.as_str())).collect::<Vec<_>>().join(", ");
    match (&place.identity, service.identities.as_slice()) {
        (Some(identity), identities) if identities.contains(identity) => Ok(identity.clone()),
        (Some(identity), _) => Err(format!(
            "`{}` may not serve {}; use one of {}, or add it to spec.identities of its MeshService",
            identity.as_str(),
            service.name,
            allowed()
        )),
        (None, [only]) => Ok(only.clone()),
        (None, _) => Err(format!(
            "no identity is named, and {} has several; say which one answers here: {}",
            service.name,
            allowed()
        )),
    }
}

fn add_place(
    service: &mut Service,
    place: &Place,
    identity: SpiffeId,
    stale: bool,
    rank: usize,
    layer: &Layer<'_>,
    seen: &mut Seen,
) -> usize {
    let before = service.endpoints.len();
    for ServicePort { port, .. } in &service.ports {
        let target = match place.ports.as_slice() {
            [] => *port,
            ports => match ports.iter().find(|served| served.port == *port) {
                Some(served) => served.target,
                None => continue,
            },
        };
        let target = SocketAddr::new(place.address, target);
        let dial = match place.transport {
            Transport::Plaintext => target,
            Transport::Meshd | Transport::Hbone => SocketAddr::new(place.address, place.mesh_port),
        };
        let endpoint = Endpoint {
            service: service.name.clone(),
            port: *port,
            dial,
            target,
            transport: place.transport,
            identity: identity.clone(),
            network: place.network.clone(),
            zone: place.zone.clone(),
            weight: place.weight,
            health: place.health,
            source: layer.source.clone(),
            rank: rank as u8,
            by_authority: layer.authority.covers(service.name.namespace()),
            stale,
            epoch: place.epoch,
        };
        match seen.entry((*port, dial, target, identity.clone())) {
            Slot::Vacant(free) => {
                free.insert(service.endpoints.len());
                service.endpoints.push(Arc::new(endpoint));
            }
            Slot::Occupied(known) => {
                let known = &mut service.endpoints[*known.get()];
                let later_life = known.rank == rank as u8 && known.stale == stale && known.epoch < place.epoch;
                // What a source is sure of holds against what another one, or an earlier life of it, is not. The place
                // keeps its rank: it did not get worse by being vouched for.
                if (known.stale && !stale) || later_life {
                    *known = Arc::new(Endpoint { rank: known.rank, ..endpoint });
                }
            }
        }
    }
    service.endpoints.len() - before
}

fn no_authority(source: &str, name: &ServiceName, origin: &str) -> String {
    let namespace = name.namespace();
    format!(
        "{origin}: metadata.namespace: source `{source}` has no authority for namespace `{namespace}`, so service \
         `{name}` is not believed; add \"{namespace}\" to `authority` of the [[source]] named \"{source}\" in meshd.toml, \
         or remove the document"
    )
}

fn no_endpoints(source: &str, name: &ServiceName, origin: &str) -> String {
    let namespace = name.namespace();
    format!(
        "{origin}: source `{source}` provides no endpoints for namespace `{namespace}`, so what it says of `{name}` is not \
         used; add \"{namespace}\" to `provides.endpoints` of the [[source]] named \"{source}\" in meshd.toml"
    )
}

pub(crate) fn duplicate(origin: &str, service: &ServiceName, first: &str) -> String {
    format!("{origin}: metadata.name: service {service} is already defined at {first}, which holds; remove one of them")
}

fn reuse(old: Option<&Arc<Service>>, new: Service) -> Arc<Service> {
    match old {
        None => Arc::new(new),
        Some(old) if **old == new => old.clone(),
        Some(old) => Arc::new(new.keeping_endpoints_of(old)),
    }
}

#[cfg(test)]
#[path = "merge_tests.rs"]
pub(crate) mod tests;
