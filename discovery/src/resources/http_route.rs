//! `HTTPRoute` (gateway.networking.k8s.io/v1) with services as parents: GEP-1426.

use std::sync::{Arc, LazyLock};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::filters::{self, check_filters, http_filters};
use super::forms::{DURATION, HEADER, HEADER_VALUE, PATH, QUERY_VALUE};
use super::references::{backend, backends, check_backend, check_parents, parents};
use super::shape::{Object, Shape, Unique};
use super::values::{never_in_a_path, pattern_of, span_of};
use super::{Backend, Filter, Parent, Pattern, Span};
use crate::yaml::{Field, Problem, Value};

pub type HttpRoute = super::Object<HttpSpec>;

/// Of all rules of a route together; the Gateway API's own limit.
const MOST_MATCHES: usize = 128;
pub(super) const SESSIONS: &str = "use a ServicePolicy with `balancing: { algorithm: ringHash, hashHeader: NAME }`";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpSpec {
    pub parent_refs: Vec<Parent>,
    #[serde(default = "one_rule")]
    pub rules: Vec<HttpRule>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRule {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Arc<str>>,
    /// Any of them; none: every request.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<HttpMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<Filter>,
    /// Empty: the parent itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backend_refs: Vec<Backend>,
    #[serde(skip_serializing_if = "RouteTimeouts::is_unset")]
    pub timeouts: RouteTimeouts,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
}

impl HttpRule {
    /// What it matches: any of them.
    pub fn alternatives(&self) -> &[HttpMatch] {
        static EVERYTHING: LazyLock<[HttpMatch; 1]> = LazyLock::new(|| [HttpMatch::default()]);
        if self.matches.is_empty() { &*EVERYTHING } else { &self.matches }
    }
}

fn one_rule() -> Vec<HttpRule> {
    vec![HttpRule::default()]
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpMatch {
    pub path: PathMatch,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<ValueMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub query_params: Vec<ValueMatch>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "value")]
pub enum PathMatch {
    Exact(Arc<str>),
    /// By whole segments: `/v1` matches `/v1` and `/v1/x`, not `/v10`.
    PathPrefix(Arc<str>),
    RegularExpression(Pattern),
}

impl Default for PathMatch {
    fn default() -> PathMatch {
        PathMatch::PathPrefix("/".into())
    }
}

impl PathMatch {
    /// `path` without its query.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            PathMatch::Exact(exact) => path == &**exact,
            PathMatch::PathPrefix(prefix) => {
                let prefix = prefix.trim_end_matches('/');
                path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            PathMatch::RegularExpression(pattern) => pattern.matches(path.as_bytes()),
        }
    }
}

/// Of a header or a query parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ValueMatch {
    Exact { name: Arc<str>, value: Arc<str> },
    RegularExpression { name: Arc<str>, value: Pattern },
}

impl ValueMatch {
    pub fn name(&self) -> &str {
        match self {
            ValueMatch::Exact { name, .. } | ValueMatch::RegularExpression { name, .. } => name,
        }
    }

