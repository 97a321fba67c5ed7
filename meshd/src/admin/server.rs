//! The daemon's side of the admin socket and the metrics port.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::{TcpListener, UnixListener};

use super::control::{self, Control, Operator};
use super::view::View;
use super::{endpoints, ledger};
use crate::lifecycle::Stage;
use crate::telemetry;

/// Binds the admin socket.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    // Reading the mesh's state is for root and meshd's own group.
    bind_with_mode(path, 0o660)
}

/// Binds a socket, replacing one a killed daemon left behind.
pub fn bind_with_mode(path: &Path, mode: u32) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

pub async fn serve_socket(listener: UnixListener, view: Arc<View>, control: Control) {
    let routes = Router::new()
        .route("/status", get(|State(view): State<Arc<View>>| async move { Json(view.status()) }))
        .route("/intercept", get(|State(view): State<Arc<View>>| async move { Json(view.capture()) }))
        .route("/edges", get(|State(view): State<Arc<View>>| async move { Json(view.edges()) }))
        .with_state(view.clone())
        .merge(endpoints::routes(view.clone()))
        .merge(ledger::routes(view.clone(), control.keeper.clone()))
        .merge(control::routes(control, view))
        .into_make_service_with_connect_info::<Operator>();
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the admin socket is closed");
    }
}

pub async fn serve_metrics(listener: TcpListener, view: Arc<View>) {
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .with_state(view);
    if let Err(error) = axum::serve(listener, routes).await {
        tracing::error!(%error, "the metrics port is closed");
    }
}

/// Not ready from the moment of draining: whoever looks should send its traffic elsewhere.
async fn ready(State(view): State<Arc<View>>) -> (StatusCode, &'static str) {
    match view.stage() {
        Stage::Running => (StatusCode::OK, "ready\n"),
        Stage::Draining | Stage::Stopped => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
    }
}

async fn metrics(State(view): State<Arc<View>>) -> impl IntoResponse {
    let content_type = [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    match telemetry::encode(view.telemetry(), view.metrics()) {
        Ok(text) => (StatusCode::OK, content_type, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, content_type, format!("cannot encode metrics: {error}\n")),
    }
}
