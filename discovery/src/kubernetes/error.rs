//! What can be wrong between us and the API server, in words an operator can act on.

use std::time::Duration;

use super::settings::SettingsError;

/// Connecting, or the beginning of an answer.
pub(super) const CALL_DEADLINE: Duration = Duration::from_secs(4);

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("the API server {server} cannot be reached: {reason}")]
    Unreachable { server: String, reason: String },
    #[error(
        "TLS with the API server {server} failed: {reason}; is the certificate authority given for it the cluster's, and \
         the name in its address one of its certificate's?"
    )]
    Tls { server: String, reason: String },
    /// Which server was how slow with what.
    #[error("the API server {0}; is it overloaded, or a proxy before it?")]
    Deadline(String),
    #[error("the API server is not ready: {0}")]
    NotReady(String),
    #[error("the API server does not accept {by} (401: {reason}); give a credential that is valid and not over")]
    Unauthorized { by: String, reason: String },
    #[error(
        "{verb} of {resource} is forbidden: {reason}; apply deploy/kubernetes/{role}.yaml, or bind its roles \
         `meshd-{role}` to that user", role = role(verb)
    )]
    Forbidden { verb: &'static str, resource: String, reason: String },
    /// What was asked for is older than what the server keeps.
    #[error("the API server no longer keeps what a list or a watch needs; it is read again")]
    Expired,
    /// Watches under way go on. `after`: when the server wants to be asked again.
    #[error("the API server has too much to do for a {asked} (429: {reason})")]
    Busy { asked: String, reason: String, after: Option<Duration> },
    #[error("the API server refused a {asked} (status {status}): {reason}")]
    Refused { status: u16, asked: String, reason: String },
    #[error("an answer of the API server cannot be read: {0}")]
    Garbled(String),
    /// The kind is not there, which for ours is no trouble.
    #[error("the API server does not know this kind")]
    NotServed,
    #[error("the connection to the API server broke: {0}")]
    Broken(String),
}

/// Which of the shipped files grants it.
fn role(verb: &str) -> &'static str {
    if matches!(verb, "list" | "watch") { "reader" } else { "registrar" }
}

impl Error {
    /// What the server says of something else may be well. Whether it is well itself the probe tells.
    pub(super) fn is_of_one_area(&self) -> bool {
        let answered =
            matches!(self, Error::Forbidden { .. } | Error::Refused { .. } | Error::Garbled(_) | Error::Expired);
        answered || matches!(self, Error::Deadline(_))
    }
}
