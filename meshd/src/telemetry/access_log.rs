//! The access log: one JSON line per connection, written by a thread that may lose lines but never delays traffic.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use meshd_discovery::ServiceName;
use meshd_identity::SpiffeId;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Direction;

/// Events waiting for the disk: about a second of a very busy host, 2 MB.
const QUEUE: usize = 8192;

/// One connection, told when it has ended.
#[derive(Clone, Debug)]
pub struct ConnectionEvent {
    pub at: SystemTime,
    pub duration: Duration,
    pub direction: Direction,
    pub unit: Option<Arc<str>>,
    pub client_id: Option<SpiffeId>,
    pub server_id: Option<SpiffeId>,
    pub service: Option<ServiceName>,
    pub port: u16,
    pub peer: SocketAddr,
    pub endpoint: Option<SocketAddr>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub outcome: &'static str,
}

/// Where connections are told to; off unless a file is configured.
#[derive(Debug, Default)]
pub struct AccessLog {
    queue: Option<SyncSender<ConnectionEvent>>,
    dropped: AtomicU64,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl AccessLog {
    pub fn off() -> AccessLog {
        AccessLog::default()
    }

    pub fn to_file(path: &Path) -> std::io::Result<AccessLog> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let (queue, events) = sync_channel(QUEUE);
        let writer =
            std::thread::Builder::new().name("access-log".into()).spawn(move || write_events(file, &events))?;
        Ok(AccessLog { queue: Some(queue), dropped: AtomicU64::new(0), writer: Mutex::new(Some(writer)) })
    }

    pub fn enabled(&self) -> bool {
        self.queue.is_some()
    }

    pub fn record(&self, event: ConnectionEvent) {
        if let Some(queue) = &self.queue
            && queue.try_send(event).is_err()
        {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.queue = None;
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            // The queue is closed, so the writer ends once it has written what was waiting.
            let _ = writer.join();
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    direction: Direction,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    port: u16,
    peer: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    endpoint: Option<SocketAddr>,
    bytes_sent: u64,
    bytes_received: u64,
    duration_ms: f64,
    outcome: &'a str,
}

fn write_events(file: File, events: &Receiver<ConnectionEvent>) {
    let mut out = BufWriter::with_capacity(64 * 1024, file);
    while let Ok(event) = events.recv() {
        // A full disk loses lines, never traffic.
        let _ = write_line(&mut out, &event);
        while let Ok(event) = events.try_recv() {
            let _ = write_line(&mut out, &event);
        }
        let _ = out.flush();
    }
}

fn write_line(out: &mut impl Write, event: &ConnectionEvent) -> std::io::Result<()> {
    let line = Line {
        time: OffsetDateTime::from(event.at).format(&Rfc3339).unwrap_or_default(),
        direction: event.direction,
        unit: event.unit.as_deref(),
        client_id: event.client_id.as_ref().map(SpiffeId::as_str),
        server_id: event.server_id.as_ref().map(SpiffeId::as_str),
        service: event.service.as_ref().map(ToString::to_string),
        port: event.port,
        peer: event.peer,
        endpoint: event.endpoint,
        bytes_sent: event.bytes_sent,
        bytes_received: event.bytes_received,
        duration_ms: event.duration.as_micros() as f64 / 1000.0,
        outcome: event.outcome,
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> ConnectionEvent {
        ConnectionEvent {
            at: SystemTime::UNIX_EPOCH,
            duration: Duration::from_micros(1500),
            direction: Direction::Outbound,
            unit: Some("checkout.service".into()),
            client_id: Some("spiffe://mesh.example/ns/shop/sa/checkout".parse().unwrap()),
            server_id: None,
            service: Some("payments.shop".parse().unwrap()),
            port: 80,
            peer: "127.0.0.1:40000".parse().unwrap(),
            endpoint: Some("10.0.0.2:15008".parse().unwrap()),
            bytes_sent: 1,
            bytes_received: 2,
            outcome: "ok",
        }
    }

    #[test]
    fn an_event_is_one_json_line() {
        let mut out = Vec::new();
        write_line(&mut out, &event()).unwrap();
        let expected = r#"{"time":"1970-01-01T00:00:00Z","direction":"outbound","unit":"checkout.service","client_id":"spiffe://mesh.example/ns/shop/sa/checkout","service":"payments.shop","port":80,"peer":"127.0.0.1:40000","endpoint":"10.0.0.2:15008","bytes_sent":1,"bytes_received":2,"duration_ms":1.5,"outcome":"ok"}"#;
        assert_eq!(String::from_utf8(out).unwrap(), format!("{expected}\n"));
    }

    #[test]
    fn what_was_recorded_is_on_disk_when_the_log_closes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.jsonl");
        let log = AccessLog::to_file(&path).unwrap();
        for _ in 0..100 {
            log.record(event());
        }
        drop(log);
        assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 100);
    }
}
