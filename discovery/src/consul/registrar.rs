//! Registrations in Consul: a service of an agent, with a check that turns critical when it is not kept.
//!
//! An agent takes any write to an ID and any removal of it, whoever asks, so nothing could be fenced there. Each life of a
//! registration therefore has an ID of its own (`stamp.rs`), and touches no other but earlier ones it knew of: an old owner
//! that goes on finds the later one in the catalog and takes its own away. docs/adr/0014.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::body::Bytes;
use hyper::header::HeaderValue;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::client::{Call, CallError, Client, Reply};
use super::settings::Settings;
use super::stamp::Stamp;
use crate::documents::DEFAULT_WEIGHT;
use crate::register::{Answer, Found, Hold, Key, Over, Owner, Registrar, RegistrarError, TTL, address_towards};
use crate::yaml::printable;
use crate::{Health, PortTarget, Registration, ServiceName};

/// An agent answers within milliseconds; one lost answer must not cost the registration.
const DEADLINE: Duration = Duration::from_secs(4);
/// The least Consul allows. Until then what a dead host wrote is there, and critical.
const REMOVED_AFTER: &str = "1m";
/// Of a check that says how the program is, and need not be repeated.
const FOR_GOOD: &str = "87600h";
/// Consul's own check of a node.
const OF_THE_NODE: &str = "serfHealth";
const HEAVIEST: u32 = 65535;
/// Connections kept for the next beat.
const MOST_IDLE: usize = 8;
/// For a later life of the same registration. Servers look through all instances of a service for that, so that each beat of
/// a thousand hosts would be a million of them.
const LOOK_EVERY: Duration = TTL;
/// An agent has another address only after it was started anew.
const ADDRESS_FOR: Duration = Duration::from_secs(60);
const MOST_SAID: usize = 300;

pub(crate) struct ConsulRegistrar {
    name: String,
    settings: Arc<Settings>,
    /// Shares its connection, where one is enough.
    client: Client,
    nonce: u32,
    look_every: Duration,
    idle: Mutex<Vec<Client>>,
    written: Mutex<BTreeMap<Key, Written>>,
    /// What the agent said its address is, and when.
    address: Mutex<Option<(Instant, IpAddr)>>,
}

/// The last of a registration. An agent tells the catalog of it by the token shown then, whoever keeps it since.
struct Written {
    said: Registration,
    token: Option<HeaderValue>,
    /// For later ones.
    looked_at: Instant,
}

impl From<CallError> for RegistrarError {
    fn from(error: CallError) -> RegistrarError {
        RegistrarError(error.to_string())
    }
}

fn alive(id: &str) -> String {
    format!("{id}:alive")
}

fn well(id: &str) -> String {
    format!("{id}:well")
}

/// What the second check says.
fn state(said: &Registration) -> (&'static str, &'static str) {
    match (said.weight, said.health) {
        (0, _) => ("critical", "takes no new connections"),
        (_, Health::Unhealthy) => ("critical", "the program is not well: meshd status on its host says why"),
        (_, Health::Healthy) => ("passing", "the program is well"),
    }
}

