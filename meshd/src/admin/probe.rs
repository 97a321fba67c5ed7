//! `meshd probe`'s side in the daemon: what it knows of a caller and a target, and how the announced connection ended.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use meshd_discovery::Endpoint;
use serde::{Deserialize, Serialize};

use super::control::refusal;
use super::view::{View, seconds_until};
use crate::enrol::Workload;
use crate::telemetry::ConnectionEvent;

/// How long the end of a connection is waited for that its client has closed already.
const ENDING: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(10);

/// What is about to be tried.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProbeRequest {
    /// The name of the unit, or the uid where there is none.
    pub unit: Option<String>,
    pub uid: Option<u32>,
    /// For the audit log.
    pub url: String,
    /// What the URL's name stands for.
    pub address: SocketAddr,
    /// The port it will come from.
    pub source_port: u16,
}

/// What the daemon knows before the connection is made.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct ProbeView {
    pub identity: Option<String>,
    /// The selector that gives it.
    pub enrolled_by: Option<String>,
    /// Seconds until its certificate ends; absent while the PKI has issued none.
    pub certificate_expires_in_s: Option<i64>,
    pub pki_refusal: Option<String>,
    /// The service that has the address.
    pub service: Option<String>,
    pub has_port: bool,
    pub endpoints: Vec<ProbeEndpoint>,
    /// As `meshd-pki entry add` wants it.
    pub host_id: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct ProbeEndpoint {
    pub dial: SocketAddr,
    pub identity: String,
    pub transport: String,
    pub zone: String,
    pub health: String,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct OutcomeAsked {
    pub source_port: u16,
}

/// How the connection went, as the access log would tell it.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProbeOutcome {
    /// `ok`, or a name of the error list.
    pub outcome: String,
    pub unit: Option<String>,
    pub client_id: Option<String>,
    pub server_id: Option<String>,
    pub service: Option<String>,
    pub endpoint: Option<SocketAddr>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

pub(super) fn routes(view: Arc<View>) -> Router {
    Router::new().route("/probe", post(announce)).route("/probe/outcome", post(outcome)).with_state(view)
}

async fn announce(State(view): State<Arc<View>>, Json(request): Json<ProbeRequest>) -> Json<ProbeView> {
    let ProbeRequest { unit, uid, url, address, source_port } = &request;
    tracing::info!(target: "audit", unit, uid, url, %address, source_port, "probe");
    view.telemetry().probes.announce(*source_port, Instant::now());
    Json(known(&view, &request))
}

async fn outcome(State(view): State<Arc<View>>, Json(asked): Json<OutcomeAsked>) -> Response {
    let give_up = Instant::now() + ENDING;
    loop {
        if let Some(event) = view.telemetry().probes.take(asked.source_port) {
            return Json(ProbeOutcome::from(event)).into_response();
        }
        if Instant::now() >= give_up {
            return refusal(StatusCode::NOT_FOUND, &"meshd saw no such connection end: it was not captured");
        }
        tokio::time::sleep(TICK).await;
    }
}

fn known(view: &View, request: &ProbeRequest) -> ProbeView {
    let mut known = ProbeView { host_id: view.credentials().host_id.clone(), ..ProbeView::default() };
    if let Some(workload) = workload(view, request) {
        tell_identity(view, &workload, &mut known);
    }
    let shared = view.shared();
    let Some(name) = shared.vips.service_of(request.address.ip()) else { return known };
    known.service = Some(name.to_string());
    if let Some(service) = shared.directory.load().get(&name) {
        known.has_port = service.port(request.address.port()).is_some();
        known.endpoints = service.endpoints_on(request.address.port()).map(|endpoint| row(endpoint)).collect();
    }
    known
}

fn workload(view: &View, request: &ProbeRequest) -> Option<Arc<Workload>> {
    let shared = view.shared();
    let enrolment = shared.enrolment.load();
    let unit: Option<Arc<str>> = request.unit.as_deref().map(Arc::from);
    let found = match (&unit, request.uid) {
        (Some(unit), _) => enrolment.workload_of_unit(unit),
        (None, Some(uid)) => enrolment.workload_of(None, uid),
        (None, None) => None,
    };
    let by_port = || {
        let port = shared.ports.owners().port_of(unit.as_ref(), request.uid)?;
        enrolment.ports().find(|(enrolled, _)| *enrolled == port).map(|(_, workload)| workload)
    };
    found.or_else(by_port).cloned()
}

fn tell_identity(view: &View, workload: &Workload, known: &mut ProbeView) {
    let credentials = view.credentials();
    known.identity = Some(workload.identity.to_string());
    known.enrolled_by = Some(format!("{} ({})", workload.selector, workload.origin));
    known.certificate_expires_in_s =
        credentials.workloads.get(&workload.identity).map(|svid| seconds_until(svid.not_after));
    known.pki_refusal = credentials.refused.get(&workload.identity).cloned();
}

fn row(endpoint: &Endpoint) -> ProbeEndpoint {
    ProbeEndpoint {
        dial: endpoint.dial,
        identity: endpoint.identity.to_string(),
        transport: format!("{:?}", endpoint.transport).to_lowercase(),
        zone: endpoint.zone.to_string(),
        health: format!("{:?}", endpoint.health).to_lowercase(),
    }
}

impl From<ConnectionEvent> for ProbeOutcome {
    fn from(event: ConnectionEvent) -> ProbeOutcome {
        ProbeOutcome {
            outcome: event.outcome.to_owned(),
            unit: event.unit.map(|unit| unit.to_string()),
            client_id: event.client_id.map(|id| id.to_string()),
            server_id: event.server_id.map(|id| id.to_string()),
            service: event.service.map(|service| format!("{service}:{}", event.port)),
            endpoint: event.endpoint,
            bytes_sent: event.bytes_sent,
            bytes_received: event.bytes_received,
        }
    }
}