    pub fn matches(&self, found: &[u8]) -> bool {
        match self {
            ValueMatch::Exact { value, .. } => found == value.as_bytes(),
            ValueMatch::RegularExpression { value, .. } => value.matches(found),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteTimeouts {
    /// Of the whole request with its retries; `0s`: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Span>,
    /// Of each try; `0s`: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_request: Option<Span>,
}

impl RouteTimeouts {
    fn is_unset(&self) -> bool {
        *self == RouteTimeouts::default()
    }
}

/// GEP-1731. What cannot be repeated safely is not, unless the service's policy says so.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Retry {
    /// Statuses that are retried, besides connections that fail.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub codes: Vec<u16>,
    /// At most so many retries of one request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempts: Option<u32>,
    /// At least so long between two tries.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Span>,
    /// Also what may be done only once. Of a ServiceProfile, which says so per route.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub non_idempotent: bool,
}

impl HttpMatch {
    /// More is matched first: the Gateway API's order, with regular expressions of paths between exact paths and
    /// prefixes, among themselves in the order they are written in.
    pub fn specificity(&self) -> impl Ord + Copy + use<> {
        let rest = (usize::from(self.method.is_some()), self.headers.len(), self.query_params.len());
        match &self.path {
            PathMatch::Exact(_) => (2, 0, rest),
            PathMatch::RegularExpression(_) => (1, 0, (0, 0, 0)),
            PathMatch::PathPrefix(prefix) => (0, prefix.len(), rest),
        }
    }
}

fn value_match(name: &'static str, value: &'static super::forms::Form) -> Shape {
    let object = Object::new()
        .may("type", Shape::words(&["Exact", "RegularExpression"]), "Exact by default")
        .must("name", &HEADER, name, "of what is looked at")
        .must("value", value, "value: v2", "what it has to be");
    Shape::list(object, 16)
}

fn http_match() -> Object {
    let path = Object::new()
        .may("type", Shape::words(&["Exact", "PathPrefix", "RegularExpression"]), "PathPrefix by default")
        .may("value", &PATH, "`/` by default");
    const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
    Object::new()
        .may("path", path, "of the request, without its query")
        .may("headers", value_match("name: x-version", &HEADER_VALUE), "all of them")
        .may("queryParams", value_match("name: page", &QUERY_VALUE), "all of them")
        .may("method", Shape::words(METHODS), "of the request")
}

pub(super) fn spec() -> Object {
    let timeouts =
        Object::new().may("request", &DURATION, "of the whole request").may("backendRequest", &DURATION, "of each try");
    let retry = Object::new()
        .may("codes", Shape::list(Shape::integer(400, 599), 200), "statuses that are retried")
        .may("attempts", Shape::integer(0, 10), "at most so many retries")
        .may("backoff", &DURATION, "at least so long between two tries");
    let (name, form, about) = filters::rule_name();
    let rule = Object::new()
        .may(name, form, about)
        .may("matches", Shape::list(http_match(), 64), "any of them")
        .may("filters", http_filters(), "what is done to requests")
        .may("backendRefs", backends(backend().may("filters", http_filters(), "for this backend only")), "where to")
        .may("timeouts", timeouts, "of requests")
        .may("retry", retry, "what is tried again")
        .refused("sessionPersistence", SESSIONS);
    route(rule, "where requests go")
}

/// What HTTPRoute and GRPCRoute say alike.
pub(super) fn route(rule: Object, about: &'static str) -> Object {
    Object::new()
        .must(
            "parentRefs",
            parents(),
            "parentRefs: [ { group: \"\", kind: Service, name: payments } ]",
            "of which services",
        )
        .may("rules", Shape::list(rule, 16).unique(Unique::By("name")), about)
        .may("hostnames", Shape::Anything, "of Gateways only")
        .may("useDefaultGateways", Shape::Anything, "of Gateways only")
}

pub(super) fn check(spec: &Field<'_>, problems: &mut Vec<Problem>) {
    check_parents(spec, problems);
    let rules = spec.items("rules");
    if let Some(none) = spec.entry("rules").filter(|_| rules.is_empty()) {
        none.refuse(
            problems,
            "is empty, so that nothing would be answered; leave it out for everything, or add a rule",
        );
    }
    let mut all = 0;
    for rule in &rules {
        let matches = rule.items("matches");
        all += matches.len();
        matches.iter().for_each(|found| check_match(found, problems));
        let backends = rule.items("backendRefs");
        let prefix = is_one_prefix(&matches);
        check_filters(rule, prefix, !backends.is_empty(), problems);
        for backend in &backends {
            check_backend(backend, problems);
            check_filters(backend, prefix, true, problems);
        }
        check_timeouts(rule, problems);
    }
    check_matches(spec, all, problems);
}

pub(super) fn check_matches(spec: &Field<'_>, all: usize, problems: &mut Vec<Problem>) {
    if all > MOST_MATCHES {
        spec.refuse(
            problems,
            format!("the rules have {all} matches together and {MOST_MATCHES} are allowed; make several routes"),
        );
    }
}

/// What is left out and has a default that tells variants apart.
pub(super) fn complete(spec: &mut Json) {
    if let Some(spec) = spec.as_object_mut() {
        spec.retain(|name, value| name != "rules" || value.as_array().is_none_or(|rules| !rules.is_empty()));
    }
    let rules = spec.get_mut("rules").and_then(Json::as_array_mut).into_iter().flatten();
    for found in rules.filter_map(|rule| rule.get_mut("matches")?.as_array_mut()).flatten() {
        if let Some(path) = found.get_mut("path").and_then(Json::as_object_mut) {
            path.entry("type").or_insert_with(|| "PathPrefix".into());
            path.entry("value").or_insert_with(|| "/".into());
        }
        if let Some(method) = found.get_mut("method").and_then(Json::as_object_mut) {
            // Of gRPC: empty is any.
            method.retain(|_, value| value != "");
            method.entry("type").or_insert_with(|| "Exact".into());
        }
        for list in ["headers", "queryParams"] {
            let values = found.get_mut(list).and_then(Json::as_array_mut).into_iter().flatten();
            for value in values.filter_map(Json::as_object_mut) {
                value.entry("type").or_insert_with(|| "Exact".into());
            }
        }
    }
}

/// No match at all is the prefix `/`.
fn is_one_prefix(matches: &[Field<'_>]) -> bool {
    let is_prefix = |found: &Field<'_>| {
        found.entry("path").is_none_or(|path| path.word("type").is_none_or(|kind| kind == "PathPrefix"))
    };
    matches.len() <= 1 && matches.iter().all(is_prefix)
}

fn check_match(found: &Field<'_>, problems: &mut Vec<Problem>) {
    if let Some(path) = found.entry("path") {
        match path.word("type").unwrap_or("PathPrefix") {
            "RegularExpression" => check_expression(&path, problems),
            _ => check_path(&path, problems),
        }
    }
    check_values(found, "headers", problems);
    check_values(found, "queryParams", problems);
}

/// Names once each, and expressions that compile.
pub(super) fn check_values(found: &Field<'_>, list: &str, problems: &mut Vec<Problem>) {
    let mut names: Vec<String> = Vec::new();
    for value in found.items(list) {
        if value.word("type") == Some("RegularExpression") {
            check_expression(&value, problems);
        }
        let Some(name) = value.word("name") else { continue };
        let name = if list == "headers" { name.to_ascii_lowercase() } else { name.to_owned() };
        if names.contains(&name) {
            value.refuse(problems, format!("`{name}` is matched twice; say it in one expression"));
        }
        names.push(name);
    }
}

pub(super) fn check_expression(holder: &Field<'_>, problems: &mut Vec<Problem>) {
    let Some(value) = holder.entry("value") else { return };
    if let Value::Text(text) = &value.node.value
        && let Err(reason) = pattern_of(text)
    {
        value.refuse(problems, reason);
    }
}

/// What a normalised path cannot be would never match.
fn check_path(path: &Field<'_>, problems: &mut Vec<Problem>) {
    let (Some(value), Some(text)) = (path.entry("value"), path.word("value")) else { return };
    if !text.starts_with('/') {
        return value.refuse(problems, "must begin with `/`");
    }
    if let Some(part) = never_in_a_path(text, true) {
        value.refuse(problems, format!("contains `{part}`, which no path has when it is matched"));
    }
}

fn check_timeouts(rule: &Field<'_>, problems: &mut Vec<Problem>) {
    let Some(timeouts) = rule.entry("timeouts") else { return };
    let span = |name| timeouts.word(name).and_then(|text| span_of(text).ok());
    if let (Some(request), Some(each)) = (span("request"), span("backendRequest"))
        && !request.is_zero()
        && each > request
    {
        timeouts.refuse(problems, "`backendRequest` is longer than `request`, which holds all tries; shorten it");
    }
}
