//! `TCPRoute` (gateway.networking.k8s.io/v1alpha2, and v1) with services as parents.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::references::{backend, check_backend, check_parents, parents};
use super::shape::{Object, Shape};
use super::{Backend, Parent, filters};
use crate::yaml::{Field, Problem};

pub type TcpRoute = super::Object<TcpSpec>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TcpSpec {
    pub parent_refs: Vec<Parent>,
    pub rules: Vec<TcpRule>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TcpRule {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Arc<str>>,
    pub backend_refs: Vec<Backend>,
}

pub(super) fn spec() -> Object {
    let (name, form, about) = filters::rule_name();
    let rule = Object::new().may(name, form, about).must(
        "backendRefs",
        Shape::list_of_some(backend(), 16),
        "backendRefs: [ { name: ledger-v2, port: 5432 } ]",
        "where connections go",
    );
    Object::new()
        .must(
            "parentRefs",
            parents(),
            "parentRefs: [ { group: \"\", kind: Service, name: ledger } ]",
            "of which services",
        )
        .must("rules", Shape::list_of_some(rule, 16), "rules: [ { backendRefs: [ { name: ledger-v2 } ] } ]", "where to")
        .may("useDefaultGateways", Shape::Anything, "of Gateways only")
}

pub(super) fn check(spec: &Field<'_>, problems: &mut Vec<Problem>) {
    check_parents(spec, problems);
    let rules = spec.items("rules");
    if let Some(second) = rules.get(1) {
        second.refuse(
            problems,
            "connections have nothing to choose a rule by, so the first would take all; put the backends into one",
        );
    }
    for backend in rules.iter().flat_map(|rule| rule.items("backendRefs")) {
        check_backend(&backend, problems);
    }
}
