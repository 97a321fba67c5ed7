//! Which of several resources holds where they contradict each other. Pure; the Gateway API's rules (GEP-1426, GEP-713).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{GrpcRoute, HttpRoute, Id, Kind, Resource, Target};
use crate::ServiceName;

/// Two resources that say something about the same, of which one holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    pub winner: Id,
    pub loser: Id,
    /// What they contradict each other about, and by which rule one holds.
    pub about: String,
}

/// For whom a route is: everybody, or clients of a namespace; and of which port of the service.
type Concern = (ServiceName, Option<Arc<str>>, Option<u16>);

/// All contradictions, each pair once.
pub fn conflicts(resources: &[Resource]) -> Vec<Conflict> {
    let mut found = Vec::new();
    let routes = concerns(resources);
    for (n, (concern, one)) in routes.iter().enumerate() {
        for (other_concern, other) in &routes[..n] {
            if meet(concern, other_concern) {
                found.extend(between_routes(&concern.0, one, other));
            }
        }
    }
    let policies: Vec<&Resource> = resources.iter().filter(|found| found.kind() == Kind::ServicePolicy).collect();
    for (n, one) in policies.iter().enumerate() {
        for other in &policies[..n] {
            if let Some(Target::Service(service)) =
                one.targets().into_iter().find(|target| other.targets().contains(target))
            {
                let about = format!("both are for {service}; the older holds, then the first by name");
                found.push(decide(one, other, about));
            }
        }
    }
    let mut once: BTreeMap<(Id, Id), Conflict> = BTreeMap::new();
    for conflict in found.into_iter().filter(|conflict| conflict.winner != conflict.loser) {
        once.entry((conflict.winner.clone(), conflict.loser.clone())).or_insert(conflict);
    }
    once.into_values().collect()
}

fn concerns(resources: &[Resource]) -> Vec<(Concern, &Resource)> {
    let concern = |resource| {
        move |parent: &super::Parent| {
            let resource: &Resource = resource;
            let namespace = &resource.meta().namespace;
            let service = parent.service(namespace)?;
            let consumer = (service.namespace() != &**namespace).then(|| namespace.clone());
            Some(((service, consumer, parent.port), resource))
        }
    };
    resources.iter().flat_map(|resource| resource.parents().iter().filter_map(concern(resource))).collect()
}

fn meet(one: &Concern, other: &Concern) -> bool {
    let same_port = one.2.is_none() || other.2.is_none() || one.2 == other.2;
    one.0 == other.0 && one.1 == other.1 && same_port
}

fn between_routes(service: &ServiceName, one: &Resource, other: &Resource) -> Option<Conflict> {
    if one.kind() != other.kind() {
        // A split is said for requests and for connections alike.
        if one.meta() == other.meta() {
            return None;
        }
        let rank = |resource: &Resource| {
            [Kind::GRPCRoute, Kind::HTTPRoute, Kind::TCPRoute].iter().position(|kind| *kind == resource.kind())
        };
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

/// No matches are one that matches everything.
fn same_http_match(one: &HttpRoute, other: &HttpRoute) -> bool {
    let all = |route: &HttpRoute| {
        let of = |rule: &super::HttpRule| {
            if rule.matches.is_empty() { vec![super::HttpMatch::default()] } else { rule.matches.clone() }
        };
        route.spec.rules.iter().flat_map(of).collect::<Vec<_>>()
    };
    let others = all(other);
    all(one).iter().any(|found| others.contains(found))
}

fn same_grpc_match(one: &GrpcRoute, other: &GrpcRoute) -> bool {
    let all = |route: &GrpcRoute| {
        let of = |rule: &super::GrpcRule| {
            if rule.matches.is_empty() { vec![super::GrpcMatch::default()] } else { rule.matches.clone() }
        };
        route.spec.rules.iter().flat_map(of).collect::<Vec<_>>()
    };
    let others = all(other);
    all(one).iter().any(|found| others.contains(found))
}
