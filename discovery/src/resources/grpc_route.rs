//! `GRPCRoute` (gateway.networking.k8s.io/v1) with services as parents.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::filters::{self, check_filters, grpc_filters};
use super::forms::{GRPC_NAME, HEADER, HEADER_VALUE};
use super::http_route::{SESSIONS, check_matches, check_values, items, route, word};
use super::references::{backend, backends, check_backend, check_parents};
use super::shape::{Object, Rule, Shape};
use super::values::pattern_of;
use super::{Backend, Filter, Parent, Pattern, ValueMatch};
use crate::yaml::{Field, Problem};

pub type GrpcRoute = super::Object<GrpcSpec>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GrpcSpec {
    pub parent_refs: Vec<Parent>,
    #[serde(default)]
    pub rules: Vec<GrpcRule>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GrpcRule {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Arc<str>>,
    /// Any of them; none: every call.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<GrpcMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<Filter>,
    /// Empty: the parent itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backend_refs: Vec<Backend>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GrpcMatch {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<GrpcMethod>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<ValueMatch>,
}

/// Of `/service/method`; what is absent may be anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum GrpcMethod {
    Exact {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        service: Option<Arc<str>>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        method: Option<Arc<str>>,
    },
    RegularExpression {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        service: Option<Pattern>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        method: Option<Pattern>,
    },
}

pub(super) fn spec() -> Object {
    let method = Object::new()
        .may("type", Shape::words(&["Exact", "RegularExpression"]), "Exact by default")
        .may("service", &GRPC_NAME, "with its package, such as shop.Payments")
        .may("method", &GRPC_NAME, "such as Charge")
        .rule(Rule::AtLeastOne(&["service", "method"]));
    let header = Object::new()
        .may("type", Shape::words(&["Exact", "RegularExpression"]), "Exact by default")
        .must("name", &HEADER, "name: x-version", "of the metadata")
        .must("value", &HEADER_VALUE, "value: v2", "what it has to be");
    let found =
        Object::new().may("method", method, "of the call").may("headers", Shape::list(header, 16), "all of them");
    let (name, form, about) = filters::rule_name();
    let rule = Object::new()
        .may(name, form, about)
        .may("matches", Shape::list(found, 64), "any of them")
        .may("filters", grpc_filters(), "what is done to calls")
        .may("backendRefs", backends(backend().may("filters", grpc_filters(), "for this backend only")), "where to")
        .refused("sessionPersistence", SESSIONS);
    route(rule, "where calls go")
}

pub(super) fn check(spec: &Field<'_>, problems: &mut Vec<Problem>) {
    check_parents(spec, problems);
    let rules = items(spec, "rules");
    check_matches(spec, rules.iter().map(|rule| items(rule, "matches").len()).sum(), problems);
    for rule in rules {
        for found in items(&rule, "matches") {
            check_values(&found, "headers", problems);
            if let Some(method) = found.entry("method") {
                check_method(&method, problems);
            }
        }
        check_filters(&rule, false, false, problems);
        for backend in items(&rule, "backendRefs") {
            check_backend(&backend, problems);
            check_filters(&backend, false, false, problems);
        }
    }
}

fn check_method(method: &Field<'_>, problems: &mut Vec<Problem>) {
    let expression = word(method, "type") == Some("RegularExpression");
    for name in ["service", "method"] {
        let (Some(field), Some(text)) = (method.entry(name), word(method, name)) else { continue };
        if expression {
            if let Err(reason) = pattern_of(text) {
                field.refuse(problems, reason);
            }
            continue;
        }
        let dots = name == "service";
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || (dots && c == '.');
        if !text.chars().all(allowed) {
            field.refuse(problems, "is not a name of gRPC; write shop.Payments and Charge, without slashes");
        }
    }
}
