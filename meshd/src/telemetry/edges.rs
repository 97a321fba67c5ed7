//! Who talks to whom, counted. Each worker counts in cells of its own, summed when somebody looks.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use meshd_discovery::ServiceName;
use meshd_identity::SpiffeId;

use crate::fault::Fault;

/// Distinct edges kept per worker. Beyond it, peers are counted together as `__overflow__`:
/// a busy host has some hundred edges, and each costs about 500 bytes here and ten series outside.
const MAX_EDGES: usize = 2000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    pub fn label(self) -> &'static str {
        match self {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
        }
    }
}

/// How the mesh leg is secured (Linkerd's `tls` label).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Tls {
    Mutual,
    /// The endpoint is declared plaintext, or no endpoint was reached.
    #[default]
    Disabled,
}

/// What tells two edges apart; absent parts were not known when the connection ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EdgeKey {
    pub direction: Direction,
    pub unit: Option<Arc<str>>,
    pub service: Option<ServiceName>,
    /// The far side of the mesh leg: the server's identity outbound, the client's inbound.
    pub peer: Option<SpiffeId>,
    /// This side's identity on the mesh leg.
    pub own: Option<SpiffeId>,
    pub tls: Tls,
    pub overflow: bool,
}

/// Live counters of one edge. "up" is from the side that opened the connection to the side that serves it.
#[derive(Debug, Default)]
pub struct Edge {
    pub opened: AtomicU64,
    /// Connections that reached the far side.
    pub connected: AtomicU64,
    pub connected_closed: AtomicU64,
    pub up_bytes: AtomicU64,
    pub down_bytes: AtomicU64,
    pub closed_ok: AtomicU64,
    closed_fault: [AtomicU64; Fault::ALL.len()],
}

impl Edge {
    pub fn close(&self, outcome: Result<(), Fault>) {
        let counter = match outcome {
            Ok(()) => &self.closed_ok,
            Err(fault) => &self.closed_fault[fault as usize],
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// One edge summed over the workers.
#[derive(Clone, Debug, Default)]
pub struct EdgeRow {
    pub opened: u64,
    pub connected: u64,
    pub connected_closed: u64,
    pub up_bytes: u64,
    pub down_bytes: u64,
    pub closed_ok: u64,
    pub closed_fault: BTreeMap<Fault, u64>,
}

impl EdgeRow {
    pub fn closed(&self) -> u64 {
        self.closed_ok + self.closed_fault.values().sum::<u64>()
    }

    fn add(&mut self, edge: &Edge) {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // Closes before opens: a racing close may be missed, but never outnumber the opens.
        self.closed_ok += value(&edge.closed_ok);
        for (fault, counter) in Fault::ALL.iter().zip(&edge.closed_fault) {
            let count = value(counter);
            if count > 0 {
                *self.closed_fault.entry(*fault).or_default() += count;
            }
        }
        self.connected_closed += value(&edge.connected_closed);
        self.connected += value(&edge.connected);
        self.opened += value(&edge.opened);
        self.up_bytes += value(&edge.up_bytes);
        self.down_bytes += value(&edge.down_bytes);
    }
}

/// All edges, one shard per worker.
#[derive(Debug)]
pub struct Edges {
    shards: Vec<Mutex<HashMap<EdgeKey, Arc<Edge>>>>,
}

impl Edges {
    pub fn new(workers: usize) -> Edges {
        Edges { shards: (0..workers.max(1)).map(|_| Mutex::default()).collect() }
    }

    /// The counters of `key` on this worker.
    pub fn edge(&self, worker: usize, mut key: EdgeKey) -> Arc<Edge> {
        let mut shard = self.shards[worker].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(edge) = shard.get(&key) {
            return edge.clone();
        }
        if shard.len() >= MAX_EDGES {
            key = EdgeKey { unit: None, peer: None, own: None, overflow: true, ..key };
        }
        shard.entry(key).or_default().clone()
    }

    pub fn rows(&self) -> BTreeMap<EdgeKey, EdgeRow> {
        let mut rows: BTreeMap<EdgeKey, EdgeRow> = BTreeMap::new();
        for shard in &self.shards {
            for (key, edge) in shard.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                rows.entry(key.clone()).or_default().add(edge);
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(peer: Option<&str>) -> EdgeKey {
        EdgeKey {
            direction: Direction::Inbound,
            unit: None,
            service: None,
            peer: peer.map(|peer| peer.parse().unwrap()),
            own: None,
            tls: Tls::Mutual,
            overflow: false,
        }
    }

    #[test]
    fn workers_are_summed() {
        let edges = Edges::new(2);
        for worker in 0..2 {
            edges.edge(worker, key(None)).opened.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(edges.rows().values().map(|row| row.opened).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn too_many_edges_are_counted_together() {
        let edges = Edges::new(1);
        for n in 0..MAX_EDGES + 50 {
            let peer = format!("spiffe://mesh.example/ns/shop/sa/w{n}");
            let unit = Some(format!("run-{n}.service").into());
            edges.edge(0, EdgeKey { unit, ..key(Some(&peer)) }).opened.fetch_add(1, Ordering::Relaxed);
        }
        let rows = edges.rows();
        assert_eq!(rows.len(), MAX_EDGES + 1);
        let overflow = rows.iter().find(|(key, _)| key.overflow).unwrap();
        assert_eq!(overflow.1.opened, 50);
    }
}
