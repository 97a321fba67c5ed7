//! SMI's `TrafficSplit` (split.smi-spec.io/v1alpha1 to v1alpha4), converted into an HTTPRoute for requests and a TCPRoute
//! for connections that are carried as bytes.

use serde_json::{Value as Json, json};

use super::forms::WORD;
use super::quantities::weights_of;
use super::read::converted;
use super::service_profile::service_of;
use super::shape::{Object, Shape};
use super::{Kind, Resource};
use crate::ServiceName;
use crate::yaml::{Field, Problem};

pub(super) fn spec() -> Object {
    let backend = Object::new().must("service", &WORD, "service: payments-v2", "of the split's own namespace").must(
        "weight",
        Shape::Anything,
        "weight: 10",
        "share relative to the others",
    );
    Object::new()
        .must("service", &WORD, "service: payments", "which clients ask for")
        .must(
            "backends",
            Shape::list_of_some(backend, 16),
            "backends: [ { service: payments-v2, weight: 10 } ]",
            "where to",
        )
        .refused("matches", "write an HTTPRoute with these header matches instead of the HTTPRouteGroup")
}

pub(super) fn convert(root: &Field<'_>, json: &Json) -> Result<Vec<Resource>, Vec<Problem>> {
    let mut problems = Vec::new();
    let (Some(spec), Some(metadata)) = (root.entry("spec"), root.entry("metadata")) else { return Ok(Vec::new()) };
    let namespace = metadata.word("namespace").unwrap_or_default();
    // A bare name, or in full.
    let named = |text: &str| match text.contains('.') {
        true => service_of(text).filter(|service| service.namespace() == namespace),
        false => ServiceName::new(text, namespace).ok(),
    };
    let service = spec.word("service").and_then(named);
    if service.is_none() {
        spec.refuse(&mut problems, "`service` is not the name of a service of this namespace; correct it");
    }
    let mut backends = Vec::new();
    let fields = spec.items("backends");
    let written: Vec<Json> =
        fields.iter().map(|field| field.entry("weight").map_or(Json::Null, |weight| weight.node.to_json())).collect();
    let weights = weights_of(&written);
    for (n, field) in fields.iter().enumerate() {
        match (field.word("service").and_then(named), &weights) {
            (Some(service), Some(weights)) => backends.push(json!({ "name": service.name(), "weight": weights[n] })),
            _ => field.refuse(
                &mut problems,
                "needs a service of this namespace, and weights such as 10 or 500m up to 1000000; correct it",
            ),
        }
    }
    let Some(service) = service.filter(|_| problems.is_empty()) else { return Err(problems) };
    let spec = json!({
        "parentRefs": [{ "kind": "Service", "name": service.name() }],
        "rules": [{ "backendRefs": backends }],
    });
    let made =
        [Kind::HTTPRoute, Kind::TCPRoute].map(|kind| converted(Kind::TrafficSplit, kind, &json["metadata"], &spec));
    made.into_iter().collect::<Result<_, _>>().map_err(|reason| {
        vec![Problem {
            line: root.node.line,
            field: "spec".to_owned(),
            reason: format!("cannot be converted: {reason}"),
        }]
    })
}
