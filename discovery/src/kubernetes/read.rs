//! What Services, their slices and the pods behind them say, in the words of discovery. Pure; docs/resources.md is its
//! reference.
//!
//! A Service is the definition, with authority for its namespace; each of its slices is a record of places. A pod answers
//! as its service account, in the way Istio's own rule says; anything else as the slice's annotations say.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use meshd_identity::{SYSTEM_NAMESPACE, SpiffeId, TrustDomain};

use super::kept::keeper;
use super::leases::Keeper;
use super::objects::{Mesh, NOTES, Notes, Pod, Service, Slice, SliceEndpoint, State};
use crate::documents::{self, DEFAULT_MESH_PORT, DEFAULT_WEIGHT, is_plain_word};
use crate::registration::MOST_PORTS;
use crate::yaml::printable;
use crate::{
    Change, Definition, Health, Namespaces, Place, PortTarget, Record, Refused, Registration, ServiceName, ServicePort,
    Transport,
};

pub(super) struct Reader {
    pub(super) trust_domain: TrustDomain,
    /// Where it may say what a service is.
    pub(super) authority: Namespaces,
    /// Hosts that are dead, though their slices say otherwise.
    pub(super) dead: BTreeSet<Keeper>,
}

/// What was seen of a Service earlier. It outlives the pods: one scaled to zero is the mesh's as before, and what is
/// doubted to be gone must still be allowed to serve.
#[derive(Debug, Default)]
pub(super) struct Learned {
    identities: Vec<SpiffeId>,
    takes_mesh: bool,
}

/// All that is known of one Service.
pub(super) struct Known<'a> {
    pub(super) service: &'a Service,
    pub(super) slices: Vec<&'a Slice>,
    pub(super) pods: &'a HashMap<Arc<str>, Pod>,
    /// Imported by its name, not by a pattern.
    pub(super) is_named: bool,
    /// There is a MeshService of its name.
    pub(super) is_described: bool,
}

/// Annotations that do not mean anything: `annotation: reason`.
type Problems = Vec<String>;

pub(super) fn service_key(service: &ServiceName) -> Arc<str> {
    format!("service/{}/{}", service.namespace(), service.name()).into()
}

fn slice_key(slice: &Slice) -> Arc<str> {
    format!("slice/{}", slice.key).into()
}

impl Reader {
    /// All that is said of the Service now.
    pub(super) fn read(&self, known: &Known<'_>, learned: &mut Learned) -> Vec<Change> {
        let name = &known.service.name;
        if name.namespace() == SYSTEM_NAMESPACE {
            return Vec::new();
        }
        if let Some(problem) = runs_nowhere(known.service) {
            return if known.is_named { vec![refused_service(known.service, vec![problem])] } else { Vec::new() };
        }
        let identities = self.accounts(known);
        if !identities.is_empty() {
            learned.identities = identities;
        }
        let defines = self.authority.covers(name.namespace());
        let plaintext =
            known.is_named || known.is_described || (defines && allows_plaintext(&known.service.notes) == Ok(true));
        let any_is_ready = known.any_is_ready(|slice| !self.is_dead(slice));
        let places = known.slices.iter().filter_map(|slice| self.slice(slice, known, any_is_ready, plaintext));
        let mut places: Vec<Change> = places.collect();
        learned.takes_mesh |= places.iter().any(has_mesh_place);
        // By `*`, a whole cluster is imported: what does not take part in the mesh stays the cluster's own.
        let is_of_the_mesh =
            known.is_named || known.is_described || learned.takes_mesh || !known.service.notes.is_empty();
        if !is_of_the_mesh {
            return Vec::new();
        }
        // Without authority only an explicit one is told, to be refused by name.
        let says_who = known.service.notes.contains_key("identities");
        if (defines || says_who) && !(known.is_described && known.service.is_a_place_to_register()) {
            places.push(self.definition(known.service, &learned.identities));
        }
        places
    }

    fn is_dead(&self, slice: &Slice) -> bool {
        !self.dead.is_empty() && keeper(slice).is_some_and(|keeper| self.dead.contains(&keeper))
    }

    /// What a MeshService says; its key comes before that of a Service, so it holds where both define one name.
    pub(super) fn document(&self, document: &Mesh) -> Option<Change> {
        let name = &document.name;
        if name.namespace() == SYSTEM_NAMESPACE {
            return None;
        }
        let origin = format!("MeshService {}/{}", name.namespace(), name.name());
        let key: Arc<str> = format!("meshservice/{}/{}", name.namespace(), name.name()).into();
        Some(match documents::read_document(&document.text, 1, &self.trust_domain).outcome {
            Ok(described) => Change::Set(Record { key, ..described.record(origin.into()) }),
            Err(problems) => {
                let told = problems.into_iter().map(|problem| format!("{}: {}", problem.field, problem.reason));
                refused(key, &origin, told.collect())
            }
        })
    }

