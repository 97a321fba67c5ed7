//! The CLI's side of the admin socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

/// Rules are put in force within a second, a probe's outcome within two; beyond this a daemon hangs.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("cannot reach meshd at {path}: {source}; is it running (`systemctl status meshd`), and are you root?")]
    Connect { path: PathBuf, source: std::io::Error },
    #[error("meshd at {path} does not answer: it hangs; see its log, or end it")]
    Silent { path: PathBuf },
    #[error("meshd answered {0} to {1}; CLI and daemon may be of different versions, restart the daemon")]
    Status(hyper::StatusCode, String),
    #[error("{0}")]
    Refused(String),
    #[error("the answer of meshd is broken: {0}")]
    Answer(String),
}

/// Asks the daemon for `what`, e.g. `/status`.
pub async fn fetch<T: DeserializeOwned>(socket: &Path, what: &str) -> Result<T, AdminError> {
    let answer = ask(socket, Method::GET, what, Bytes::new()).await?;
    serde_json::from_slice(&answer).map_err(broken)
}

/// Has the daemon do `what`, e.g. `/reload`; it takes root.
pub async fn order(socket: &Path, what: &str, details: &impl Serialize) -> Result<Bytes, AdminError> {
    let details = serde_json::to_vec(details).map_err(broken)?;
    ask(socket, Method::POST, what, details.into()).await
}

async fn ask(socket: &Path, method: Method, what: &str, body: Bytes) -> Result<Bytes, AdminError> {
    let answer = tokio::time::timeout(DAEMON_TIMEOUT, exchange(socket, method, what, body)).await;
    answer.unwrap_or_else(|_| Err(AdminError::Silent { path: socket.into() }))
}

async fn exchange(socket: &Path, method: Method, what: &str, body: Bytes) -> Result<Bytes, AdminError> {
    let connect = |source| AdminError::Connect { path: socket.into(), source };
    let stream = UnixStream::connect(socket).await.map_err(connect)?;
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(what)
        .header("host", "meshd")
        .header("content-type", "application/json")
        .body(Full::new(body))
        .map_err(broken)?;
    let response = send.send_request(request).await.map_err(broken)?;
    let status = response.status();
    let answer = response.into_body().collect().await.map_err(broken)?.to_bytes();
    if status.is_success() {
        return Ok(answer);
    }
    match serde_json::from_slice::<Refusal>(&answer) {
        Ok(refusal) => Err(AdminError::Refused(refusal.error)),
        Err(_) => Err(AdminError::Status(status, what.to_owned())),
    }
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
}

fn broken(error: impl std::fmt::Display) -> AdminError {
    AdminError::Answer(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_hangs_is_told_from_one_that_is_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("admin.sock");
        let told = fetch::<()>(&socket, "/status").await.unwrap_err();
        assert!(matches!(told, AdminError::Connect { .. }), "{told}");
        // It is there, and takes the connection; nobody ever reads.
        let _hung = tokio::net::UnixListener::bind(&socket).unwrap();
        let told = fetch::<()>(&socket, "/status").await.unwrap_err();
        assert!(matches!(told, AdminError::Silent { .. }), "{told}");
    }
}
