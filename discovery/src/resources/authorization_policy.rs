//! `AuthorizationPolicy` (meshd.dev/v1alpha1): who may do what, as the host that serves decides it.

use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use meshd_identity::{SpiffeId, TrustDomain};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::forms::{HEADER, HEADER_VALUE, IDENTITY, LABEL, METHOD, NETWORK, PATH_PATTERN};
use super::references::{check_policy_target, policy_target};
use super::shape::{Object, Rule, Shape};
use super::{Network, PathPattern, Peer, PolicyTarget};
use crate::yaml::{Field, Problem};

pub type AuthorizationPolicy = super::Object<AuthorizationSpec>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthorizationSpec {
    pub target_ref: PolicyTarget,
    #[serde(default)]
    pub action: Action,
    /// Counted and logged, and nothing else.
    #[serde(default)]
    pub dry_run: bool,
    /// Any of them. An `allow` without rules allows nothing, which closes what it is for.
    #[serde(default)]
    pub rules: Vec<AuthorizationRule>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Where there is one for a target, what none allows is denied.
    #[default]
    Allow,
    /// Before every `allow`.
    Deny,
    /// Writes it down and decides nothing.
    Audit,
}

/// One of `from` does one of `to`; an empty list is everybody and everything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct AuthorizationRule {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Origin>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<Operation>,
}

/// All that is given of it, each by any of its values.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub identities: Vec<Peer>,
    /// Of the own trust domain.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<Arc<str>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<Network>,
}

impl Origin {
    /// `peer`: `None` where nobody proved who they are.
    pub fn holds(&self, peer: Option<&SpiffeId>, address: IpAddr, ours: &TrustDomain) -> bool {
        let is_peer = |wanted: &Peer| match wanted {
            Peer::Anybody => peer.is_some(),
            Peer::Identity(identity) => peer == Some(identity),
        };
        let in_namespace = |namespace: &Arc<str>| {
            peer.is_some_and(|peer| peer.trust_domain() == ours && peer.namespace() == &**namespace)
        };
        let or_any = |empty: bool, found: bool| empty || found;
        or_any(self.identities.is_empty(), self.identities.iter().any(is_peer))
            && or_any(self.namespaces.is_empty(), self.namespaces.iter().any(in_namespace))
            && or_any(self.networks.is_empty(), self.networks.iter().any(|network| network.contains(address)))
    }
}

/// All that is given of it, each by any of its values. What names methods, paths or headers is about requests.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Operation {
    /// Of the service.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<Arc<str>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<PathPattern>,
    /// All of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<HeaderCondition>,
}

impl Operation {
    pub fn is_about_requests(&self) -> bool {
        !(self.methods.is_empty() && self.paths.is_empty() && self.headers.is_empty())
    }

    /// `request`: `None` where a connection is carried as bytes. What cannot be known does not open a door and does not
    /// keep one open: a `deny` counts it as matched, whatever else does not.
    pub fn holds(&self, action: Action, port: u16, request: Option<Request<'_>>) -> bool {
        let on_port = self.ports.is_empty() || self.ports.contains(&port);
        let matched = match request {
            Some(request) => self.covers(request),
            None => !self.is_about_requests() || action == Action::Deny,
        };
        on_port && matched
    }

    fn covers(&self, Request { method, path, headers }: Request<'_>) -> bool {
        let has = |condition: &HeaderCondition| {
            let wanted = |found: &HeaderValue| {
                condition.values.is_empty() || condition.values.iter().any(|value| value.as_bytes() == found.as_bytes())
            };
            headers.get_all(&*condition.name).iter().any(wanted)
        };
        (self.methods.is_empty() || self.methods.iter().any(|wanted| **wanted == *method))
            && (self.paths.is_empty() || self.paths.iter().any(|pattern| pattern.matches(path)))
            && self.headers.iter().all(has)
    }
}

/// What is known of a request when it is decided about.
#[derive(Debug, Clone, Copy)]
pub struct Request<'r> {
    pub method: &'r str,
    /// Normalised, without its query.
    pub path: &'r str,
    pub headers: &'r HeaderMap,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeaderCondition {
    pub name: Arc<str>,
    /// Any of them; empty: the header is there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<Arc<str>>,
}

pub(super) fn spec() -> Object {
    let from = Object::new()
        .may(
            "identities",
            Shape::list_of_some(&IDENTITY, 256),
            "`ns/NAMESPACE/sa/NAME`, a `spiffe://` URI, or `*` for whoever proved one",
        )
        .may("namespaces", Shape::list_of_some(&LABEL, 256), "of the own trust domain")
        .may("networks", Shape::list_of_some(&NETWORK, 100), "where the client's host is, such as 10.0.0.0/8")
        .rule(Rule::AtLeastOne(&["identities", "namespaces", "networks"]));
    let header = Object::new().must("name", &HEADER, "name: x-tenant", "of the header").may(
        "values",
        Shape::list_of_some(&HEADER_VALUE, 64),
        "any of them; that it is there by default",
    );
    let to = Object::new()
        .may("ports", Shape::list_of_some(Shape::integer(1, 65535), 64), "of the service")
        .may("methods", Shape::list_of_some(&METHOD, 32), "of HTTP, in capitals")
        .may("paths", Shape::list_of_some(&PATH_PATTERN, 256), "exact, or everything below with `*` at the end")
        .may("headers", Shape::list_of_some(header, 16), "all of them")
        .rule(Rule::AtLeastOne(&["ports", "methods", "paths", "headers"]));
    let rule = Object::new().may("from", Shape::list_of_some(from, 16), "any of them; everybody by default").may(
        "to",
        Shape::list_of_some(to, 64),
        "any of them; everything by default",
    );
    let target = policy_target(&["Service", "MeshService", "Namespace", "TrustDomain"]);
    Object::new()
        .must("targetRef", target, "targetRef: { group: \"\", kind: Service, name: payments }", "what it protects")
        .may("action", Shape::words(&["allow", "deny", "audit"]), "allow by default")
        .may("dryRun", Shape::Boolean, "counted and logged, and nothing else; false by default")
        .may("rules", Shape::list(rule, 64), "any of them; an allow without rules allows nothing")
        .cel(
            "!has(self.action) || self.action != 'deny' || (has(self.rules) && size(self.rules) > 0)",
            "denies nothing; say what in `rules`, or write `rules: [ {} ]` to deny everything",
        )
}

