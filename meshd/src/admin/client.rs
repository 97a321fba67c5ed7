//! The CLI's side of the admin socket.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("cannot reach meshd at {path}: {source}; is it running (`systemctl status meshd`), and are you root?")]
    Connect { path: PathBuf, source: std::io::Error },
    #[error("meshd answered {0} to {1}; CLI and daemon may be of different versions, restart the daemon")]
    Status(hyper::StatusCode, String),
    #[error("the answer of meshd is broken: {0}")]
    Answer(String),
}

/// Asks the daemon for `what`, e.g. `/status`.
pub async fn fetch<T: DeserializeOwned>(socket: &Path, what: &str) -> Result<T, AdminError> {
    let broken = |error: &dyn std::fmt::Display| AdminError::Answer(error.to_string());
    let connect = |source| AdminError::Connect { path: socket.into(), source };
    let stream = UnixStream::connect(socket).await.map_err(connect)?;
    let (mut send, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    tokio::spawn(connection);
    let request = hyper::Request::get(what)
        .header("host", "meshd")
        .body(Empty::<Bytes>::new())
        .map_err(|error| broken(&error))?;
    let response = send.send_request(request).await.map_err(|error| broken(&error))?;
    if !response.status().is_success() {
        return Err(AdminError::Status(response.status(), what.to_owned()));
    }
    let body = response.into_body().collect().await.map_err(|error| broken(&error))?.to_bytes();
    serde_json::from_slice(&body).map_err(|error| broken(&error))
}
