//! How programs of this host get their identity themselves: the SPIFFE Workload API and Envoy's secret discovery, on one
//! Unix socket open to everybody. docs/workload-api.md is for operators.
//!
//! A connection: accept and limit (`limits`) -> who calls (`attest`) -> its `:authority` made readable (`authority`) ->
//! HTTP/2 and which API (`serve`) -> per call: attest again, then answer (`spiffe`, `sds`) -> again whenever something
//! changes (`session`).

mod attest;
mod authority;
mod jwt;
mod limits;
mod refused;
mod sds;
mod secrets;
mod serve;
mod session;
mod spiffe;
mod tokens;
mod x509;

use std::collections::BTreeSet;
use std::sync::Arc;

use meshd_identity::SpiffeId;
use meshd_pki_client::Credentials;
use serde::Deserialize;
use tokio::sync::watch;

use crate::proxy::Shared;

pub use jwt::{IssueError, Issued, JwtSource, Verified};
pub use serve::{bind, serve};
pub use tokens::PkiTokens;

/// `[workload_api]` of meshd.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkloadApiConfig {
    pub enabled: bool,
    /// Whether meshd looks at the programs of callers, also of captured connections. Needs CAP_SYS_PTRACE.
    pub path_selectors: bool,
}

impl Default for WorkloadApiConfig {
    fn default() -> WorkloadApiConfig {
        WorkloadApiConfig { enabled: true, path_selectors: false }
    }
}

/// What answers are made of.
pub struct Sources {
    /// Who is enrolled.
    pub shared: Arc<Shared>,
    pub credentials: watch::Receiver<Arc<Credentials>>,
    /// Changes whenever enrolment does.
    pub enrolled: watch::Receiver<BTreeSet<SpiffeId>>,
    pub tokens: Option<Arc<dyn JwtSource>>,
}
