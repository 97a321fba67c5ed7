//! The access log: one JSON line per connection, written by a thread that may lose lines but never delays traffic.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    state: Arc<State>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What queue and writer tell each other.
#[derive(Debug, Default)]
struct State {
    dropped: AtomicU64,
    reopen: AtomicBool,
}

impl AccessLog {
    pub fn off() -> AccessLog {
        AccessLog::default()
    }

    pub fn to_file(path: &Path) -> std::io::Result<AccessLog> {
        let file = open(path)?;
        let (queue, events) = sync_channel(QUEUE);
        let state = Arc::new(State::default());
        let writer = Writer { path: path.into(), state: state.clone(), out: buffered(file) };
        let thread = std::thread::Builder::new().name("access-log".into()).spawn(move || writer.run(&events))?;
        Ok(AccessLog { queue: Some(queue), state, writer: Mutex::new(Some(thread)) })
    }

    /// From the next event on into a new file of the same name: the old one has been rotated away.
    pub fn reopen(&self) {
        self.state.reopen.store(true, Ordering::Relaxed);
    }

    pub fn enabled(&self) -> bool {
        self.queue.is_some()
    }

    pub fn record(&self, event: ConnectionEvent) {
        if let Some(queue) = &self.queue
            && queue.try_send(event).is_err()
        {
            self.state.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn dropped(&self) -> u64 {
        self.state.dropped.load(Ordering::Relaxed)
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

struct Writer {
    path: PathBuf,
    state: Arc<State>,
    out: BufWriter<File>,
}

impl Writer {
    fn run(mut self, events: &Receiver<ConnectionEvent>) {
        while let Ok(event) = events.recv() {
            if self.state.reopen.swap(false, Ordering::Relaxed) {
                self.open_anew();
            }
            self.write(&event);
            while let Ok(event) = events.try_recv() {
                self.write(&event);
            }
            if self.out.flush().is_err() {
                self.state.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A full disk loses lines, counted, never traffic.
    fn write(&mut self, event: &ConnectionEvent) {
        if write_line(&mut self.out, event).is_err() {
            self.state.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn open_anew(&mut self) {
        match open(&self.path) {
            Ok(file) => self.out = buffered(file),
            Err(error) => tracing::error!(path = %self.path.display(), %error, "access log not reopened"),
        }
    }
}

/// Who talks to whom is not for every user of the host.
fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

fn buffered(file: File) -> BufWriter<File> {
    BufWriter::with_capacity(64 * 1024, file)
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
    fn a_rotated_file_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (path, rotated) = (dir.path().join("access.jsonl"), dir.path().join("access.jsonl.1"));
        let log = AccessLog::to_file(&path).unwrap();
        std::fs::rename(&path, &rotated).unwrap();
        log.reopen();
        log.record(event());
        drop(log);
        assert_eq!(std::fs::read_to_string(rotated).unwrap(), "");
        assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 1);
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