    fn definition(&self, service: &Service, accounts: &[SpiffeId]) -> Change {
        let mut problems = Problems::new();
        let name = &service.name;
        let identities = match service.notes.get("identities") {
            Some(text) => self.identities(text, &mut problems),
            // No pod was seen: whoever was known before a restart, or while the Service was away, stays allowed.
            None if !service.selector.is_empty() => accounts.to_vec(),
            // A service name is two DNS labels, which are always valid segments of an identity.
            None => SpiffeId::workload(&self.trust_domain, name.namespace(), name.name()).into_iter().collect(),
        };
        let allow_plaintext = allows_plaintext(&service.notes).unwrap_or_else(|problem| {
            problems.push(problem);
            false
        });
        if !problems.is_empty() {
            return refused_service(service, problems);
        }
        let ports = service.ports.iter().map(|port| ServicePort { port: port.port, protocol: port.protocol });
        Change::Set(Record {
            key: service_key(name),
            origin: origin_of(service),
            service: name.clone(),
            definition: Some(Arc::new(Definition {
                ports: ports.collect(),
                identities,
                allow_plaintext,
                addresses: service.addresses.clone(),
            })),
            places: Vec::new(),
        })
    }

    fn identities(&self, text: &str, problems: &mut Problems) -> Vec<SpiffeId> {
        let mut identities: Vec<SpiffeId> = Vec::new();
        for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            match SpiffeId::parse_in(&self.trust_domain, word) {
                Ok(identity) if identity.is_system() => problems.push(about(
                    "identities",
                    &format!("`{}` is a host, which serves nothing; name a workload", identity.short()),
                )),
                Ok(identity) if identities.contains(&identity) => {}
                Ok(identity) => identities.push(identity),
                Err(error) => problems.push(about("identities", &error.to_string())),
            }
        }
        if identities.is_empty() && problems.is_empty() {
            problems.push(about("identities", "nobody may serve this service; list an identity, or remove it"));
        }
        identities
    }

    /// Who answers behind the Service, each once.
    fn accounts(&self, known: &Known<'_>) -> Vec<SpiffeId> {
        let mut identities: Vec<SpiffeId> = Vec::new();
        for pod in known.slices.iter().flat_map(|slice| &slice.endpoints).filter_map(|endpoint| known.pod(endpoint)) {
            let identity = SpiffeId::workload(&self.trust_domain, known.service.name.namespace(), &pod.account);
            identities.extend(identity.ok().filter(|identity| !identity.is_system() && !identities.contains(identity)));
        }
        identities.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        identities
    }

    fn slice(&self, slice: &Slice, known: &Known<'_>, any_is_ready: bool, plaintext: bool) -> Option<Change> {
        if slice.is_of_names {
            let reason = "its endpoints are names; only addresses can be used";
            return known.is_named.then(|| refused_slice(slice, vec![reason.to_owned()]));
        }
        let served: Vec<PortTarget> = known.service.ports.iter().filter_map(|port| slice.serves(port)).collect();
        if served.is_empty() {
            return None;
        }
        let mut problems = Problems::new();
        let notes = SliceNotes { is_dead: self.is_dead(slice), ..SliceNotes::read(&slice.notes, &mut problems) };
        let mut places: Vec<Arc<Place>> = Vec::new();
        for endpoint in &slice.endpoints {
            let Some(registration) = known.registration(endpoint, &notes, &served, any_is_ready) else { continue };
            if registration.transport == Transport::Plaintext && !plaintext {
                continue;
            }
            match registration.place(&self.trust_domain) {
                Ok(place) if places.iter().any(|earlier| earlier.is_same_as(&place)) => {}
                Ok(place) => places.push(Arc::new(place)),
                Err(wrong) => problems.extend(wrong),
            }
        }
        if !problems.is_empty() {
            return Some(refused_slice(slice, problems));
        }
        Some(Change::Set(Record {
            key: slice_key(slice),
            origin: format!("EndpointSlice {}", slice.key).into(),
            service: slice.service.clone(),
            definition: None,
            places,
        }))
    }
}

impl Known<'_> {
    /// One of that name and another uid is another pod. Who writes a slice picks among the pods that the Service itself
    /// selects, and makes no other one a server of it.
    fn pod(&self, endpoint: &SliceEndpoint) -> Option<&Pod> {
        let (key, life) = endpoint.pod.as_ref()?;
        let namespace = key.split_once('/')?.0;
        let pod = self.pods.get(key).filter(|pod| pod.life.may_be(*life))?;
        (namespace == self.service.name.namespace() && pod.labels.are_selected(&self.service.selector)).then_some(pod)
    }

    fn any_is_ready(&self, is_alive: impl Fn(&Slice) -> bool) -> bool {
        let alive = self.slices.iter().filter(|slice| is_alive(slice));
        alive.flat_map(|slice| &slice.endpoints).any(|endpoint| endpoint.state == State::Ready)
    }

    /// What an endpoint amounts to. A pod that is not known yet, or no longer, is none.
    fn registration(
        &self,
        endpoint: &SliceEndpoint,
        notes: &SliceNotes,
        served: &[PortTarget],
        any_is_ready: bool,
    ) -> Option<Registration> {
        // Without a selector, whoever wrote the slice says what is there.
        let of_pod = endpoint.pod.is_some() && !self.service.selector.is_empty();
        let pod = if of_pod { Some(self.pod(endpoint)?) } else { None };
        let (transport, identity) = match pod {
            Some(pod) => {
                let identity = format!("ns/{}/sa/{}", self.service.name.namespace(), pod.account);
                (if pod.takes_hbone { Transport::Hbone } else { Transport::Plaintext }, Some(identity))
            }
            None => (notes.transport, notes.identity.clone()),
        };
        // New connections go to one that ends only where there is no other.
        let weight = if endpoint.state == State::Draining && any_is_ready { 0 } else { notes.weight };
        Some(Registration {
            address: endpoint.address?,
            mesh_port: if pod.is_some() { DEFAULT_MESH_PORT } else { notes.mesh_port },
            ports: served.to_vec(),
            identity,
            transport,
            network: notes.network.clone(),
            zone: if is_plain_word(&endpoint.zone) { endpoint.zone.to_string() } else { String::new() },
            weight,
            health: if endpoint.state == State::Away || notes.is_dead { Health::Unhealthy } else { Health::Healthy },
            epoch: notes.epoch,
            version: String::new(),
        })
    }
}