fn body(id: &str, key: &Key, said: &Registration) -> Value {
    let (status, output) = state(said);
    let first = said.ports.first().copied().unwrap_or(PortTarget { port: 0, target: 0 });
    let ports: Vec<String> = said.ports.iter().map(|it| format!("{}:{}", it.port, it.target)).collect();
    let mut meta = json!({
        "meshd-namespace": key.service.namespace(), "meshd-instance": key.instance, "meshd-transport": "meshd",
        "meshd-port": first.port.to_string(), "meshd-mesh-port": said.mesh_port.to_string(),
        "meshd-weight": said.weight.to_string(), "meshd-epoch": said.epoch.to_string(),
    });
    let more = [
        ("meshd-ports", if ports.len() > 1 { ports.join(",") } else { String::new() }),
        ("meshd-identity", said.identity.clone().unwrap_or_default()),
        ("meshd-network", said.network.clone()),
        ("meshd-zone", said.zone.clone()),
        ("meshd-version", said.version.clone()),
    ];
    for (name, text) in more.into_iter().filter(|(_, text)| !text.is_empty()) {
        meta[name] = text.into();
    }
    // For those who know nothing of the mesh.
    let share = (said.weight.saturating_add(DEFAULT_WEIGHT / 2) / DEFAULT_WEIGHT).clamp(1, HEAVIEST);
    json!({
        "ID": id, "Name": key.service.name(), "Address": said.address.to_string(), "Port": first.target,
        "Weights": { "Passing": share, "Warning": share }, "Meta": meta,
        "Checks": [
            { "CheckID": alive(id), "Name": "meshd keeps it", "TTL": format!("{}s", TTL.as_secs()), "Status": "passing",
              "DeregisterCriticalServiceAfter": REMOVED_AFTER },
            { "CheckID": well(id), "Name": "the program", "TTL": FOR_GOOD, "Status": status, "Notes": output },
        ],
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Instance,
    #[serde(default)]
    checks: Option<Vec<Check>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    node: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Instance {
    #[serde(rename = "ID")]
    id: String,
    #[serde(default)]
    address: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    #[serde(rename = "CheckID")]
    id: String,
    status: String,
}

impl Entry {
    /// What its node's agent was told goes on only if that one comes back.
    fn is_cut_off(&self) -> bool {
        self.checks.iter().flatten().any(|check| check.id == OF_THE_NODE && check.status == "critical")
    }
}

/// A life whose check is critical may only have missed its beats: until Consul has removed it, it is the owner. What a node
/// that is gone has of it stays for days and is nobody's, but is no less the place whose epoch readers compare.
fn found(entries: &[Entry], key: &Key, nonce: u32) -> Option<Found> {
    let lives = entries.iter().filter_map(|entry| Some((Stamp::read(&entry.service.id, key)?, entry)));
    let epoch = lives.clone().map(|(stamp, _)| stamp.epoch).max()?;
    let latest = lives.filter(|(_, entry)| !entry.is_cut_off()).max_by_key(|(stamp, _)| *stamp);
    let owner = latest.map(|(stamp, Entry { service, node, .. })| Owner {
        epoch: stamp.epoch,
        wins_ties: stamp.nonce > nonce,
        address: format!("{} (Consul node {})", printable(&service.address), printable(&node.node)),
    });
    Some(Found { epoch, version: epoch, owner })
}

/// Without marks that would have to be escaped in what is shown of it.
fn said(reply: &Reply) -> String {
    let marks = |c: char| if matches!(c, '"' | '\'') { '`' } else { c };
    String::from_utf8_lossy(&reply.body)
        .trim()
        .chars()
        .take(MOST_SAID)
        .map(marks)
        .flat_map(char::escape_debug)
        .collect()
}

fn refused(reply: &Reply, what: &str, rule: &str) -> RegistrarError {
    let said = said(reply);
    RegistrarError(match reply.status {
        StatusCode::FORBIDDEN if said.contains("ACL not found") => format!(
            "Consul refuses the token ({said}); write the SecretID of a valid one to the file that `token_file` names"
        ),
        StatusCode::FORBIDDEN => {
            format!("Consul does not let this token {what} ({said}); add `{rule}` to its policy")
        }
        status => format!("Consul's agent does not {what}: {}: {said}", status.as_u16()),
    })
}

fn read<T: DeserializeOwned>(reply: &Reply) -> Result<T, RegistrarError> {
    let garbled = |error: serde_json::Error| {
        RegistrarError(format!("Consul's answer cannot be understood: {}", printable(&error.to_string())))
    };
    serde_json::from_slice(&reply.body).map_err(garbled)
}

fn may_write(service: &ServiceName) -> String {
    format!("service \"{}\" {{ policy = \"write\" }}", service.name())
}

impl ConsulRegistrar {
    pub(super) fn new(name: String, settings: Arc<Settings>) -> ConsulRegistrar {
        let (nonce, look_every) = (fastrand::u32(..), LOOK_EVERY);
        let client = Client::new(settings.clone());
        let (idle, written, address) = (Mutex::default(), Mutex::default(), Mutex::default());
        ConsulRegistrar { name, settings, client, nonce, look_every, idle, written, address }
    }

    fn stamp(&self, epoch: u64) -> Stamp {
        Stamp { epoch, nonce: self.nonce }
    }

    fn written(&self) -> MutexGuard<'_, BTreeMap<Key, Written>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn token(&self) -> Result<Option<HeaderValue>, RegistrarError> {
        self.settings.token().map_err(|error| RegistrarError(error.to_string()))
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Reply, RegistrarError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut client = idle.unwrap_or_else(|| self.client.another());
        let token = client.token()?;
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        let reply = client.call(&Call { method, path, body }, token.as_ref(), DEADLINE).await?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MOST_IDLE {
            idle.push(client);
        }
        Ok(reply)
    }

    /// As the catalog has it, whatever agent it is written through.
    async fn look(&self, key: &Key) -> Result<Option<Found>, RegistrarError> {
        // `near` and `leader` as in `remote.rs`. The names are plain words.
        let (name, instance) = (key.service.name(), &key.instance);
        let path = format!(
            "/v1/health/service/{name}?near=_agent&leader&filter=Service.Meta%5B%22meshd-instance%22%5D%3D%3D%22{instance}%22"
        );
        let reply = self.call(Method::GET, &path, None).await?;
        let rule = format!("service \"{name}\" {{ policy = \"write\" }} node_prefix \"\" {{ policy = \"read\" }}");
        match reply.status {
            StatusCode::OK if reply.is_filtered() => Err(RegistrarError(format!(
                "Consul hides from this token who registered `{name}`; add `{rule}` to its policy"
            ))),
            StatusCode::OK => Ok(found(&read::<Vec<Entry>>(&reply)?, key, self.nonce)),
            _ => Err(refused(&reply, &format!("see who registered `{name}`"), &rule)),
        }
    }

    async fn register(&self, key: &Key, said: &Registration) -> Result<(), RegistrarError> {
        let path = "/v1/agent/service/register?replace-existing-checks=true";
        let id = self.stamp(said.epoch).id(key);
        // Before it is shown: one replaced meanwhile is noticed with the next beat.
        let token = self.token()?;
        let reply = self.call(Method::PUT, path, Some(body(&id, key, said))).await?;
        if reply.status != StatusCode::OK {
            return Err(refused(&reply, &format!("register `{}`", key.service.name()), &may_write(&key.service)));
        }
        // An agent goes on with what the check of this ID said before, whatever is registered.
        let (status, output) = state(said);
        if !self.update(&well(&id), status, output, key).await? {
            return Err(RegistrarError("Consul's agent lost what was just registered".to_owned()));
        }
        self.written().insert(key.clone(), Written { said: said.clone(), token, looked_at: Instant::now() });
        Ok(())
    }

    /// Once the token it was registered with is deleted, nothing of it reaches the catalog any more: not its end either.
    async fn change_token(&self, key: &Key, hold: Hold) -> Result<(), RegistrarError> {
        let token = self.token()?;
        let said = match self.written().get(key) {
            Some(written) if written.said.epoch == hold.version && written.token != token => written.said.clone(),
            _ => return Ok(()),
        };
        tracing::info!(source = self.name, %key, "there is another token; registered anew with it");
        self.register(key, &said).await
    }

    /// False if a later life was found, now that it is time to look for one. Who stood still looks at once.
    async fn is_last(&self, key: &Key, hold: Hold) -> bool {
        let is_due = |written: &Written| written.looked_at.elapsed() >= self.look_every;
        if !self.written().get(key).is_none_or(is_due) {
            return true;
        }
        match self.look(key).await {
            Ok(found) => {
                self.written().entry(key.clone()).and_modify(|written| written.looked_at = Instant::now());
                !found.is_some_and(|found| found.is_later_than(hold.version))
            }
            // The agent keeps it, also without its servers; to register anew would change nothing.
            Err(error) => {
                tracing::debug!(%key, %error, "whether it is superseded is not known now");
                true
            }
        }
    }

    /// False if the agent does not know the check.
    async fn update(&self, check: &str, status: &str, output: &str, key: &Key) -> Result<bool, RegistrarError> {
        let said = json!({ "Status": status, "Output": output });
        let reply = self.call(Method::PUT, &format!("/v1/agent/check/update/{check}"), Some(said)).await?;
        match reply.status {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            // Agents before 1.11, and one that is between a check and its TTL.
            StatusCode::INTERNAL_SERVER_ERROR if says_unknown(&reply) => Ok(false),
            _ => Err(refused(&reply, &format!("keep `{}`", key.service.name()), &may_write(&key.service))),
        }
    }

    async fn remove(&self, id: &str, service: &ServiceName) -> Result<(), RegistrarError> {
        let reply = self.call(Method::PUT, &format!("/v1/agent/service/deregister/{id}"), None).await?;
        match reply.status {
            StatusCode::OK | StatusCode::NOT_FOUND => Ok(()),
            _ if says_unknown(&reply) => Ok(()),
            _ => Err(refused(&reply, &format!("deregister `{}`", service.name()), &may_write(service))),
        }
    }

    /// What earlier lives left at this agent, of those that were found when `own` was written.
    async fn clear_before(&self, key: &Key, own: Stamp, found: u64) -> Result<(), RegistrarError> {
        let path = format!("/v1/agent/services?filter=Service%3D%3D%22{}%22", key.service.name());
        let reply = self.call(Method::GET, &path, None).await?;
        if reply.status != StatusCode::OK {
            return Err(refused(&reply, &format!("list `{}`", key.service.name()), &may_write(&key.service)));
        }
        let there: BTreeMap<String, serde::de::IgnoredAny> = read(&reply)?;
        let is_left = |id: &&String| Stamp::read(id, key).is_some_and(|stamp| stamp.is_left_to(own, found));
        for id in there.keys().filter(is_left) {
            self.remove(id, &key.service).await?;
        }
        Ok(())
    }

    /// With all of the agent's configuration, so not with each beat.
    async fn agents_address(&self) -> Result<IpAddr, RegistrarError> {
        let said = *self.address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, address)) = said
            && at.elapsed() < ADDRESS_FOR
        {
            return Ok(address);
        }
        let address = self.ask_address().await?;
        *self.address.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), address));
        Ok(address)
    }

    async fn ask_address(&self) -> Result<IpAddr, RegistrarError> {
        let reply = self.call(Method::GET, "/v1/agent/self", None).await?;
        if reply.status != StatusCode::OK {
            return Err(refused(&reply, "tell its agent's address", "agent_prefix \"\" { policy = \"read\" }"));
        }
        let said: Value = read(&reply)?;
        let address = said["Member"]["Addr"].as_str().and_then(|text| text.parse::<IpAddr>().ok());
        let address = address.filter(|address| !address.is_loopback() && !address.is_unspecified());
        address.ok_or_else(|| RegistrarError("Consul's agent has no address of its own".to_owned()))
    }
}

