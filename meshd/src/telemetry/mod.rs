//! What operators see: counters with Linkerd's names, one access-log event per connection, edges.
//! A leaf: it knows labels and numbers, never the pipeline.

mod access_log;
#[cfg(test)]
mod alerts_tests;
mod dns;
mod edges;
mod exposition;
mod probes;
mod process;
mod self_handshakes;
mod tasks;
mod unknown;
mod workload_api;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Deserialize;

pub use access_log::{AccessLog, ConnectionEvent};
pub use dns::{DnsCounters, DnsOutcome};
pub use edges::{Direction, Edge, EdgeKey, EdgeRow, Edges, Tls};
pub use exposition::{Exposition, encode};
pub use probes::Probes;
pub use self_handshakes::SelfHandshakes;
pub use tasks::{TaskRecord, Tasks};
pub use unknown::UnknownOwners;
pub use workload_api::WorkloadApiCounters;

use crate::fault::Fault;

/// `[metrics]` in meshd.toml.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    pub listen: SocketAddr,
}

impl Default for MetricsConfig {
    fn default() -> MetricsConfig {
        MetricsConfig { listen: SocketAddr::from(([127, 0, 0, 1], 15020)) }
    }
}

/// Every counter of the data plane.
#[derive(Debug)]
pub struct Telemetry {
    pub edges: Edges,
    pub access_log: AccessLog,
    pub refused: RefusedCounters,
    pub unknown: UnknownOwners,
    /// Connections an operator makes to see how they fare.
    pub probes: Probes,
    pub handshakes: HandshakeCounters,
    pub self_handshakes: SelfHandshakes,
    pub dns: DnsCounters,
    pub workload_api: WorkloadApiCounters,
    pub tasks: Tasks,
    /// A panic ends one connection; the operator must see that it happened.
    pub panics: AtomicU64,
    /// Streams whose application asked for the caller's address and could not be given it.
    pub hidden_callers: AtomicU64,
    /// Bytes received from peers that the local side has not taken yet.
    pub buffered_bytes: AtomicU64,
}

impl Telemetry {
    pub fn new(workers: usize, access_log: AccessLog) -> Arc<Telemetry> {
        Arc::new(Telemetry {
            edges: Edges::new(workers),
            access_log,
            refused: RefusedCounters::default(),
            unknown: UnknownOwners::default(),
            probes: Probes::default(),
            handshakes: HandshakeCounters::default(),
            self_handshakes: SelfHandshakes::default(),
            dns: DnsCounters::default(),
            workload_api: WorkloadApiCounters::default(),
            tasks: Tasks::default(),
            panics: AtomicU64::new(0),
            hidden_callers: AtomicU64::new(0),
            buffered_bytes: AtomicU64::new(0),
        })
    }
}

/// `meshd_refused_total{direction,error}`: connections that never reached their other side.
#[derive(Debug, Default)]
pub struct RefusedCounters([[AtomicU64; Fault::ALL.len()]; 2]);

impl RefusedCounters {
    pub fn count(&self, direction: Direction, fault: Fault) {
        self.0[direction as usize][fault as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn value(&self, direction: Direction, fault: Fault) -> u64 {
        self.0[direction as usize][fault as usize].load(Ordering::Relaxed)
    }
}

/// `meshd_handshakes_total{direction,result}`: mutual TLS handshakes with peers.
#[derive(Debug, Default)]
pub struct HandshakeCounters {
    pub accepted: AtomicU64,
    pub accept_failed: AtomicU64,
    pub accept_limited: AtomicU64,
    pub dialled: AtomicU64,
    pub dial_failed: AtomicU64,
    /// Open connections ended because the peer came onto the deny list, by direction.
    pub cut: [AtomicU64; 2],
}
