//! Which of several resources holds where they contradict each other. Pure; the Gateway API's rules (GEP-1426, GEP-713).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::precedence::KINDS;
use super::{GrpcRoute, GrpcRule, HttpRoute, HttpRule, Id, Kind, Resource, Target};
use crate::ServiceName;

/// Two resources that say something about the same, of which one holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    pub winner: Id,
    pub loser: Id,
    /// What they contradict each other about, and by which rule one holds.
    pub about: String,
}

/// For whom a route of a service is: everybody, or clients of a namespace.
type Concern = (ServiceName, Option<Arc<str>>);

/// All contradictions, each pair once.
pub fn conflicts(resources: &[Resource]) -> Vec<Conflict> {
    let routes = concerns(resources).into_iter().flat_map(|((service, _), routes)| {
        let of_service = move |((port, one), (other_port, other)): (&OnPort<'_>, &OnPort<'_>)| {
            let same_port = port.is_none() || other_port.is_none() || port == other_port;
            same_port.then(|| between_routes(&service, one, other)).flatten()
        };
        pairs(&routes).filter_map(of_service).collect::<Vec<_>>()
    });
    let policies = policies(resources).into_iter().flat_map(|(target, policies)| {
        let about = format!("both are for {target}; the older holds, then the first by name");
        pairs(&policies).map(|(one, other)| decide(one, other, about.clone())).collect::<Vec<_>>()
    });
    let mut once: BTreeMap<(Id, Id), Conflict> = BTreeMap::new();
    for conflict in routes.chain(policies).filter(|conflict| conflict.winner != conflict.loser) {
        once.entry((conflict.winner.clone(), conflict.loser.clone())).or_insert(conflict);
    }
    once.into_values().collect()
}

/// A route, and of which port only.
type OnPort<'r> = (Option<u16>, &'r Resource);

fn concerns(resources: &[Resource]) -> HashMap<Concern, Vec<OnPort<'_>>> {
    let mut concerns: HashMap<Concern, Vec<OnPort<'_>>> = HashMap::new();
    for resource in resources {
        let namespace = &resource.meta().namespace;
        for parent in resource.parents() {
            let Some(service) = parent.service(namespace) else { continue };
            let consumer = (service.namespace() != &**namespace).then(|| namespace.clone());
            concerns.entry((service, consumer)).or_default().push((parent.port, resource));
        }
    }
    concerns
}

fn policies(resources: &[Resource]) -> BTreeMap<Target, Vec<&Resource>> {
    let mut policies: BTreeMap<Target, Vec<&Resource>> = BTreeMap::new();
    for policy in resources.iter().filter(|resource| resource.kind() == Kind::ServicePolicy) {
        policy.targets().into_iter().for_each(|target| policies.entry(target).or_default().push(policy));
    }
    policies
}

fn pairs<T>(all: &[T]) -> impl Iterator<Item = (&T, &T)> {
    all.iter().enumerate().flat_map(|(n, one)| all[..n].iter().map(move |other| (one, other)))
}

fn between_routes(service: &ServiceName, one: &Resource, other: &Resource) -> Option<Conflict> {
    if one.kind() != other.kind() {
        // A split is said for requests and for connections alike.
        if one.meta() == other.meta() {
            return None;
        }
        let rank = |resource: &Resource| KINDS.iter().position(|kind| *kind == resource.kind());
        let (winner, loser) = if rank(one) < rank(other) { (one, other) } else { (other, one) };
        let about = format!("both are for {service}; a {} goes before a {}", winner.kind(), loser.kind());
        return Some(Conflict { winner: winner.id(), loser: loser.id(), about });
    }
    let same = match (one, other) {
        (Resource::Http(one), Resource::Http(other)) => same_http_match(one, other),
        (Resource::Grpc(one), Resource::Grpc(other)) => same_grpc_match(one, other),
        (Resource::Tcp(_), Resource::Tcp(_)) => true,
        _ => false,
    };
    let about = || format!("both match the same of {service}; the older holds, then the first by name");
    same.then(|| decide(one, other, about()))
}

fn decide(one: &Resource, other: &Resource, about: String) -> Conflict {
    let (winner, loser) =
        if one.meta().precedence() <= other.meta().precedence() { (one, other) } else { (other, one) };
    Conflict { winner: winner.id(), loser: loser.id(), about }
}

fn same_http_match(one: &HttpRoute, other: &HttpRoute) -> bool {
    let mut found = one.spec.rules.iter().flat_map(HttpRule::alternatives);
    found.any(|found| other.spec.rules.iter().flat_map(HttpRule::alternatives).any(|other| found == other))
}

fn same_grpc_match(one: &GrpcRoute, other: &GrpcRoute) -> bool {
    let mut found = one.spec.rules.iter().flat_map(GrpcRule::alternatives);
    found.any(|found| other.spec.rules.iter().flat_map(GrpcRule::alternatives).any(|other| found == other))
}