fn says_unknown(reply: &Reply) -> bool {
    let said = said(reply);
    ["Unknown check", "does not have associated TTL", "Unknown service"].iter().any(|words| said.contains(words))
}

impl Registrar for ConsulRegistrar {
    fn name(&self) -> &str {
        &self.name
    }

    /// That of the agent where it runs on this host, as Consul would have it.
    fn address_here(&self) -> Answer<'_, IpAddr> {
        Box::pin(async move {
            let agent = self.settings.parsed().map_err(|error| RegistrarError(error.to_string()))?;
            match address_towards(&[agent.authority]).await {
                Ok(address) => Ok(address),
                Err(first) => self.agents_address().await.map_err(|error| RegistrarError(format!("{first}; {error}"))),
            }
        })
    }

    fn find<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Found>> {
        Box::pin(self.look(key))
    }

    fn write<'a>(&'a self, key: &'a Key, said: &'a Registration, over: Over) -> Answer<'a, Option<Hold>> {
        Box::pin(async move {
            let there = self.look(key).await?;
            let (is_other, found) = match over {
                Over::Own(hold) => (there.is_some_and(|it| it.is_later_than(hold.version)), hold.version),
                Over::Version(version) => (there.map_or(0, |it| it.version) != version, version),
            };
            if is_other {
                return Ok(None);
            }
            self.register(key, said).await?;
            // It is registered, whatever is left beside it until its check ends it.
            if let Err(error) = self.clear_before(key, self.stamp(said.epoch), found).await {
                tracing::warn!(source = self.name, %key, %error, "what was registered before may be listed for another minute");
            }
            Ok(Some(Hold { lease: 0, version: said.epoch }))
        })
    }

    fn keep<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, bool> {
        Box::pin(async move {
            let id = self.stamp(hold.version).id(key);
            if !self.update(&alive(&id), "passing", "", key).await? {
                return Ok(false);
            }
            if !self.is_last(key, hold).await {
                self.remove(&id, &key.service).await?;
                return Ok(false);
            }
            self.change_token(key, hold).await?;
            Ok(true)
        })
    }

    fn withdraw<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, ()> {
        Box::pin(async move {
            self.remove(&self.stamp(hold.version).id(key), &key.service).await?;
            self.written().remove(key);
            Ok(())
        })
    }
}

#[cfg(test)]
#[path = "registrar_tests.rs"]
mod tests;
