//! `meshd endpoints`: where services run, and who says so.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use meshd_discovery::{Endpoint, Health, Losses, SourceHealth, Transport};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::control::outcome;
use super::show::table;
use super::view::View;
use crate::proxy::Shared;

/// A row of `meshd endpoints`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    pub service: String,
    pub port: u16,
    /// Where the mesh is dialled, and what the application listens on.
    pub dial: String,
    pub target: String,
    pub identity: String,
    pub transport: String,
    pub zone: String,
    pub network: String,
    pub weight: u32,
    pub source: String,
    pub healthy: bool,
    /// Its source no longer names it, which is not believed yet.
    pub stale: bool,
    /// Since the source was last known to be current, in seconds.
    pub age: Option<u64>,
}

/// What `/endpoints/accept` is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct AcceptOrder {
    pub source: String,
}

impl EndpointView {
    /// What its source says of it, in a word.
    pub fn state(&self) -> &'static str {
        match (self.stale, self.healthy) {
            (true, _) => "stale",
            (false, true) => "healthy",
            (false, false) => "unhealthy",
        }
    }
}

pub(super) fn routes(view: Arc<View>) -> Router {
    Router::new()
        .route("/endpoints", get(|State(view): State<Arc<View>>| async move { Json(view.endpoints()) }))
        .with_state(view)
}

/// For root: an operator says that what a source lost is gone indeed.
pub(super) fn orders(losses: Losses) -> Router {
    let accept = |State(losses): State<Losses>, Json(order): Json<AcceptOrder>| async move {
        let answer: Response = outcome(losses.accept(order.source)).await;
        answer
    };
    Router::new().route("/endpoints/accept", post(accept)).with_state(losses)
}

/// All endpoints of the directory, in the order of their services.
pub(super) fn rows(shared: &Shared, sources: &watch::Receiver<Arc<Vec<SourceHealth>>>) -> Vec<EndpointView> {
    let directory = shared.directory.load();
    let sources = sources.borrow().clone();
    let age = |source: &str| {
        let health = sources.iter().find(|health| health.name == source)?;
        Some(health.last_ok?.elapsed().unwrap_or_default().as_secs())
    };
    let endpoints = directory.services().flat_map(|service| &service.endpoints);
    endpoints.map(|endpoint| row(endpoint, age(&endpoint.source))).collect()
}

fn row(endpoint: &Endpoint, age: Option<u64>) -> EndpointView {
    let transport = Transport::NAMES.iter().find(|(_, transport)| *transport == endpoint.transport);
    EndpointView {
        service: endpoint.service.to_string(),
        port: endpoint.port,
        dial: endpoint.dial.to_string(),
        target: endpoint.target.to_string(),
        identity: endpoint.identity.to_string(),
        transport: transport.map_or("", |(name, _)| name).to_owned(),
        zone: endpoint.zone.to_string(),
        network: endpoint.network.to_string(),
        weight: endpoint.weight,
        source: endpoint.source.to_string(),
        healthy: endpoint.health == Health::Healthy,
        stale: endpoint.stale,
        age,
    }
}

pub fn endpoints(rows: &[EndpointView]) -> String {
    let rows = rows.iter().map(|row| {
        let zone = if row.zone.is_empty() { "-" } else { &row.zone };
        let age = row.age.map_or_else(|| "never".to_owned(), |age| super::show::duration(age as i64));
        vec![
            row.service.clone(),
            row.port.to_string(),
            row.dial.clone(),
            row.identity.clone(),
            row.transport.clone(),
            zone.to_owned(),
            row.weight.to_string(),
            row.state().to_owned(),
            row.source.clone(),
            age,
        ]
    });
    let columns = ["SERVICE", "PORT", "ADDRESS", "IDENTITY", "TRANSPORT", "ZONE", "WEIGHT", "STATE", "SOURCE", "AGE"];
    table(&columns, rows.collect())
}

#[cfg(test)]
mod tests {
    use meshd_discovery::fake;

    use super::*;

    #[test]
    fn an_endpoint_shows_who_says_so_and_how_old_that_is() {
        let service = fake::service("payments.shop", "etcd", &["10.0.0.1", "10.0.0.2"]);
        let mut lost = (*service.endpoints[1]).clone();
        lost.stale = true;
        let rows = [row(&service.endpoints[0], Some(75)), row(&lost, None)];
        let text = endpoints(&rows);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..3], ["payments.shop", "80", "10.0.0.1:15008"]);
        assert_eq!(lines[1][7..], ["healthy", "etcd", "1m15s"]);
        assert_eq!(lines[2][7..], ["stale", "etcd", "never"]);
    }
}
