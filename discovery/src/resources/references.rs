//! How resources name services.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Target;
use super::forms::{GROUP, LABEL, SUBDOMAIN, WORD};
use super::shape::{Object, Shape};
use crate::ServiceName;
use crate::yaml::{Field, Problem, Value};

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
const GROUPS: &str =
    "a Service or Namespace is of the empty group, a MeshService or TrustDomain of group `meshd.dev`; write that";
const HOSTNAMES: &str =
    "routes between services apply whatever the host is (GEP-1426); match the header `Host` where it matters";

/// Services of Kubernetes and ours are one in the mesh; which of the two is meant makes no difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum ServiceKind {
    #[default]
    Service,
    MeshService,
}

/// Which service a route is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    #[serde(default)]
    pub group: Arc<str>,
    #[serde(default)]
    pub kind: ServiceKind,
    /// Of another namespace: a consumer route, which is for clients of the route's own namespace only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    pub name: Arc<str>,
    /// Only this port of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl Parent {
    pub fn service(&self, namespace: &str) -> Option<ServiceName> {
        ServiceName::new(&self.name, self.namespace.as_deref().unwrap_or(namespace)).ok()
    }
}

/// Where a share of requests or connections goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    #[serde(default)]
    pub group: Arc<str>,
    #[serde(default)]
    pub kind: ServiceKind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    pub name: Arc<str>,
    /// Of the service; absent: the port that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its share relative to the other backends of the rule; 0 gets nothing.
    #[serde(default = "one")]
    pub weight: u32,
    /// For what goes there only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<super::Filter>,
}

fn one() -> u32 {
    1
}

impl Backend {
    pub fn service(&self, namespace: &str) -> Option<ServiceName> {
        ServiceName::new(&self.name, self.namespace.as_deref().unwrap_or(namespace)).ok()
    }
}

/// What a policy is for; always of its own namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyTarget {
    #[serde(default)]
    pub group: Arc<str>,
    pub kind: Arc<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Arc<str>>,
}

impl PolicyTarget {
    pub fn target(&self, namespace: &Arc<str>) -> Option<Target> {
        match &*self.kind {
            "Namespace" => Some(Target::Namespace(namespace.clone())),
            "TrustDomain" => Some(Target::TrustDomain),
            _ => ServiceName::new(self.name.as_deref()?, namespace).ok().map(Target::Service),
        }
    }
}

/// What of parents that are services may say is checked by [`check_parents`]; the others are others' concern.
pub(super) fn parents() -> Shape {
    Shape::list_of_some(Shape::Anything, 32)
}

fn service_parent() -> Shape {
    let parent = Object::new()
        .may("group", &GROUP, "`\"\"` with a Service, `meshd.dev` with a MeshService")
        .may("kind", &WORD, "Service or MeshService")
        .may("namespace", &LABEL, "of the service; the route's own by default")
        .must("name", &SUBDOMAIN, "name: payments", "of the service")
        .may("port", Shape::integer(1, 65535), "only this port of the service; all by default")
        .refused("sectionName", "services have ports, not sections; use `port`");
    parent.into()
}

fn backend_object() -> Object {
    Object::new()
        .may("group", &GROUP, "`\"\"` with a Service, `meshd.dev` with a MeshService")
        .may("kind", Shape::words(&["Service", "MeshService"]), "Service or MeshService")
        .may("namespace", &LABEL, "of the service; that of this document by default")
        .must("name", &LABEL, "name: payments-v2", "of the service")
        .may("port", Shape::integer(1, 65535), "of the service; the one asked for by default")
        .cel(
            "has(self.kind) && self.kind == 'MeshService' ? has(self.group) && self.group == 'meshd.dev' : \
             !has(self.group) || self.group in ['', 'core']",
            GROUPS,
        )
}

/// Without a share: where copies go.
pub(super) fn backend_alone() -> Object {
    backend_object()
}

pub(super) fn backend() -> Object {
    backend_object().may("weight", Shape::integer(0, 1_000_000), "share relative to the other backends; 1 by default")
}

pub(super) fn backends(of: Object) -> Shape {
    Shape::list(of, 16)
}

pub(super) fn policy_target(kinds: &'static [&'static str]) -> Object {
    Object::new()
        .may("group", &GROUP, "`\"\"` with a Service or Namespace, `meshd.dev` with the other kinds")
        .must("kind", Shape::words(kinds), "kind: Service", "what the policy is for")
        .may("name", &LABEL, "of the service, which is of the policy's own namespace")
        .refused("namespace", "a policy is for what is in its own namespace; move it there")
        .refused("sectionName", "name ports in the policy's own rules")
        .cel(
            "self.kind in ['MeshService', 'TrustDomain'] ? has(self.group) && self.group == 'meshd.dev' : \
             !has(self.group) || self.group in ['', 'core']",
            GROUPS,
        )
        .cel(
            "!(self.kind in ['Service', 'MeshService']) || has(self.name)",
            "names no service; add `name`, or use kind Namespace for all of them",
        )
}

