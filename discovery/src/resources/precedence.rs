//! Which routes count for a client on a port of a service, and in which order what they match is tried: GEP-1426 and the
//! Gateway API's rules. Pure.

use std::cmp::Reverse;
use std::sync::Arc;

use super::{
    Backend, Filter, GrpcMatch, GrpcRoute, GrpcRule, GrpcSpec, HttpMatch, HttpRoute, HttpRule, HttpSpec, Kind, Object,
    Parent, Routes, TcpRoute, TcpSpec,
};
use crate::ServiceName;

/// Of the routes of a port the first kind counts of which there is one.
pub(super) const KINDS: [Kind; 3] = [Kind::GRPCRoute, Kind::HTTPRoute, Kind::TCPRoute];

/// How what comes to a port is carried on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carried {
    Requests,
    /// For which only TCP routes have a meaning.
    Bytes,
}

/// The routes that count on a port, all of one kind, the first before the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortRoutes<'r> {
    None,
    Grpc(Vec<&'r Arc<GrpcRoute>>),
    Http(Vec<&'r Arc<HttpRoute>>),
    Tcp(Vec<&'r Arc<TcpRoute>>),
}

/// What the kinds of routes have in common.
pub(super) trait RouteSpec {
    fn parents(&self) -> &[Parent];
    /// Of each rule where it sends to, and its filters.
    fn sends(&self) -> Vec<(&[Backend], &[Filter])>;
}

impl RouteSpec for HttpSpec {
    fn parents(&self) -> &[Parent] {
        &self.parent_refs
    }

    fn sends(&self) -> Vec<(&[Backend], &[Filter])> {
        self.rules.iter().map(|rule| (&*rule.backend_refs, &*rule.filters)).collect()
    }
}

impl RouteSpec for GrpcSpec {
    fn parents(&self) -> &[Parent] {
        &self.parent_refs
    }

    fn sends(&self) -> Vec<(&[Backend], &[Filter])> {
        self.rules.iter().map(|rule| (&*rule.backend_refs, &*rule.filters)).collect()
    }
}

impl RouteSpec for TcpSpec {
    fn parents(&self) -> &[Parent] {
        &self.parent_refs
    }

    fn sends(&self) -> Vec<(&[Backend], &[Filter])> {
        self.rules.iter().map(|rule| (&*rule.backend_refs, &[][..])).collect()
    }
}

impl Routes {
    pub(super) fn on(&self, service: &ServiceName, port: u16, carried: Carried) -> PortRoutes<'_> {
        let found = match carried {
            Carried::Requests => (on_port(&self.grpc, service, port), on_port(&self.http, service, port)),
            Carried::Bytes => Default::default(),
        };
        match (found, on_port(&self.tcp, service, port)) {
            ((grpc, _), _) if !grpc.is_empty() => PortRoutes::Grpc(grpc),
            ((_, http), _) if !http.is_empty() => PortRoutes::Http(http),
            (_, tcp) if !tcp.is_empty() => PortRoutes::Tcp(tcp),
            _ => PortRoutes::None,
        }
    }
}

/// Those of which a parent is that port, or all ports.
fn on_port<'r, S: RouteSpec>(
    routes: &'r [Arc<Object<S>>],
    service: &ServiceName,
    port: u16,
) -> Vec<&'r Arc<Object<S>>> {
    let is_parent = |route: &Object<S>, parent: &Parent| {
        parent.port.is_none_or(|only| only == port)
            && parent.service(&route.metadata.namespace).is_some_and(|parent| parent == *service)
    };
    routes.iter().filter(|route| route.spec.parents().iter().any(|parent| is_parent(route, parent))).collect()
}

/// Something that a rule of a route matches.
#[derive(Debug)]
pub struct Candidate<'r, S, R, M> {
    pub route: &'r Arc<Object<S>>,
    pub rule: &'r R,
    pub found: &'r M,
}

pub type HttpCandidate<'r> = Candidate<'r, HttpSpec, HttpRule, HttpMatch>;
pub type GrpcCandidate<'r> = Candidate<'r, GrpcSpec, GrpcRule, GrpcMatch>;

/// All that routes match, in the order in which it is tried: the first that holds decides.
pub fn http_order<'r>(routes: &[&'r Arc<HttpRoute>]) -> Vec<HttpCandidate<'r>> {
    in_order(routes, |spec| &spec.rules, HttpRule::alternatives, HttpMatch::specificity)
}

/// The same of calls.
pub fn grpc_order<'r>(routes: &[&'r Arc<GrpcRoute>]) -> Vec<GrpcCandidate<'r>> {
    in_order(routes, |spec| &spec.rules, GrpcRule::alternatives, GrpcMatch::specificity)
}

/// Of those alike the first route, then the first rule.
fn in_order<'r, S, R, M, K: Ord>(
    routes: &[&'r Arc<Object<S>>],
    rules: impl Fn(&'r S) -> &'r Vec<R>,
    alternatives: impl Fn(&'r R) -> &'r [M],
    specificity: impl Fn(&'r M) -> K,
) -> Vec<Candidate<'r, S, R, M>> {
    let mut candidates: Vec<Candidate<'r, S, R, M>> = Vec::new();
    for route in routes {
        for rule in rules(&route.spec) {
            candidates.extend(alternatives(rule).iter().map(|found| Candidate { route, rule, found }));
        }
    }
    candidates.sort_by_key(|candidate| Reverse(specificity(candidate.found)));
    candidates
}

#[cfg(test)]
#[path = "precedence_tests.rs"]
mod tests;
