//! Verbs that change something: for root over the admin socket only, each one audited.

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::serve::IncomingStream;
use meshd_discovery::Losses;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use super::view::View;
use super::{endpoints, probe};
use crate::capture::KeeperHandle;

/// Where verbs that change something are carried out.
#[derive(Clone)]
pub struct Control {
    pub keeper: KeeperHandle,
    /// Reads the configuration's directories again; answered when what they say is in force.
    pub reload: mpsc::Sender<Reload>,
    pub losses: Losses,
}

/// A request to reload, and whom to tell how it went.
pub struct Reload {
    /// The plan an operator orders to be in force, also if it was held or reverted before.
    pub apply: Option<String>,
    pub answer: oneshot::Sender<Result<(), String>>,
}

/// What `/intercept/apply` is told.
#[derive(Debug, Serialize, Deserialize)]
pub struct ApplyOrder {
    /// The plan the operator has seen.
    pub plan: String,
}

/// Who is at the other end of the admin socket, as the kernel says (SO_PEERCRED).
#[derive(Clone, Copy, Debug)]
pub(super) struct Operator {
    uid: Option<u32>,
    pid: Option<i32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Operator {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Operator {
        let credentials = stream.io().peer_cred().ok();
        Operator {
            uid: credentials.map(|credentials| credentials.uid()),
            pid: credentials.and_then(|credentials| credentials.pid()),
        }
    }
}

/// Those that have nothing to tell answer with 204; what fails answers `{"error": "..."}`.
pub(super) fn routes(control: Control, view: Arc<View>) -> Router {
    let losses = control.losses.clone();
    Router::new()
        .route("/reload", post(reload))
        .route("/intercept/apply", post(apply))
        .route("/intercept/follow", post(follow))
        .with_state(control)
        .merge(endpoints::orders(losses))
        .merge(probe::routes(view))
        .layer(middleware::from_fn(for_root))
}

/// Refuses everybody but root and the daemon's own user, and writes down who asked for what.
async fn for_root(ConnectInfo(operator): ConnectInfo<Operator>, request: Request, next: Next) -> Response {
    let Operator { uid, pid } = operator;
    let verb = request.uri().to_string();
    let own = nix::unistd::getuid().as_raw();
    if !uid.is_some_and(|uid| uid == 0 || uid == own) {
        tracing::warn!(target: "audit", ?uid, ?pid, verb, "refused");
        return refusal(StatusCode::FORBIDDEN, &"this verb is for root");
    }
    let response = next.run(request).await;
    tracing::info!(target: "audit", ?uid, ?pid, verb, done = response.status().is_success());
    response
}

async fn reload(State(control): State<Control>) -> Response {
    reload_and(control, None).await
}

async fn apply(State(control): State<Control>, Json(order): Json<ApplyOrder>) -> Response {
    reload_and(control, Some(order.plan)).await
}

/// An operator has changed the capture state on disk, and waits for it to be in force.
async fn follow(State(control): State<Control>) -> Response {
    outcome(control.keeper.follow()).await
}

async fn reload_and(control: Control, apply: Option<String>) -> Response {
    let (answer, answered) = oneshot::channel();
    outcome(async {
        control.reload.send(Reload { apply, answer }).await.map_err(|_| "meshd is stopping".to_owned())?;
        answered.await.unwrap_or_else(|_| Err("meshd is stopping".to_owned()))
    })
    .await
}

/// 204 for what worked, the reason for what did not.
pub(super) async fn outcome<E: Display>(work: impl Future<Output = Result<(), E>>) -> Response {
    match work.await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => refusal(StatusCode::CONFLICT, &error),
    }
}

pub(super) fn refusal(status: StatusCode, error: &dyn Display) -> Response {
    (status, Json(json!({ "error": error.to_string() }))).into_response()
}
