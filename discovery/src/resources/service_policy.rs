//! `ServicePolicy` (meshd.dev/v1alpha1): how clients treat a service.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::forms::{BUDGET_WINDOW, DURATION, HEADER, RATE_WINDOW, SOME_TIME};
use super::references::{backend, backends, check_backend, check_policy_target, policy_target};
use super::shape::{Object, Rule, Shape, Unique};
use super::values::span_of;
use super::{Backend, PolicyTarget, Span};
use crate::yaml::{Field, Problem, Value};

pub type ServicePolicy = super::Object<ServiceSpec>;

/// What is absent is as it is without a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    pub target_ref: PolicyTarget,
    #[serde(default)]
    pub balancing: Balancing,
    #[serde(default)]
    pub retry_budget: RetryBudget,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<Retries>,
    #[serde(default)]
    pub outlier_ejection: OutlierEjection,
    #[serde(default)]
    pub timeouts: PolicyTimeouts,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rate_limits: Vec<RateLimit>,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<Failover>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Balancing {
    pub algorithm: Algorithm,
    /// What the ring is entered by: this header of requests. Absent: the client's identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_header: Option<Arc<str>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Algorithm {
    /// The better of two by latency, as an average that forgets, times what is under way.
    #[default]
    PeakEwma,
    /// The better of two by what is under way.
    LeastRequest,
    /// The same client, or value of a header, to the same endpoint.
    RingHash,
}

/// Retries are at most this share of requests, plus a few for services that are asked rarely.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryBudget {
    pub percent: u32,
    /// Retries a second that are free.
    pub min_per_second: u32,
    /// Requests of so long ago still count.
    pub window: Span,
}

impl Default for RetryBudget {
    /// Linkerd's.
    fn default() -> RetryBudget {
        RetryBudget { percent: 20, min_per_second: 10, window: Span::from_millis(10_000) }
    }
}

/// For requests of the service that no route says otherwise of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Retries {
    pub attempts: u32,
    pub statuses: Vec<u16>,
    pub backoff: Span,
    /// Of each try; absent: as long as the request may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_try_timeout: Option<Span>,
    /// Also what may be done only once, such as a POST.
    pub non_idempotent: bool,
}

impl Default for Retries {
    fn default() -> Retries {
        Retries {
            attempts: 1,
            statuses: vec![502, 503, 504],
            backoff: Span::from_millis(25),
            per_try_timeout: None,
            non_idempotent: false,
        }
    }
}

/// Endpoints that fail are left alone for a while. Never all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierEjection {
    /// Failures in a row that eject; 0: never for that.
    pub consecutive_failures: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<SuccessRate>,
    /// The first time for so long, twice as long each further time in a row, at most `max_time`.
    pub min_time: Span,
    pub max_time: Span,
    /// Of the endpoints of a service.
    pub max_percent: u32,
}

impl Default for OutlierEjection {
    /// Failures and times are Linkerd's.
    fn default() -> OutlierEjection {
        OutlierEjection {
            consecutive_failures: 7,
            success_rate: None,
            min_time: Span::from_millis(1000),
            max_time: Span::from_millis(60_000),
            max_percent: 50,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SuccessRate {
    /// Below it an endpoint is ejected.
    pub min_percent: u32,
    /// With fewer in the window nothing is concluded.
    pub min_requests: u32,
    pub window: Span,
}

impl Default for SuccessRate {
    fn default() -> SuccessRate {
        SuccessRate { min_percent: 80, min_requests: 20, window: Span::from_millis(10_000) }
    }
}

/// `0s` is none, as is what is absent but for `connect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyTimeouts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect: Option<Span>,
    /// Of a whole request with its retries, where its route does not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Span>,
    /// Until the response begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<Span>,
    /// Without a byte in either direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<Span>,
}

/// By each host that serves the service, on its own. Beyond it: 429.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    pub per: Per,
    pub requests_per_second: u32,
    /// So many at once after a pause; as many as in a second, unless told otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Per {
    Service,
    Route,
    /// Each client's identity.
    Client,
}

/// For each endpoint, as one host counts. Absent: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Limits {
    /// At once. Of programs' connections, which for requests are streams of pooled ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
    /// Under way at once. Beyond it: 503 with Retry-After.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Failover {
    /// False: all endpoints alike, wherever they are.
    pub prefer_near: bool,
    /// With less of the weight of the nearest endpoints working, farther ones are added.
    pub below_percent: u32,
    /// With so much of it working for `hold_for` without a break, they are left again.
    pub above_percent: u32,
    pub hold_for: Span,
    /// Services that take over, in this order, when no endpoint of this one works.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub backend_refs: Vec<Backend>,
}