pub(super) fn check(
    spec: &Field<'_>,
    namespace: Option<&str>,
    trust_domain: &TrustDomain,
    problems: &mut Vec<Problem>,
) {
    check_policy_target(spec, namespace, problems);
    check_trust_domain(spec, trust_domain, problems);
    // Elsewhere what is empty counts as absent, which would mean everybody here.
    for empty in spec.empty() {
        empty.refuse(
            problems,
            "is empty, and without it everybody or everything may be meant; give it a value or remove it",
        );
    }
    if spec.word("action") == Some("deny") && spec.items("rules").is_empty() {
        spec.refuse(problems, "denies nothing; say what in `rules`, or write `rules: [ {} ]` to deny everything");
    }
}

/// It can only be ours: others have policies of their own.
fn check_trust_domain(spec: &Field<'_>, ours: &TrustDomain, problems: &mut Vec<Problem>) {
    let Some(target) = spec.entry("targetRef") else { return };
    let (kind, name) = (target.word("kind"), target.word("name"));
    if kind == Some("TrustDomain") && name.is_some_and(|name| name != ours.as_str()) {
        target
            .refuse(problems, format!("names another trust domain than {ours}, where it would hold; leave `name` out"));
    }
}

/// Of a `deny`: `/admin/*` is everything below `/admin/`, not `/admin` itself.
pub(super) fn warnings(spec: &AuthorizationSpec) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let operations = spec.rules.iter().enumerate().flat_map(|(n, rule)| rule.to.iter().map(move |to| (n, to)));
    for (n, operation) in operations.filter(|_| spec.action == Action::Deny) {
        for pattern in &operation.paths {
            let PathPattern::Below(below) = pattern else { continue };
            let Some(itself) = below.strip_suffix('/').filter(|itself| !itself.is_empty()) else { continue };
            if !operation.paths.iter().any(|pattern| pattern.matches(itself)) {
                let message = format!("`{below}*` does not deny `{itself}` itself; add it to `paths` if that is meant");
                found.push((format!("spec.rules[{n}].to"), message));
            }
        }
    }
    found
}

/// Short identities are of the own trust domain.
pub(super) fn complete(spec: &mut Json, trust_domain: &TrustDomain) {
    let rules = spec.get_mut("rules").and_then(Json::as_array_mut).into_iter().flatten();
    let origins = rules.filter_map(|rule| rule.get_mut("from")?.as_array_mut()).flatten();
    for identity in origins.filter_map(|from| from.get_mut("identities")?.as_array_mut()).flatten() {
        let full = identity.as_str().and_then(|text| SpiffeId::parse_in(trust_domain, text).ok());
        if let Some(full) = full {
            *identity = full.as_str().into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(spec: Json) -> Operation {
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn what_cannot_be_known_of_a_connection_is_denied_and_not_allowed() {
        let admin = operation(serde_json::json!({ "ports": [80], "paths": ["/admin/*"] }));
        let bytes = |action, port| admin.holds(action, port, None);
        assert!(bytes(Action::Deny, 80) && !bytes(Action::Deny, 81));
        assert!(!bytes(Action::Allow, 80) && !bytes(Action::Audit, 80));
        assert!(operation(serde_json::json!({ "ports": [80] })).holds(Action::Allow, 80, None));
    }

    #[test]
    fn a_request_is_compared_with_all_that_is_given() {
        let one = operation(serde_json::json!({
            "methods": ["GET"], "paths": ["/a/*"], "headers": [{ "name": "X-Tenant", "values": ["blue", "green"] }],
        }));
        let headers = |value: &'static str| {
            HeaderMap::from_iter([("x-tenant".parse().unwrap(), HeaderValue::from_static(value))])
        };
        let holds = |method, path, headers: &HeaderMap| {
            [Action::Allow, Action::Deny].map(|action| one.holds(action, 80, Some(Request { method, path, headers })))
        };
        assert_eq!(holds("GET", "/a/b", &headers("green")), [true; 2]);
        for (method, path, headers) in [
            ("PUT", "/a/b", headers("green")),
            ("GET", "/a", headers("green")),
            ("GET", "/a/b", headers("red")),
            ("GET", "/a/b", HeaderMap::new()),
        ] {
            assert_eq!(holds(method, path, &headers), [false; 2], "{method} {path} {headers:?}");
        }
    }
}
