//! `AuthorizationPolicy` (meshd.dev/v1alpha1): who may do what, as the host that serves decides it.

use std::net::IpAddr;
use std::sync::Arc;

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

/// All that is given of it, each by any of its values. What names methods, paths or headers is about requests, and never
/// holds for a connection that is carried as bytes.
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
        .may("networks", Shape::list_of_some(&NETWORK, 256), "where the client's host is, such as 10.0.0.0/8")
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
    let rule = Object::new().may("from", Shape::list_of_some(from, 64), "any of them; everybody by default").may(
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
}

pub(super) fn check(spec: &Field<'_>, namespace: Option<&str>, problems: &mut Vec<Problem>) {
    check_policy_target(spec, namespace, problems);
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
