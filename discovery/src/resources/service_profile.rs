//! Linkerd's `ServiceProfile` (linkerd.io/v1alpha2), converted into an HTTPRoute and a ServicePolicy.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::alternatives::{Alternative, Condition, DEEPEST, MOST_MATCHES, alternatives, condition};
use super::forms::WORD;
use super::quantities::{go_duration, weights_of};
use super::read::converted;
use super::shape::{Object, Shape};
use super::{Kind, Resource};
use crate::ServiceName;
use crate::yaml::{Field, Problem};

/// Linkerd tries again for as long as its budget and the timeout let it; an HTTPRoute has no more.
const ATTEMPTS: u32 = 10;
/// Generated ones have a route for each operation of an API. Each has an expression at least, of which there are no more.
const MOST_ROUTES: usize = 64;
/// Of Linkerd's proxy, which takes ten retries for each request at most.
const MOST_RATIO: f64 = 10.0;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Profile {
    #[serde(default)]
    routes: Vec<Route>,
    retry_budget: Option<Budget>,
    #[serde(default)]
    dst_overrides: Vec<Destination>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Route {
    name: String,
    condition: Condition,
    #[serde(default)]
    response_classes: Vec<Class>,
    #[serde(default)]
    is_retryable: bool,
    timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Class {
    condition: Statuses,
    #[serde(default)]
    is_failure: bool,
}

impl Class {
    fn statuses(&self) -> RangeInclusive<u16> {
        let Range { min, max } = self.condition.status;
        // As in Linkerd, 0 is nothing in particular.
        let given = |bound: Option<u16>| bound.filter(|bound| *bound > 0);
        given(min).unwrap_or(100)..=given(max).unwrap_or(599)
    }
}

#[derive(Deserialize)]
struct Statuses {
    status: Range,
}

#[derive(Deserialize)]
struct Range {
    min: Option<u16>,
    max: Option<u16>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Budget {
    retry_ratio: f64,
    min_retries_per_second: u32,
    ttl: String,
}

#[derive(Deserialize)]
struct Destination {
    authority: String,
    weight: Json,
}

pub(super) fn spec() -> Object {
    const CLASSES: &str = "combined conditions cannot be converted; write a class for each range of statuses";
    let range = Object::new().may("min", Shape::integer(0, 599), "100 by default").may(
        "max",
        Shape::integer(0, 599),
        "599 by default",
    );
    let statuses = Object::new()
        .must("status", range, "status: { min: 500 }", "which")
        .refused("all", CLASSES)
        .refused("any", CLASSES)
        .refused("not", CLASSES);
    let class = Object::new()
        .must("condition", statuses, "condition: { status: { min: 500 } }", "which responses")
        .may("isFailure", Shape::Boolean, "false by default");
    let route = Object::new()
        .must("name", &WORD, "name: GET /", "for messages and metrics")
        .must("condition", condition(DEEPEST), "condition: { pathRegex: /x, method: GET }", "which requests")
        .may("responseClasses", Shape::list(class, 16), "which responses are failures, and so retried")
        .may("isRetryable", Shape::Boolean, "false by default")
        .may("timeout", &WORD, "of the whole request");
    let budget = Object::new()
        .must("retryRatio", Shape::Anything, "retryRatio: 0.2", "retries to requests")
        .must("minRetriesPerSecond", Shape::integer(0, 1000), "minRetriesPerSecond: 10", "that are free")
        .must("ttl", &WORD, "ttl: 10s", "for so long requests count");
    let destination = Object::new()
        .must("authority", &WORD, "authority: payments-v2.shop.svc.cluster.local:80", "where to")
        .must("weight", Shape::Anything, "weight: 1", "share relative to the others");
    Object::new()
        .may("routes", Shape::list(route, MOST_ROUTES), "the first that matches counts")
        .may("retryBudget", budget, "of the service")
        .may("dstOverrides", Shape::list(destination, 16), "where requests go instead")
        .may("opaquePorts", Shape::Anything, "passed over")
}

/// What is taken and does not do what it does in Linkerd.
pub(super) fn warnings(root: &Field<'_>) -> Vec<Problem> {
    let mut found = Vec::new();
    if let Some(ports) = root.entry("spec").and_then(|spec| spec.entry("opaquePorts")) {
        ports.refuse(&mut found, "is passed over; declare `protocol: tcp` on these ports of the service instead");
    }
    found
}

pub(super) fn convert(root: &Field<'_>, json: &Json) -> Result<Vec<Resource>, Vec<Problem>> {
    let mut problems = Vec::new();
    let converted = Converter { root, problems: &mut problems }.convert(json);
    match converted {
        Some(resources) if problems.is_empty() => Ok(resources),
        _ => Err(problems),
    }
}

struct Converter<'r, 'n> {
    root: &'r Field<'n>,
    problems: &'r mut Vec<Problem>,
}

impl Converter<'_, '_> {
    fn refuse(&mut self, field: &Field<'_>, reason: impl Into<String>) {
        field.refuse(self.problems, reason);
    }

    fn convert(mut self, json: &Json) -> Option<Vec<Resource>> {
        let root = Field { path: String::new(), node: self.root.node };
        let spec = root.entry("spec")?;
        let profile: Profile = match serde_json::from_value(json["spec"].clone()) {
            Ok(profile) => profile,
            Err(error) => {
                self.refuse(&spec, format!("cannot be converted: {error}"));
                return None;
            }
        };
        let metadata = root.entry("metadata")?;
        let namespace = metadata.word("namespace")?;
        let Some(service) = service_of(metadata.word("name")?) else {
            self.refuse(&metadata, "its name is not that of a service, NAME.NAMESPACE.svc.cluster.local; correct it");
            return None;
        };
        let backends = self.backends(&spec, &profile);
        let mut rules = Vec::new();
        for (route, field) in profile.routes.iter().zip(spec.items("routes")) {
            rules.push(self.rule(route, &field, &backends));
        }
        // What no route of a profile matches goes on all the same.
        rules.push(json!({ "backendRefs": backends }));
        let parent = json!({ "kind": "Service", "name": service.name(), "namespace": service.namespace() });
        let route_spec = json!({ "parentRefs": [parent], "rules": rules });
        let mut resources = Vec::new();
        self.push(&mut resources, Kind::HTTPRoute, &json["metadata"], &route_spec);
        if let Some(budget) = &profile.retry_budget {
            let field = spec.entry("retryBudget")?;
            if namespace != service.namespace() {
                self.refuse(
                    &field,
                    format!("is of the service; move it into a profile in namespace {}", service.namespace()),
                );
            }
            let target = json!({ "kind": "Service", "name": service.name() });
            let policy = json!({ "targetRef": target, "retryBudget": self.budget(&field, budget)? });
            self.push(&mut resources, Kind::ServicePolicy, &json["metadata"], &policy);
        }
        Some(resources)
    }

    fn push(&mut self, resources: &mut Vec<Resource>, kind: Kind, metadata: &Json, spec: &Json) {
        match converted(Kind::ServiceProfile, kind, metadata, spec) {
            Ok(resource) => resources.push(resource),
            Err(reason) => self.root.refuse(self.problems, format!("cannot be converted: {reason}")),
        }
    }

    fn rule(&mut self, route: &Route, field: &Field<'_>, backends: &[Json]) -> Json {
        let matches = alternatives(&route.condition);
        let matches = match matches {
            Ok(matches) if (1..=MOST_MATCHES).contains(&matches.len()) => matches,
            Ok(matches) => {
                self.refuse(
                    field,
                    format!(
                        "its condition becomes {} matches and 1 to {MOST_MATCHES} can be; split the route",
                        matches.len()
                    ),
                );
                Vec::new()
            }
            Err(reason) => {
                self.refuse(field, reason);
                Vec::new()
            }
        };
        let matches: Vec<Json> = matches.into_iter().map(Alternative::json).collect();
        let mut rule = json!({ "name": route.name, "matches": matches, "backendRefs": backends });
        if let Some(timeout) = &route.timeout {
            match go_duration(timeout) {
                Ok(timeout) => rule["timeouts"] = json!({ "request": timeout }),
                Err(reason) => self.refuse(
                    &field.entry("timeout").unwrap_or(Field { path: field.path.clone(), node: field.node }),
                    reason,
                ),
            }
        }
        if route.is_retryable {
            self.check_classes(route, field);
            rule["retry"] =
                json!({ "codes": failures(&route.response_classes), "attempts": ATTEMPTS, "nonIdempotent": true });
        }
        rule
    }

    fn check_classes(&mut self, route: &Route, field: &Field<'_>) {
        for (class, field) in route.response_classes.iter().zip(field.items("responseClasses")) {
            let statuses = class.statuses();
            if statuses.is_empty() {
                self.refuse(&field, "`max` is less than `min`; exchange them");
            }
            if class.is_failure && *statuses.start() < 400 {
                self.refuse(&field, "statuses below 400 cannot be retried; let its failures begin at `min: 400`");
            }
        }
    }

    fn budget(&mut self, field: &Field<'_>, budget: &Budget) -> Option<Json> {
        if !(0.0..=MOST_RATIO).contains(&budget.retry_ratio) {
            self.refuse(field, format!("`retryRatio` must be from 0 to {MOST_RATIO}"));
            return None;
        }
        let window = match go_duration(&budget.ttl) {
            Ok(ttl) if (1..=60).contains(&ttl.get().as_secs()) => ttl,
            Ok(_) => {
                self.refuse(field, "`ttl` must be from 1s to 60s");
                return None;
            }
            Err(reason) => {
                self.refuse(field, format!("`ttl`: {reason}"));
                return None;
            }
        };
        let percent = (budget.retry_ratio * 100.0).round() as u32;
        if percent == 0 && budget.retry_ratio > 0.0 {
            self.refuse(
                field,
                "`retryRatio` is less than one in a hundred, which would be none; write 0 or at least 0.01",
            );
            return None;
        }
        Some(json!({ "percent": percent, "minPerSecond": budget.min_retries_per_second, "window": window }))
    }

    fn backends(&mut self, spec: &Field<'_>, profile: &Profile) -> Vec<Json> {
        let written: Vec<Json> = profile.dst_overrides.iter().map(|destination| destination.weight.clone()).collect();
        let weights = weights_of(&written);
        let mut backends = Vec::new();
        for (n, (destination, field)) in profile.dst_overrides.iter().zip(spec.items("dstOverrides")).enumerate() {
            let (host, port) = match destination.authority.rsplit_once(':') {
                Some((host, port)) => (host, port.parse::<u16>().ok().filter(|port| *port > 0).map(Some)),
                None => (destination.authority.as_str(), Some(None)),
            };
            match (service_of(host), port, &weights) {
                (Some(service), Some(port), Some(weights)) => backends.push(json!({
                    "name": service.name(), "namespace": service.namespace(), "port": port, "weight": weights[n]
                })),
                _ => self.refuse(
                    &field,
                    "cannot be converted; write `authority: NAME.NAMESPACE.svc.cluster.local:PORT` and weights up to 1000000",
                ),
            }
        }
        backends
    }
}

/// `payments.shop.svc.cluster.local`, whatever the cluster's domain is.
pub(super) fn service_of(name: &str) -> Option<ServiceName> {
    let mut labels = name.trim_end_matches('.').split('.');
    let (name, namespace) = (labels.next()?, labels.next()?);
    match labels.next() {
        None | Some("svc") => ServiceName::new(name, namespace).ok(),
        Some(_) => None,
    }
}

/// The statuses that count as failures: those of 5xx, but where a class says otherwise; the first that matches counts.
fn failures(classes: &[Class]) -> Vec<u16> {
    let mut judged: BTreeMap<u16, bool> = BTreeMap::new();
    for class in classes {
        for status in class.statuses() {
            judged.entry(status).or_insert(class.is_failure);
        }
    }
    (400..600).filter(|status| judged.get(status).copied().unwrap_or(*status >= 500)).collect()
}
