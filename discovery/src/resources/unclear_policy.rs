//! An AuthorizationPolicy that cannot be understood and was not before: what can be read of it all the same. Nobody knows
//! whom it would have let in, so what it is for must not be as open as without it.

use std::sync::Arc;

use meshd_identity::{SYSTEM_NAMESPACE, TrustDomain};
use serde::{Deserialize, Serialize};

use super::forms::LABEL;
use super::{Id, Kind, Meta, PolicyTarget, Resource};
use crate::yaml::{Field, Value};

pub type UnclearPolicy = super::Object<UnclearSpec>;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UnclearSpec {
    /// What it closes. `None`: nobody knows what it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_ref: Option<PolicyTarget>,
}

/// As which a document counts whose key says that it is this policy. `spec`: `None` where it cannot be read at all.
pub(super) fn stands_for(id: &Id, spec: Option<UnclearSpec>) -> Option<Resource> {
    let (namespace, name) = (id.namespace.clone(), id.name.clone());
    let metadata = Meta { namespace, name, created: None };
    let policy = UnclearPolicy { metadata, spec: spec.unwrap_or_default() };
    (id.kind == Kind::AuthorizationPolicy).then(|| Resource::Unclear(Arc::new(policy)))
}

/// What can be read of a document of that kind. `None`: it says that it decides nothing.
pub(super) fn read(root: &Field<'_>, ours: &TrustDomain) -> Option<UnclearSpec> {
    let Some(spec) = root.entry("spec") else { return Some(UnclearSpec::default()) };
    let is_dry = spec.entry("dryRun").is_some_and(|field| matches!(field.node.value, Value::Boolean(true)));
    if is_dry || spec.word("action") == Some("audit") {
        return None;
    }
    let metadata = root.entry("metadata");
    let namespace = metadata.as_ref().and_then(|metadata| metadata.word("namespace"));
    Some(UnclearSpec { target_ref: namespace.and_then(|namespace| target(&spec, namespace, ours)) })
}

/// Only of what a policy of that namespace may be for: a bad document closes nothing of others.
fn target(spec: &Field<'_>, namespace: &str, ours: &TrustDomain) -> Option<PolicyTarget> {
    let target = spec.entry("targetRef")?;
    let (kind, name) = (target.word("kind")?, target.word("name"));
    let is_own = match kind {
        "Service" | "MeshService" => name.is_some_and(|name| LABEL.check(name).is_ok()),
        "Namespace" => name.is_none_or(|name| name == namespace),
        "TrustDomain" => namespace == SYSTEM_NAMESPACE && name.is_none_or(|name| name == ours.as_str()),
        _ => false,
    };
    let elsewhere = target.entry("namespace").is_some() && target.word("namespace") != Some(namespace);
    let group = target.word("group").unwrap_or_default();
    (is_own && !elsewhere).then(|| PolicyTarget { group: group.into(), kind: kind.into(), name: name.map(Arc::from) })
}

#[cfg(test)]
mod tests {
    use crate::fake::trust_domain;
    use crate::resources::{Target, read};

    /// What a bad document counts as; `None`: nothing.
    fn closes(namespace: &str, spec: &str) -> Option<Vec<Target>> {
        let text = format!(
            "apiVersion: meshd.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{ name: bad, namespace: {namespace} }}\n\
             spec: {{ {spec}, nonsense: true }}\n"
        );
        let document = read(&text, &trust_domain()).remove(0);
        let id = document.id.clone().unwrap();
        assert!(document.outcome.is_err(), "{text}");
        document.meanwhile(&id).map(|resource| resource.targets())
    }

    #[test]
    fn what_a_bad_policy_is_for_is_read_where_it_can_be() {
        let service = Target::Service("payments.shop".parse().unwrap());
        let everybody = "targetRef: { group: meshd.dev, kind: TrustDomain }";
        for (namespace, spec, expected) in [
            ("shop", "targetRef: { kind: Service, name: payments }", service.clone()),
            // Also in the wrong group, and with more that is not known.
            ("shop", "targetRef: { kind: MeshService, name: payments, port: 80 }, action: dney", service),
            ("shop", "targetRef: { kind: Namespace }", Target::Namespace("shop".into())),
            ("meshd-system", everybody, Target::TrustDomain),
            // Nobody closes what is not theirs.
            ("shop", everybody, Target::Unknown),
            ("shop", "targetRef: { kind: Namespace, name: bank }", Target::Unknown),
            ("shop", "targetRef: { kind: Service, name: payments, namespace: bank }", Target::Unknown),
            ("shop", "targetRef: { kind: Service, name: \"a b\" }", Target::Unknown),
            ("shop", "targetRef: payments", Target::Unknown),
            ("shop", "targetRefs: []", Target::Unknown),
        ] {
            assert_eq!(closes(namespace, spec), Some(vec![expected]), "{spec}");
        }
    }

    #[test]
    fn a_trial_closes_nothing() {
        for trial in ["dryRun: true", "action: audit"] {
            assert_eq!(closes("shop", &format!("targetRef: {{ kind: Service, name: payments }}, {trial}")), None);
        }
        assert!(closes("shop", "targetRef: { kind: Service, name: payments }, dryRun: \"yes\"").is_some());
    }
}
