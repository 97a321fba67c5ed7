//! Linkerd's `ServiceProfile` (linkerd.io/v1alpha2), converted into an HTTPRoute and a ServicePolicy.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::forms::{EXPRESSION, METHOD, WORD};
use super::read::resource;
use super::shape::{Object, Rule, Shape};
use super::values::span_of;
use super::{Kind, Resource};
use crate::ServiceName;
use crate::yaml::{Field, Problem};

/// A rule of an HTTPRoute has no more.
const MOST_MATCHES: usize = 64;
/// Linkerd tries again for as long as its budget and the timeout let it; an HTTPRoute has no more.
const ATTEMPTS: u32 = 10;
/// The Gateway API's own limit.
const MOST_WEIGHT: f64 = 1_000_000.0;
/// Conditions within conditions.
const DEEPEST: usize = 4;

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

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Condition {
    all: Vec<Condition>,
    any: Vec<Condition>,
    path_regex: Option<String>,
    method: Option<String>,
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
        min.unwrap_or(100)..=max.unwrap_or(599)
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

fn condition(depth: usize) -> Object {
    let leaf = Object::new()
        .may("pathRegex", &EXPRESSION, "of the whole path")
        .may("method", &METHOD, "of the request")
        .refused("not", "an HTTPRoute cannot say what does not match; put a rule for it before this one");
    if depth == 0 {
        return leaf;
    }
    leaf.may("all", Shape::list_of_some(condition(depth - 1), 16), "all of them")
        .may("any", Shape::list_of_some(condition(depth - 1), 64), "any of them")
        .rule(Rule::AtLeastOne(&["all", "any", "pathRegex", "method"]))
}

pub(super) fn spec() -> Object {
    const CLASSES: &str = "combined conditions cannot be converted; write a class for each range of statuses";
    let range = Object::new().may("min", Shape::integer(100, 599), "100 by default").may(
        "max",
        Shape::integer(100, 599),
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
        .may("routes", Shape::list(route, 15), "the first that matches counts")
        .may("retryBudget", budget, "of the service")
        .may("dstOverrides", Shape::list(destination, 16), "where requests go instead")
        .refused("opaquePorts", "declare `protocol: tcp` on the service's port instead")
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
        match resource(kind, metadata, spec) {
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
            match span_of(timeout) {
                Ok(_) => rule["timeouts"] = json!({ "request": timeout }),
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
        if !(0.0..=1.0).contains(&budget.retry_ratio) {
            self.refuse(field, "`retryRatio` must be from 0 to 1");
            return None;
        }
        match span_of(&budget.ttl) {
            Ok(ttl) if (1..=60).contains(&ttl.as_secs()) => {}
            Ok(_) => {
                self.refuse(field, "`ttl` must be from 1s to 60s");
                return None;
            }
            Err(reason) => {
                self.refuse(field, format!("`ttl`: {reason}"));
                return None;
            }
        }
        let percent = (budget.retry_ratio * 100.0).round() as u32;
        if percent == 0 && budget.retry_ratio > 0.0 {
            self.refuse(
                field,
                "`retryRatio` is less than one in a hundred, which would be none; write 0 or at least 0.01",
            );
            return None;
        }
        Some(json!({ "percent": percent, "minPerSecond": budget.min_retries_per_second, "window": budget.ttl }))
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

/// Quantities of Kubernetes (`1`, `0.5`, `500m`) as whole weights: in thousandths, if they are not whole.
pub(super) fn weights_of(weights: &[Json]) -> Option<Vec<u32>> {
    let thousandths: Vec<f64> = weights.iter().map(thousandths).collect::<Option<_>>()?;
    let whole = thousandths.iter().all(|weight| weight % 1000.0 == 0.0);
    let unit = if whole { 1000.0 } else { 1.0 };
    let weight = |weight: &f64| (0.0..=MOST_WEIGHT).contains(&(weight / unit)).then(|| (weight / unit).round() as u32);
    thousandths.iter().map(weight).collect()
}

fn thousandths(weight: &Json) -> Option<f64> {
    match weight {
        Json::Number(number) => Some(number.as_f64()? * 1000.0),
        Json::String(text) => match text.strip_suffix('m') {
            Some(thousandths) => thousandths.parse::<u32>().ok().map(f64::from),
            None => Some(text.parse::<f64>().ok()? * 1000.0),
        },
        _ => None,
    }
}

#[derive(Clone, Default)]
struct Alternative {
    path: Option<String>,
    method: Option<String>,
}

impl Alternative {
    fn json(self) -> Json {
        let mut found = json!({});
        // Also where any path will do: among expressions the first rule holds, as in a profile, and a prefix comes later.
        let path = self.path.unwrap_or_else(|| ".*".to_owned());
        found["path"] = json!({ "type": "RegularExpression", "value": path });
        if let Some(method) = self.method {
            found["method"] = method.into();
        }
        found
    }

    fn and(mut self, other: &Alternative) -> Result<Alternative, &'static str> {
        for (mine, theirs) in [(&mut self.path, &other.path), (&mut self.method, &other.method)] {
            if mine.is_some() && theirs.is_some() && mine != theirs {
                return Err(
                    "asks one request to match two paths or methods, which an HTTPRoute cannot; write one expression",
                );
            }
            *mine = mine.take().or_else(|| theirs.clone());
        }
        Ok(self)
    }
}

/// A condition as any of several, each of which is all of its parts.
fn alternatives(condition: &Condition) -> Result<Vec<Alternative>, &'static str> {
    let own = Alternative { path: condition.path_regex.clone(), method: condition.method.clone() };
    let mut found = vec![own];
    let any: Result<Vec<_>, _> = condition.any.iter().map(alternatives).collect();
    let any = any?.concat();
    let parts = condition.all.iter().map(alternatives).chain((!any.is_empty()).then_some(Ok(any)));
    for part in parts {
        let part = part?;
        if found.len() * part.len() > MOST_MATCHES {
            return Err("its condition becomes too many matches; split the route");
        }
        let both = found.iter().flat_map(|one| part.iter().map(|other| one.clone().and(other)));
        found = both.collect::<Result<_, _>>()?;
    }
    Ok(found)
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