impl Default for Failover {
    fn default() -> Failover {
        Failover {
            prefer_near: true,
            below_percent: 50,
            above_percent: 70,
            hold_for: Span::from_millis(10_000),
            backend_refs: Vec::new(),
        }
    }
}

pub(super) fn spec() -> Object {
    let target = policy_target(&["Service", "MeshService"]);
    Object::new()
        .must("targetRef", target, "targetRef: { group: \"\", kind: Service, name: payments }", "which service")
        .may("balancing", balancing(), "how an endpoint is chosen")
        .may("retryBudget", retry_budget(), "how many retries there may be; always on")
        .may("retries", retries(), "what is tried again where no route says; nothing by default")
        .may("outlierEjection", outlier_ejection(), "when endpoints that fail are left alone")
        .may("timeouts", timeouts(), "how long things may take")
        .may(
            "rateLimits",
            Shape::list_of_some(rate_limit(), 3).unique(Unique::By("per")),
            "how much each serving host takes; beyond it 429",
        )
        .may("limits", limits(), "how much at once, for each endpoint as each client host counts")
        .may("failover", failover(), "when farther endpoints or other services take over")
}

fn balancing() -> Object {
    Object::new()
        .may("algorithm", Shape::words(&["peakEwma", "leastRequest", "ringHash"]), "peakEwma by default")
        .may(
            "hashHeader",
            &HEADER,
            "with ringHash: the header requests are sorted by; the client's identity by default",
        )
        .cel(
            "!has(self.hashHeader) || (has(self.algorithm) && self.algorithm == 'ringHash')",
            "`hashHeader` has a meaning with `algorithm: ringHash` only; add that, or remove it",
        )
}

fn retry_budget() -> Object {
    Object::new()
        .may("percent", Shape::integer(0, 1000), "of requests; 20 by default")
        .may("minPerSecond", Shape::integer(0, 1000), "retries a second that are free; 10 by default")
        .may("window", &BUDGET_WINDOW, "requests of so long ago still count, 1s to 60s; 10s by default")
}

fn retries() -> Object {
    Object::new()
        .may("attempts", Shape::integer(0, 10), "at most so many retries of one request; 1 by default")
        .may(
            "statuses",
            Shape::list_of_some(Shape::integer(400, 599), 64),
            "that are retried; 502, 503, 504 by default",
        )
        .may("backoff", &DURATION, "at least so long between two tries; 25ms by default")
        .may("perTryTimeout", &SOME_TIME, "of each try; none by default")
        .may("nonIdempotent", Shape::Boolean, "also POST and PATCH; false by default")
}

fn outlier_ejection() -> Object {
    let rate = Object::new()
        .may("minPercent", Shape::integer(1, 100), "below it an endpoint is ejected; 80 by default")
        .may("minRequests", Shape::integer(1, 100_000), "with fewer nothing is concluded; 20 by default")
        .may("window", &RATE_WINDOW, "1s to 10m; 10s by default");
    Object::new()
        .may("consecutiveFailures", Shape::integer(0, 1000), "in a row that eject, 0 for never; 7 by default")
        .may("successRate", rate, "ejects by share; off by default")
        .may("minTime", &SOME_TIME, "of the first ejection; 1s by default")
        .may("maxTime", &SOME_TIME, "of any; 60s by default")
        .may("maxPercent", Shape::integer(0, 100), "of the endpoints, and never all; 50 by default")
        .cel(
            "duration(has(self.minTime) ? self.minTime : '1s') <= duration(has(self.maxTime) ? self.maxTime : '60s')",
            "`minTime` is longer than `maxTime`; shorten it, or lengthen the other",
        )
}

