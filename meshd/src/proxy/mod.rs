//! The life of a connection, one file per step.
//!
//! Outbound (local app to mesh): accept -> identify -> resolve -> (prove) -> detect -> balance -> connect -> serve
//! -> report. Inbound (mesh to local app) mirrors it: accept -> authorize -> deliver -> serve -> report.
//! `outbound` and `inbound` are the tables of contents and the only ones to call steps; steps do not
//! call each other. `worker` runs them on single-threaded runtimes.

mod authorize;
mod balance;
mod connect;
mod deliver;
mod detect;
mod env;
mod held;
mod identify;
mod inbound;
mod limits;
mod locality;
mod outbound;
mod probe;
mod prove;
mod proxy_protocol;
mod report;
mod resolve;
mod serve;
mod work;
mod worker;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use meshd_discovery::{Directory, Lookups, Suspects};
use meshd_sys::sockets::Mark;
use serde::Deserialize;

use crate::attest::Attestor;
use crate::dns::Vips;
use crate::enrol::{Enrolment, PortWatch};
use crate::telemetry::Telemetry;
use crate::transport::tls::TlsState;

pub use locality::Locality;
pub use resolve::RawPlaces;
pub use worker::{Listeners, Workers, start};

/// `[proxy]` in meshd.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxyConfig {
    /// Worker threads; 0 is one per core, at most 4: a host proxy shares the machine with its applications.
    pub threads: usize,
    /// Where other hosts dial us.
    pub mesh_listen: Vec<SocketAddr>,
    /// Where captured connections arrive, on loopback.
    pub capture_port: u16,
    /// For each of: TCP connect, TLS handshake, CONNECT to its 200.
    pub connect_timeout_ms: u64,
    /// One JSON line per connection; absent is off.
    pub access_log: Option<PathBuf>,
    /// How long open connections may go on after SIGTERM.
    pub drain_timeout_s: u64,
    /// The identity shown to peers that send no SNI (Istio's ztunnel), as `ns/<namespace>/sa/<name>`.
    pub default_identity: Option<String>,
    /// Peers' bytes held for local applications that do not read, in all; streams that would go beyond
    /// it are reset as `limit`.
    pub max_buffered_mib: u64,
}

impl Default for ProxyConfig {
    fn default() -> ProxyConfig {
        ProxyConfig {
            threads: 0,
            mesh_listen: vec![(Ipv4Addr::UNSPECIFIED, 15008).into(), (Ipv6Addr::UNSPECIFIED, 15008).into()],
            capture_port: 15001,
            connect_timeout_ms: 1000,
            access_log: None,
            drain_timeout_s: 30,
            default_identity: None,
            max_buffered_mib: 256,
        }
    }
}

impl ProxyConfig {
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub fn worker_count(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if self.threads == 0 { cores.min(4) } else { self.threads }
    }
}

/// What every worker reads and control tasks replace whole.
pub struct Shared {
    pub config: ProxyConfig,
    pub mark: Mark,
    pub directory: ArcSwap<Directory>,
    pub enrolment: ArcSwap<Enrolment>,
    pub attestor: Arc<Attestor>,
    pub ports: PortWatch,
    pub tls: ArcSwap<TlsState>,
    pub vips: Arc<Vips>,
    /// What captured raw addresses stand for.
    pub raw: ArcSwap<RawPlaces>,
    pub telemetry: Arc<Telemetry>,
    /// Where this host is.
    pub locality: Locality,
    /// Hears of endpoints that cannot be reached.
    pub suspects: Suspects,
    /// Where services that are not known are asked for.
    pub lookups: Lookups,
}