/// Which group goes with a kind.
fn group_of(kind: &str) -> Option<&'static str> {
    match kind {
        "Service" | "Namespace" => Some(""),
        "MeshService" | "TrustDomain" => Some("meshd.dev"),
        _ => None,
    }
}

/// Group and kind fit together; `without` is the group where none is given.
fn check_group(field: &Field<'_>, kind: &str, without: &str, problems: &mut Vec<Problem>) {
    let group = field.word("group").unwrap_or(without);
    let group = if group == "core" { "" } else { group };
    let Some(expected) = group_of(kind) else { return };
    if group != expected {
        field.refuse(
            problems,
            format!("a {kind} is of group `{expected}`, and this says `{group}`; write `group: \"{expected}\"`"),
        );
    }
}

/// True where a parent is a service.
pub(super) fn is_service_parent(parent: &Field<'_>) -> bool {
    names_service(parent.word("kind"), parent.word("group"))
}

/// A kind of that name in a group of somebody else is something else; the Gateway API's own group is a mistake to tell.
fn names_service(kind: Option<&str>, group: Option<&str>) -> bool {
    let group = group.unwrap_or(GATEWAY_GROUP);
    matches!(kind, Some("Service" | "MeshService")) && matches!(group, "" | "core" | "meshd.dev" | GATEWAY_GROUP)
}

/// Parents of other kinds are others' concern, as long as one is ours.
pub(super) fn check_parents(spec: &Field<'_>, problems: &mut Vec<Problem>) {
    let Some(refs) = spec.entry("parentRefs") else { return };
    let Value::List(_) = &refs.node.value else { return };
    let parents = refs.list(problems).unwrap_or_default();
    if !parents.is_empty() && !parents.iter().any(is_service_parent) {
        let advice = "write `{ group: \"\", kind: Service, name: NAME }` or `{ group: meshd.dev, kind: MeshService, name: NAME }`";
        refs.refuse(
            problems,
            format!("none is a Service or MeshService, and meshd carries traffic between services only; {advice}"),
        );
    }
    check_fields_of_gateways(spec, &parents, problems);
    for parent in &parents {
        if parent.entries().is_none() || is_service_parent(parent) {
            service_parent().check(parent, problems);
        }
        let Some(kind) = parent.word("kind").filter(|_| is_service_parent(parent)) else { continue };
        if let (Some(name), Some(field)) = (parent.word("name"), parent.entry("name"))
            && let Err(reason) = LABEL.check(name)
        {
            field.refuse(problems, reason);
        }
        check_group(parent, kind, GATEWAY_GROUP, problems);
    }
}

/// Beside a parent that gives them a meaning they are passed over (GEP-1426); else they would have none.
fn check_fields_of_gateways(spec: &Field<'_>, parents: &[Field<'_>], problems: &mut Vec<Problem>) {
    if !parents.iter().all(is_service_parent) {
        return;
    }
    for (name, instead) in [("hostnames", HOSTNAMES), ("useDefaultGateways", "meshd has no gateways; remove it")] {
        if let Some(field) = spec.entry(name) {
            field.refuse(problems, format!("is not supported by meshd: {instead}"));
        }
    }
}

/// Parents of other kinds are left out: others' concern.
pub(super) fn keep_services(spec: &mut Json) {
    let ours = |parent: &Json| names_service(parent["kind"].as_str(), parent["group"].as_str());
    if let Some(parents) = spec.get_mut("parentRefs").and_then(Json::as_array_mut) {
        parents.retain(ours);
    }
}

pub(super) fn check_backend(backend: &Field<'_>, problems: &mut Vec<Problem>) {
    check_group(backend, backend.word("kind").unwrap_or("Service"), "", problems);
}

pub(super) fn check_policy_target(spec: &Field<'_>, namespace: Option<&str>, problems: &mut Vec<Problem>) {
    let Some(target) = spec.entry("targetRef") else { return };
    let Some(kind) = target.word("kind") else { return };
    check_group(&target, kind, "", problems);
    let name = target.word("name");
    match kind {
        "Service" | "MeshService" if name.is_none() => {
            target.refuse(problems, "names no service; add `name: NAME`, or use kind Namespace for all of them");
        }
        "Namespace" if name.is_some() && name != namespace => {
            target.refuse(
                problems,
                "names another namespace than the policy's own; leave `name` out, or move the policy there",
            );
        }
        "TrustDomain" if namespace.is_some_and(|namespace| namespace != meshd_identity::SYSTEM_NAMESPACE) => {
            let system = meshd_identity::SYSTEM_NAMESPACE;
            target.refuse(
                problems,
                format!(
                    "a policy for everybody belongs into namespace {system}, so that who may write it is decided there"
                ),
            );
        }
        _ => {}
    }
}
