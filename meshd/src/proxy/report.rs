//! REPORT: every accepted connection is told exactly once, also when it is cancelled.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime};

use meshd_discovery::ServiceName;
use meshd_identity::SpiffeId;

use crate::fault::Fault;
use crate::telemetry::{ConnectionEvent, Direction, Edge, EdgeKey, Telemetry, Tls};

/// What is known of a connection so far; reports itself when dropped.
pub(super) struct Report {
    telemetry: Arc<Telemetry>,
    worker: usize,
    started: Instant,
    peer: SocketAddr,
    key: EdgeKey,
    port: u16,
    endpoint: Option<SocketAddr>,
    /// A caller's unit that is not enrolled: for the log only, as any user can make up units without end.
    stray_unit: Option<Arc<str>>,
    connected: Option<Arc<Edge>>,
    up_bytes: std::cell::Cell<u64>,
    down_bytes: std::cell::Cell<u64>,
    outcome: Result<(), Fault>,
}

impl Report {
    pub(super) fn opened(telemetry: &Arc<Telemetry>, worker: usize, direction: Direction, peer: SocketAddr) -> Report {
        let key = EdgeKey {
            direction,
            unit: None,
            service: None,
            peer: None,
            own: None,
            // A peer has proven itself before it can ask for anything.
            tls: if direction == Direction::Inbound { Tls::Mutual } else { Tls::Disabled },
            overflow: false,
        };
        Report {
            telemetry: telemetry.clone(),
            worker,
            started: Instant::now(),
            peer,
            key,
            port: 0,
            endpoint: None,
            stray_unit: None,
            connected: None,
            up_bytes: 0.into(),
            down_bytes: 0.into(),
            // What a task that was dropped in the middle of its work reports.
            outcome: Err(Fault::Drain),
        }
    }

    /// Takes the report to the worker that serves the connection.
    pub(super) fn move_to(&mut self, worker: usize) {
        self.worker = worker;
    }

    /// The address of the socket that really opened it.
    pub(super) fn client(&mut self, client: SocketAddr) {
        self.peer = client;
    }

    pub(super) fn unit(&mut self, unit: &Arc<str>) {
        self.key.unit = Some(unit.clone());
    }

    pub(super) fn stray_unit(&mut self, unit: Option<Arc<str>>) {
        self.stray_unit = unit;
    }

    pub(super) fn own_identity(&mut self, own: &SpiffeId) {
        self.key.own = Some(own.clone());
    }

    pub(super) fn peer_identity(&mut self, peer: &SpiffeId) {
        self.key.peer = Some(peer.clone());
    }

    pub(super) fn target(&mut self, service: &ServiceName, port: u16) {
        self.key.service = Some(service.clone());
        self.port = port;
    }

    /// The far side is reached: from here on the connection counts as open there too.
    pub(super) fn connected(&mut self, endpoint: SocketAddr, tls: Tls) {
        self.key.tls = tls;
        self.endpoint = Some(endpoint);
        let edge = self.telemetry.edges.edge(self.worker, self.key.clone());
        edge.opened.fetch_add(1, Ordering::Relaxed);
        edge.connected.fetch_add(1, Ordering::Relaxed);
        self.connected = Some(edge);
    }

    /// Bytes from the side that opened the connection.
    pub(super) fn count_up(&self, bytes: usize) {
        self.up_bytes.set(self.up_bytes.get() + bytes as u64);
        if let Some(edge) = &self.connected {
            edge.up_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// Bytes from the side that serves it.
    pub(super) fn count_down(&self, bytes: usize) {
        self.down_bytes.set(self.down_bytes.get() + bytes as u64);
        if let Some(edge) = &self.connected {
            edge.down_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// The end of the story; told when the report is dropped.
    pub(super) fn finish(&mut self, outcome: Result<(), Fault>) {
        self.outcome = outcome;
    }

    fn event(&self) -> ConnectionEvent {
        let duration = self.started.elapsed();
        let (client_id, server_id) = match self.key.direction {
            Direction::Outbound => (self.key.own.clone(), self.key.peer.clone()),
            Direction::Inbound => (self.key.peer.clone(), self.key.own.clone()),
        };
        ConnectionEvent {
            at: SystemTime::now() - duration,
            duration,
            direction: self.key.direction,
            unit: self.key.unit.clone().or_else(|| self.stray_unit.clone()),
            client_id,
            server_id,
            service: self.key.service.clone(),
            port: self.port,
            peer: self.peer,
            endpoint: self.endpoint,
            bytes_sent: self.up_bytes.get(),
            bytes_received: self.down_bytes.get(),
            outcome: self.outcome.map_or_else(Fault::label, |()| "ok"),
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.outcome = Err(Fault::Internal);
        }
        let edge = match self.connected.take() {
            Some(edge) => {
                edge.connected_closed.fetch_add(1, Ordering::Relaxed);
                edge
            }
            None => self.never_connected(),
        };
        edge.close(self.outcome);
        if self.key.direction == Direction::Outbound && self.telemetry.probes.any() {
            self.telemetry.probes.record(&self.event());
        }
        if self.telemetry.access_log.enabled() {
            self.telemetry.access_log.record(self.event());
        }
    }
}

impl Report {
    /// A connection that never reached its other side was opened all the same; refusals are counted by reason.
    fn never_connected(&self) -> Arc<Edge> {
        if let Err(fault) = self.outcome {
            self.telemetry.refused.count(self.key.direction, fault);
        }
        let edge = self.telemetry.edges.edge(self.worker, self.key.clone());
        edge.opened.fetch_add(1, Ordering::Relaxed);
        edge
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{AccessLog, EdgeRow};

    fn outcomes(telemetry: &Telemetry) -> (u64, u64, u64) {
        let rows = telemetry.edges.rows();
        let sum = |value: fn(&EdgeRow) -> u64| rows.values().map(value).sum();
        (sum(|row| row.opened), sum(|row| row.closed_ok), sum(EdgeRow::closed))
    }

    #[test]
    fn a_finished_connection_is_reported_once() {
        let telemetry = Telemetry::new(1, AccessLog::off());
        let mut report = Report::opened(&telemetry, 0, Direction::Outbound, "127.0.0.1:1".parse().unwrap());
        report.connected("127.0.0.1:2".parse().unwrap(), Tls::Mutual);
        assert_eq!(outcomes(&telemetry), (1, 0, 0));
        report.finish(Ok(()));
        drop(report);
        assert_eq!(outcomes(&telemetry), (1, 1, 1));
    }

    #[test]
    fn a_cancelled_connection_is_reported_as_drained() {
        let telemetry = Telemetry::new(1, AccessLog::off());
        drop(Report::opened(&telemetry, 0, Direction::Inbound, "127.0.0.1:1".parse().unwrap()));
        assert_eq!(outcomes(&telemetry), (1, 0, 1));
        assert_eq!(telemetry.refused.value(Direction::Inbound, Fault::Drain), 1);
    }
}