fn timeouts() -> Object {
    Object::new()
        .may("connect", &SOME_TIME, "until an endpoint has answered and proved its identity")
        .may("request", &DURATION, "of a whole request with its retries")
        .may("response", &DURATION, "until the response begins")
        .may("idle", &DURATION, "without a byte in either direction")
        .rule(Rule::AtLeastOne(&["connect", "request", "response", "idle"]))
}

fn rate_limit() -> Object {
    Object::new()
        .must("per", Shape::words(&["service", "route", "client"]), "per: client", "what is counted apart")
        .must("requestsPerSecond", Shape::integer(1, 10_000_000), "requestsPerSecond: 100", "on average")
        .may("burst", Shape::integer(1, 10_000_000), "at once after a pause; those of a second by default")
}

fn limits() -> Object {
    Object::new()
        .may("maxConnections", Shape::integer(1, 1_000_000), "at once")
        .may("maxRequests", Shape::integer(1, 1_000_000), "under way at once")
        .rule(Rule::AtLeastOne(&["maxConnections", "maxRequests"]))
}

fn failover() -> Object {
    Object::new()
        .may("preferNear", Shape::Boolean, "false: all endpoints alike; true by default")
        .may(
            "belowPercent",
            Shape::integer(1, 100),
            "of the near weight working: farther ones are added; 50 by default",
        )
        .may("abovePercent", Shape::integer(1, 100), "of it working: they are left again; 70 by default")
        .may("holdFor", &DURATION, "for so long without a break; 10s by default")
        .may("backendRefs", backends(backend()), "services that take over, in this order")
        .cel(
            "(has(self.belowPercent) ? self.belowPercent : 50) <= (has(self.abovePercent) ? self.abovePercent : 70)",
            "`belowPercent` is more than `abovePercent`, so that traffic would go to and fro; lower it",
        )
}

pub(super) fn check(spec: &Field<'_>, namespace: Option<&str>, problems: &mut Vec<Problem>) {
    check_policy_target(spec, namespace, problems);
    if let Some(balancing) = spec.entry("balancing")
        && let Some(header) = balancing.entry("hashHeader")
        && balancing.word("algorithm") != Some("ringHash")
    {
        header.refuse(problems, "has a meaning with `algorithm: ringHash` only; add that, or remove it");
    }
    if let Some(ejection) = spec.entry("outlierEjection") {
        let span =
            |name, default: u64| ejection.word(name).map_or(Ok(std::time::Duration::from_millis(default)), span_of);
        if let (Ok(least), Ok(most)) = (span("minTime", 1000), span("maxTime", 60_000))
            && least > most
        {
            ejection.refuse(problems, "`minTime` is longer than `maxTime`; shorten it, or lengthen the other");
        }
    }
    check_failover(spec, problems);
}

fn check_failover(spec: &Field<'_>, problems: &mut Vec<Problem>) {
    let Some(failover) = spec.entry("failover") else { return };
    let number = |name, default| match failover.entry(name).map(|field| &field.node.value) {
        Some(Value::Integer(number)) => *number,
        _ => default,
    };
    if number("belowPercent", 50) > number("abovePercent", 70) {
        failover.refuse(
            problems,
            "`belowPercent` is more than `abovePercent`, so that traffic would go to and fro; lower it",
        );
    }
    failover.items("backendRefs").iter().for_each(|backend| check_backend(backend, problems));
}
