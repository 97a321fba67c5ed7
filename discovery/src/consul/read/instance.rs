//! An instance of a Consul service as a place of a service of the mesh: what is not in its registration is in its Meta.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use meshd_identity::SYSTEM_NAMESPACE;
use serde::Deserialize;

use super::Reading;
use crate::documents::{DEFAULT_MESH_PORT, DEFAULT_WEIGHT, MAX_WEIGHT};
use crate::yaml::printable;
use crate::{Change, Health, Place, PortTarget, Record, Registration, ServiceName, Transport, stored};

/// As Consul's health endpoint has it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    node: Node,
    service: Registered,
    #[serde(default)]
    checks: Option<Vec<Check>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Node {
    #[serde(default)]
    address: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Registered {
    service: String,
    #[serde(default)]
    address: String,
    #[serde(default)]
    port: i64,
    #[serde(default)]
    meta: Option<HashMap<String, String>>,
    #[serde(default)]
    weights: Option<Weights>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Weights {
    passing: u32,
    warning: u32,
}

/// What Consul takes for what is not given.
impl Default for Weights {
    fn default() -> Weights {
        Weights { passing: 1, warning: 1 }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Check {
    status: String,
}

/// As much of an instance as it takes to name it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Named {
    node: NamedNode,
    service: NamedService,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NamedNode {
    node: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NamedService {
    #[serde(rename = "ID")]
    id: String,
    service: String,
}

/// What an instance says.
#[derive(Debug, Clone, PartialEq)]
pub(in super::super) struct Instance {
    /// With the service of the mesh in it, so that one that moves to another is another record.
    pub(in super::super) key: Arc<str>,
    /// `None`: it cannot be told.
    pub(in super::super) service: Option<ServiceName>,
    /// It says how the mesh reaches it. One that does not may know nothing of the mesh.
    pub(in super::super) names_transport: bool,
    pub(in super::super) said: Arc<Change>,
}

/// `None`: of a service whose name differs in case, which Consul answers, too.
pub(super) fn read(name: &str, text: &[u8], reading: &Reading) -> Result<Option<Instance>, serde_json::Error> {
    let named: Named = serde_json::from_slice(text)?;
    if named.service.service != name {
        return Ok(None);
    }
    let Named { node: NamedNode { node }, service: NamedService { id, .. } } = &named;
    let origin = format!("Consul service `{name}`, instance `{}` on node `{}`", printable(id), printable(node));
    let at = format!("{}/{}", escaped(node), escaped(id));
    let mut problems = Vec::new();
    let entry: Option<Entry> =
        serde_json::from_slice(text).map_err(|error| problems.push(printable(&error.to_string()))).ok();
    let service = entry.as_ref().and_then(|entry| service_of(entry, reading, &mut problems));
    let key = key(service.as_ref().map_or(name, ServiceName::as_str), &at);
    let names_transport = entry.as_ref().is_none_or(|entry| entry.meta("meshd-transport").is_some());
    let place = entry.as_ref().and_then(|entry| place(entry, reading, &mut problems));
    let said = match (&service, place) {
        (Some(service), Some(place)) if problems.is_empty() => Change::Set(Record {
            key: key.clone(),
            origin: origin.into(),
            service: service.clone(),
            definition: None,
            places: vec![Arc::new(place)],
        }),
        _ => Change::Refused(stored::refused(&key, &origin, &problems)),
    };
    Ok(Some(Instance { key, service, names_transport, said: Arc::new(said) }))
}

/// No document has such a key.
fn key(service: &str, at: &str) -> Arc<str> {
    format!("catalog:{service}/{at}").into()
}

/// Consul takes any name.
fn escaped(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2F")
}

impl Instance {
    /// Its node and its ID there.
    pub(in super::super) fn at(&self) -> &str {
        self.key.split_once('/').map_or("", |(_, at)| at)
    }

    /// It was of this service, and what it is now cannot be told.
    pub(in super::super) fn stays_with(mut self, service: &ServiceName) -> Instance {
        self.key = key(service.as_str(), self.at());
        if let Change::Refused(refused) = Arc::make_mut(&mut self.said) {
            refused.key = self.key.clone();
        }
        self.service = Some(service.clone());
        self
    }
}

impl Entry {
    fn meta(&self, key: &str) -> Option<&str> {
        self.service.meta.as_ref()?.get(key).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// The number under a key, or why it is none.
    fn number<N: std::str::FromStr>(&self, key: &str, allowed: &str, problems: &mut Vec<String>) -> Option<N> {
        let text = self.meta(key)?;
        let number = text.parse().ok();
        if number.is_none() {
            problems.push(format!("Meta {key}: `{}` is not what it takes; write {allowed}", printable(text)));
        }
        number
    }

    fn is(&self, status: &str) -> bool {
        self.checks.iter().flatten().any(|check| check.status == status)
    }
}

fn service_of(entry: &Entry, reading: &Reading, problems: &mut Vec<String>) -> Option<ServiceName> {
    let namespace = entry.meta("meshd-namespace").unwrap_or(&reading.namespace);
    if namespace == SYSTEM_NAMESPACE {
        problems.push(format!("Meta meshd-namespace: `{namespace}` is reserved for hosts; choose another"));
        return None;
    }
    let service = ServiceName::new(&entry.service.service, namespace);
    service.map_err(|error| problems.push(format!("Meta meshd-namespace: {error}"))).ok()
}

fn place(entry: &Entry, reading: &Reading, problems: &mut Vec<String>) -> Option<Place> {
    const PORT: &str = "a port, 1 to 65535";
    let ports = match entry.meta("meshd-ports") {
        Some(text) => listed_ports(text, problems),
        None => ports(entry, entry.number("meshd-port", PORT, problems), problems).map(|only| vec![only]),
    };
    let mesh_port = entry.number("meshd-mesh-port", PORT, problems).unwrap_or(DEFAULT_MESH_PORT);
    let epoch = entry.number("meshd-epoch", "a whole number", problems).unwrap_or(0);
    let transport = transport(entry, problems);
    let registration = Registration {
        address: address(entry, problems)?,
        mesh_port,
        ports: ports?,
        identity: entry.meta("meshd-identity").map(str::to_owned),
        transport: transport?,
        network: entry.meta("meshd-network").unwrap_or_default().to_owned(),
        zone: entry.meta("meshd-zone").unwrap_or_default().to_owned(),
        weight: entry.number("meshd-weight", "a whole number", problems).unwrap_or_else(|| weight(entry)),
        health: if entry.is("critical") { Health::Unhealthy } else { Health::Healthy },
        epoch,
        version: String::new(),
    };
    let place = registration.place(&reading.trust_domain);
    place.map_err(|found| problems.extend(found.iter().map(|problem| in_words_of_consul(problem)))).ok()
}

/// Maintenance is a critical check, too: of the instance, or of its node.
fn weight(entry: &Entry) -> u32 {
    let weights = entry.service.weights.clone().unwrap_or_default();
    let share = if entry.is("warning") { weights.warning } else { weights.passing };
    share.saturating_mul(DEFAULT_WEIGHT).min(MAX_WEIGHT)
}

fn address(entry: &Entry, problems: &mut Vec<String>) -> Option<IpAddr> {
    let own = Some(&entry.service.address).filter(|address| !address.is_empty());
    let text = own.unwrap_or(&entry.node.address);
    let address = text.parse().ok();
    if address.is_none() {
        let text = printable(text);
        problems.push(format!("Address: `{text}` is not an IP address; register one (names are not resolved)"));
    }
    address
}

/// Which port of the service it serves, and the program's own.
fn ports(entry: &Entry, of_service: Option<u16>, problems: &mut Vec<String>) -> Option<PortTarget> {
    let registered = entry.service.port;
    let Ok(own) = u16::try_from(registered) else {
        problems.push(format!("Port: {registered} is no port; register 1 to 65535"));
        return None;
    };
    match (own, of_service) {
        (0, None) => {
            problems.push("Port: none is registered; register the program's, or name Meta meshd-port".to_owned());
            None
        }
        (0, Some(port)) => Some(PortTarget { port, target: port }),
        (target, port) => Some(PortTarget { port: port.unwrap_or(target), target }),
    }
}

/// `80:8080,443:8443`
fn listed_ports(text: &str, problems: &mut Vec<String>) -> Option<Vec<PortTarget>> {
    let one = |word: &str| {
        let (port, target) = word.split_once(':')?;
        Some(PortTarget { port: port.trim().parse().ok()?, target: target.trim().parse().ok()? })
    };
    let all: Option<Vec<PortTarget>> = text.split(',').map(one).collect();
    if all.is_none() {
        let text = printable(text);
        problems.push(format!("Meta meshd-ports: `{text}` is no list of ports; write PORT:TARGET,PORT:TARGET"));
    }
    all
}

/// Who says nothing is a program that Consul knew before the mesh came.
fn transport(entry: &Entry, problems: &mut Vec<String>) -> Option<Transport> {
    let Some(text) = entry.meta("meshd-transport") else { return Some(Transport::Plaintext) };
    let known = Transport::NAMES.iter().find(|(name, _)| *name == text).map(|(_, transport)| *transport);
    if known.is_none() {
        let text = printable(text);
        problems.push(format!("Meta meshd-transport: `{text}` is not known; write meshd, hbone or plaintext"));
    }
    known
}

/// A registration's fields are named otherwise here.
fn in_words_of_consul(problem: &str) -> String {
    let (field, reason) = problem.split_once(": ").unwrap_or(("", problem));
    let named = match field {
        "address" => "Address",
        "ports" => "Port, Meta meshd-port, meshd-ports",
        "meshPort" => "Meta meshd-mesh-port",
        "weight" => "Weights, Meta meshd-weight",
        "identity" => "Meta meshd-identity",
        "network" => "Meta meshd-network",
        "zone" => "Meta meshd-zone",
        other => other,
    };
    format!("{named}: {reason}")
}

#[cfg(test)]
#[path = "instance_tests.rs"]
mod tests;
