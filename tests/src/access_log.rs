//! Events of meshd's access log.

use std::fs;
use std::path::Path;

use serde::Deserialize;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct AccessEvent {
    pub direction: String,
    pub unit: Option<String>,
    pub client_id: Option<String>,
    pub server_id: Option<String>,
    pub service: Option<String>,
    pub port: Option<u16>,
    pub peer: Option<String>,
    pub endpoint: Option<String>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub duration_ms: f64,
    pub outcome: String,
}

impl AccessEvent {
    pub fn is_inbound(&self) -> bool {
        self.direction == "inbound"
    }

    pub fn is_for(&self, service: &str) -> bool {
        self.service.as_deref() == Some(service)
    }
}

/// Every whole line; one that is not an event is a defect, so it panics with the line.
pub fn read(path: &Path) -> Vec<AccessEvent> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("access log: {error}: {line}"));
    whole.lines().map(parse).collect()
}
