//! `GRPCRoute` (gateway.networking.k8s.io/v1) with services as parents.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::filters::{self, check_filters, grpc_filters};
use super::forms::{GRPC_NAME, HEADER, HEADER_VALUE};
use super::http_route::{SESSIONS, check_matches, check_values, route};
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
    #[serde(default = "one_rule")]
    pub rules: Vec<GrpcRule>,
}

fn one_rule() -> Vec<GrpcRule> {
    vec![GrpcRule::default()]
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

impl GrpcRule {
    /// What it matches: any of them.
    pub fn alternatives(&self) -> &[GrpcMatch] {
        const EVERY_CALL: &[GrpcMatch] = &[GrpcMatch { method: None, headers: Vec::new() }];
        if self.matches.is_empty() { EVERY_CALL } else { &self.matches }
    }
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

impl GrpcMatch {
    /// More is matched first, as the Gateway API has it: more letters of the service, then of the method, then more headers. What
    /// is exact goes before expressions, and those before nothing.
    pub fn specificity(&self) -> impl Ord + Copy + use<> {
        let (service, method) = match &self.method {
            None => ((0, 0), (0, 0)),
            Some(GrpcMethod::Exact { service, method }) => {
                let letters = |name: &Option<Arc<str>>| name.as_ref().map_or((0_u8, 0), |name| (2, name.len()));
                (letters(service), letters(method))
            }
            Some(GrpcMethod::RegularExpression { service, method }) => {
                let given = |pattern: &Option<Pattern>| (u8::from(pattern.is_some()), 0);
                (given(service), given(method))
            }
        };
        (service, method, self.headers.len())
    }
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
    let rules = spec.items("rules");
    check_matches(spec, rules.iter().map(|rule| rule.items("matches").len()).sum(), problems);
    for rule in rules {
        for found in rule.items("matches") {
            check_values(&found, "headers", problems);
            if let Some(method) = found.entry("method") {
                check_method(&method, problems);
            }
        }
        check_filters(&rule, false, false, problems);
        for backend in rule.items("backendRefs") {
            check_backend(&backend, problems);
            check_filters(&backend, false, true, problems);
        }
    }
}

fn check_method(method: &Field<'_>, problems: &mut Vec<Problem>) {
    let expression = method.word("type") == Some("RegularExpression");
    for name in ["service", "method"] {
        let (Some(field), Some(text)) = (method.entry(name), method.word(name)) else { continue };
        if expression {
            if let Err(reason) = pattern_of(text) {
                field.refuse(problems, reason);
            }
            continue;
        }
        // Empty is any.
        let mut parts = if name == "service" { text.split('.').collect() } else { vec![text] }.into_iter();
        if !text.is_empty() && !parts.all(is_word_of_grpc) {
            field.refuse(problems, "is not a name of gRPC; write shop.Payments and Charge, without slashes");
        }
    }
}

fn is_word_of_grpc(part: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_alphabetic() || c == '_';
    part.starts_with(is_letter) && part.chars().all(|c| is_letter(c) || c.is_ascii_digit())
}