impl Service {
    /// It says nothing of itself, and is there for others to put slices on.
    fn is_a_place_to_register(&self) -> bool {
        self.selector.is_empty() && self.notes.is_empty()
    }
}

impl Slice {
    fn serves(&self, port: &super::objects::Port) -> Option<PortTarget> {
        let (_, target) = self.ports.iter().find(|(name, _)| *name == port.name)?;
        Some(PortTarget { port: port.port, target: *target })
    }
}

/// What annotations of a slice say of its endpoints that are no pods.
struct SliceNotes {
    transport: Transport,
    identity: Option<String>,
    mesh_port: u16,
    weight: u32,
    network: String,
    epoch: u64,
    is_dead: bool,
}

impl SliceNotes {
    fn read(notes: &Notes, problems: &mut Problems) -> SliceNotes {
        let transport = notes.get("transport").map(|text| {
            let known = Transport::NAMES.iter().find(|(name, _)| name == text);
            known.map(|(_, transport)| *transport).ok_or("write meshd, hbone or plaintext")
        });
        SliceNotes {
            // Nothing else says that a mesh is there.
            transport: taken("transport", transport, problems).unwrap_or(Transport::Plaintext),
            identity: notes.get("identity").cloned(),
            mesh_port: number(notes, "mesh-port", problems).unwrap_or(DEFAULT_MESH_PORT),
            weight: number(notes, "weight", problems).unwrap_or(DEFAULT_WEIGHT),
            network: notes.get("network").cloned().unwrap_or_default(),
            epoch: number(notes, "epoch", problems).unwrap_or(0),
            is_dead: false,
        }
    }
}

fn number<T: std::str::FromStr>(notes: &Notes, key: &str, problems: &mut Problems) -> Option<T> {
    let read = notes.get(key).map(|text| text.parse().map_err(|_| format!("`{}` is no such number", printable(text))));
    taken(key, read, problems)
}

fn taken<T, E: AsRef<str>>(key: &str, read: Option<Result<T, E>>, problems: &mut Problems) -> Option<T> {
    match read? {
        Ok(value) => Some(value),
        Err(reason) => {
            problems.push(about(key, reason.as_ref()));
            None
        }
    }
}

fn about(key: &str, reason: &str) -> String {
    format!("annotation {NOTES}{key}: {reason}")
}

fn allows_plaintext(notes: &Notes) -> Result<bool, String> {
    match notes.get("allow-plaintext").map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(_) => Err(about("allow-plaintext", "write \"true\" or \"false\"")),
    }
}

fn runs_nowhere(service: &Service) -> Option<String> {
    if service.is_external {
        return Some("it is an ExternalName, a name for something elsewhere; import that instead".to_owned());
    }
    if service.ports.is_empty() {
        return Some("it has no TCP port, and the mesh carries TCP only".to_owned());
    }
    let too_many = service.ports.len() > MOST_PORTS;
    too_many.then(|| format!("it has {} ports and {MOST_PORTS} are allowed", service.ports.len()))
}

fn has_mesh_place(change: &Change) -> bool {
    let Change::Set(record) = change else { return false };
    record.places.iter().any(|place| place.transport != Transport::Plaintext)
}

fn origin_of(service: &Service) -> Arc<str> {
    format!("Service {}/{}", service.name.namespace(), service.name.name()).into()
}

fn refused_service(service: &Service, problems: Problems) -> Change {
    refused(service_key(&service.name), &origin_of(service), problems)
}

fn refused_slice(slice: &Slice, problems: Problems) -> Change {
    refused(slice_key(slice), &format!("EndpointSlice {}", slice.key), problems)
}

/// A slice has up to a thousand endpoints, all of which may be wrong in the same way.
const MOST_PROBLEMS: usize = 5;

fn refused(key: Arc<str>, origin: &str, mut problems: Problems) -> Change {
    problems.dedup();
    let told = problems.iter().take(MOST_PROBLEMS);
    let told = told.map(|problem| format!("{origin}: {problem} (the last good version stays in force)"));
    Change::Refused(Refused { key, problems: told.collect() })
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
