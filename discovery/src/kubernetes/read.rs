//! What Services, their slices and the pods behind them say, in the words of discovery. Pure; docs/resources.md is its
//! reference.
//!
//! A Service is the definition, with authority for its namespace; each of its slices is a record of places (`places.rs`).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use meshd_identity::{SYSTEM_NAMESPACE, SpiffeId, TrustDomain};
use tokio::time::Instant;

use super::kept::keeper;
use super::leases::Keeper;
use super::objects::{Mesh, NOTES, Notes, Pod, Service, Slice, SliceEndpoint};
use crate::registration::MOST_PORTS;
use crate::{
    Change, Definition, Namespaces, REPEATED_FOR, Record, Refused, ServiceName, ServicePort, Transport, documents,
};

pub(super) struct Reader {
    pub(super) trust_domain: TrustDomain,
    /// Where it may say what a service is.
    pub(super) authority: Namespaces,
    /// Hosts that are dead, though their slices say otherwise.
    pub(super) dead: BTreeSet<Keeper>,
}

/// An account whose pods are gone stays allowed for so long: what is doubted to be gone must still be allowed to serve, and
/// a doubt lasts [`REPEATED_FOR`] and until the list after it.
const LEAVES_AFTER: Duration = Duration::from_secs(2 * REPEATED_FOR.as_secs());

/// What was seen of a Service earlier. It outlives the pods: one scaled to zero is the mesh's as before.
#[derive(Debug, Default)]
pub(super) struct Learned {
    /// Who answers, and since when no pod of that account does.
    accounts: Vec<(SpiffeId, Option<Instant>)>,
    takes_mesh: bool,
}

impl Learned {
    fn note(&mut self, seen: Vec<SpiffeId>, now: Instant) {
        for (account, left) in &mut self.accounts {
            *left = if seen.contains(account) { None } else { left.or(Some(now)) };
        }
        if !seen.is_empty() {
            let stays = |left: Instant| now.saturating_duration_since(left) < LEAVES_AFTER;
            self.accounts.retain(|(_, left)| left.is_none_or(stays));
        }
        for account in seen {
            if !self.accounts.iter().any(|(known, _)| *known == account) {
                self.accounts.push((account, None));
            }
        }
        self.accounts.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
    }

    fn identities(&self) -> Vec<SpiffeId> {
        self.accounts.iter().map(|(account, _)| account.clone()).collect()
    }
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
pub(super) type Problems = Vec<String>;

pub(super) fn service_key(service: &ServiceName) -> Arc<str> {
    format!("service/{}/{}", service.namespace(), service.name()).into()
}

impl Reader {
    /// All that is said of the Service now.
    pub(super) fn read(&self, known: &Known<'_>, learned: &mut Learned, now: Instant) -> Vec<Change> {
        let name = &known.service.name;
        if name.namespace() == SYSTEM_NAMESPACE {
            return Vec::new();
        }
        if let Some(problem) = runs_nowhere(known.service) {
            return if known.is_named { vec![refused_service(known.service, vec![problem])] } else { Vec::new() };
        }
        learned.note(self.accounts(known), now);
        let defines = self.authority.covers(name.namespace());
        let plaintext =
            known.is_named || known.is_described || (defines && allows_plaintext(&known.service.notes) == Ok(true));
        let mut places = self.places(known, plaintext);
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
            places.push(self.definition(known.service, learned));
        }
        places
    }

    pub(super) fn is_dead(&self, slice: &Slice) -> bool {
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

    fn definition(&self, service: &Service, learned: &Learned) -> Change {
        let mut problems = Problems::new();
        let name = &service.name;
        let identities = match service.notes.get("identities") {
            Some(text) => self.identities(text, &mut problems),
            // No pod was seen: whoever was known before a restart, or while the Service was away, stays allowed.
            None if !service.selector.is_empty() => learned.identities(),
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
        let endpoints = known.slices.iter().flat_map(|slice| &slice.endpoints);
        let accounts: BTreeSet<&str> = endpoints.filter_map(|it| Some(&*known.pod(it)?.account)).collect();
        let namespace = known.service.name.namespace();
        let identity = |account| SpiffeId::workload(&self.trust_domain, namespace, account).ok();
        accounts.into_iter().filter_map(identity).filter(|identity| !identity.is_system()).collect()
    }
}

impl Known<'_> {
    /// One of that name and another uid is another pod. Who writes a slice picks among the pods that the Service itself
    /// selects, and makes no other one a server of it.
    pub(super) fn pod(&self, endpoint: &SliceEndpoint) -> Option<&Pod> {
        let (key, life) = endpoint.pod.as_ref()?;
        let namespace = key.split_once('/')?.0;
        let pod = self.pods.get(key).filter(|pod| pod.life.may_be(*life))?;
        (namespace == self.service.name.namespace() && pod.labels.are_selected(&self.service.selector)).then_some(pod)
    }
}

impl Service {
    /// It says nothing of itself, and is there for others to put slices on.
    fn is_a_place_to_register(&self) -> bool {
        self.selector.is_empty() && self.notes.is_empty()
    }
}

pub(super) fn about(key: &str, reason: &str) -> String {
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

/// A slice has up to a thousand endpoints, all of which may be wrong in the same way.
const MOST_PROBLEMS: usize = 5;

pub(super) fn refused(key: Arc<str>, origin: &str, mut problems: Problems) -> Change {
    problems.dedup();
    let told = problems.iter().take(MOST_PROBLEMS);
    let told = told.map(|problem| format!("{origin}: {problem} (the last good version stays in force)"));
    Change::Refused(Refused { key, problems: told.collect() })
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
