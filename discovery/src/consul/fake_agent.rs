//! An agent and the catalog behind it, over real HTTP: as much of them as registrations use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) path: String,
    pub(super) token: String,
}

#[derive(Default)]
struct State {
    services: BTreeMap<String, Value>,
    hidden: BTreeSet<String>,
    refused: Option<&'static str>,
    asked: Vec<Asked>,
}

/// Ends with the runtime of its test.
pub(super) struct Agent {
    url: String,
    state: Arc<Mutex<State>>,
}

fn id_of(service: &Value) -> String {
    service["ID"].as_str().unwrap().to_owned()
}

impl State {
    fn answer(&mut self, path: &str, body: &[u8]) -> (u16, String) {
        if self.refused.is_some_and(|refused| path.starts_with(refused)) {
            return (500, "scripted".to_owned());
        }
        let path = path.split('?').next().unwrap();
        if path == "/v1/agent/service/register" {
            let service: Value = serde_json::from_slice(body).unwrap();
            self.services.insert(id_of(&service), service);
            (200, String::new())
        } else if let Some(id) = path.strip_prefix("/v1/agent/service/deregister/") {
            let was_there = self.services.remove(id).is_some();
            (if was_there { 200 } else { 404 }, String::new())
        } else if let Some(check) = path.strip_prefix("/v1/agent/check/update/") {
            let id = check.rsplit_once(':').unwrap().0;
            (if self.services.contains_key(id) { 200 } else { 404 }, String::new())
        } else if path == "/v1/agent/services" {
            (200, json!(self.services).to_string())
        } else if path.starts_with("/v1/health/service/") {
            (200, self.listed().to_string())
        } else {
            (400, format!("nobody asks an agent for {path}"))
        }
    }

    fn listed(&self) -> Value {
        let shown = self.services.iter().filter(|(id, _)| !self.hidden.contains(*id));
        let entry = |(_, service): (_, &Value)| json!({ "Node": { "Node": "n1" }, "Service": service, "Checks": [] });
        shown.map(entry).collect()
    }
}

impl Agent {
    pub(super) async fn start() -> Agent {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let agent = Agent { url: format!("http://{}", listener.local_addr().unwrap()), state: Arc::default() };
        let state = agent.state.clone();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(serve(connection, state.clone()));
            }
        });
        agent
    }

    pub(super) fn url(&self) -> String {
        self.url.clone()
    }

    pub(super) fn add(&self, service: &Value) {
        self.state().services.insert(id_of(service), service.clone());
    }

    /// From the catalog.
    pub(super) fn hide(&self, service: &Value) {
        self.state().hidden.insert(id_of(service));
    }

    /// Whatever begins with this path.
    pub(super) fn refuse(&self, path: &'static str) {
        self.state().refused = Some(path);
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.state().services.keys().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

async fn serve(connection: TcpStream, state: Arc<Mutex<State>>) {
    let mut connection = BufReader::new(connection);
    while let Some((asked, body)) = request(&mut connection).await {
        let (status, text) = {
            let mut state = state.lock().unwrap();
            let answer = state.answer(&asked.path, &body);
            state.asked.push(asked);
            answer
        };
        let answer = format!("HTTP/1.1 {status} Said\r\nContent-Length: {}\r\n\r\n{text}", text.len());
        if connection.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// `None`: whoever asked left.
async fn request(connection: &mut BufReader<TcpStream>) -> Option<(Asked, Vec<u8>)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if connection.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        let found =
            lines.iter().filter_map(|line| line.split_once(": ")).find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map_or("", |(_, value)| value).to_owned()
    };
    let path = lines.first()?.split(' ').nth(1)?.to_owned();
    let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
    connection.read_exact(&mut body).await.ok()?;
    Some((Asked { path, token: header("x-consul-token") }, body))
}
