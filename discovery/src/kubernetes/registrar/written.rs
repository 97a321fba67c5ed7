//! What a host writes into the cluster, as the API server takes it. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::macros::format_description;

use super::super::objects::{LEASE, LEASE_HOLDER, NOTES, SERVICE_NAME};
use crate::register::{Key, TTL};
use crate::{Health, Registration};

const MANAGED_BY: &str = "meshd";

/// Who keeps what a slice says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keeper<'a> {
    pub(super) lease: &'a str,
    pub(super) holder: &'a str,
}

/// Of an instance, as a part of an object's name and as a label: itself where Kubernetes takes it.
pub(super) fn word_of(instance: &str) -> String {
    let fits = |part: &str| {
        let inner = part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        !part.is_empty() && inner && !part.starts_with('-') && !part.ends_with('-')
    };
    if instance.split('.').all(fits) { instance.to_owned() } else { format!("x{:016x}", fnv(instance)) }
}

/// FNV-1a, which is the same in each version of this program.
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A name of a Service has no dot, so no two registrations have one name.
pub(super) fn name_of(key: &Key) -> String {
    format!("meshd.{}.{}", key.service.name(), word_of(&key.instance))
}

pub(super) fn slice(
    key: &Key,
    said: &Registration,
    names: &BTreeMap<u16, String>,
    keeper: Keeper<'_>,
    version: Option<u64>,
) -> Value {
    let mut endpoint = json!({ "addresses": [said.address.to_string()], "conditions": conditions(said) });
    if !said.zone.is_empty() {
        endpoint["zone"] = said.zone.clone().into();
    }
    let named = |port: &crate::PortTarget| {
        let name = names.get(&port.port).cloned().unwrap_or_default();
        json!({ "name": name, "port": port.target, "protocol": "TCP" })
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": metadata(key, said, keeper, version),
        "addressType": if matches!(said.address, IpAddr::V4(_)) { "IPv4" } else { "IPv6" },
        "endpoints": [endpoint],
        "ports": said.ports.iter().map(named).collect::<Vec<_>>(),
    })
}

/// One that leaves still serves what it has: kube-proxy and meshd know both words.
fn conditions(said: &Registration) -> Value {
    let (leaves, well) = (said.weight == 0, said.health == Health::Healthy);
    json!({ "ready": well && !leaves, "serving": well, "terminating": leaves })
}

fn metadata(key: &Key, said: &Registration, keeper: Keeper<'_>, version: Option<u64>) -> Value {
    let notes = [
        ("transport", "meshd".to_owned()),
        ("mesh-port", said.mesh_port.to_string()),
        ("weight", said.weight.to_string()),
        ("epoch", said.epoch.to_string()),
        ("identity", said.identity.clone().unwrap_or_default()),
        ("network", said.network.clone()),
        ("version", said.version.clone()),
        (LEASE, keeper.lease.to_owned()),
        (LEASE_HOLDER, keeper.holder.to_owned()),
    ];
    let given = notes.into_iter().filter(|(_, text)| !text.is_empty());
    let annotations: Map<String, Value> = given.map(|(name, text)| (format!("{NOTES}{name}"), text.into())).collect();
    let mut metadata = json!({
        "name": name_of(key), "namespace": key.service.namespace(), "annotations": annotations,
        "labels": {
            SERVICE_NAME: key.service.name(), "endpointslice.kubernetes.io/managed-by": MANAGED_BY,
            format!("{NOTES}{LEASE}"): keeper.lease,
        },
    });
    if let Some(version) = version {
        metadata["resourceVersion"] = version.to_string().into();
    }
    metadata
}

/// `acquired`: since when this holder has it.
pub(super) fn lease(
    namespace: &str,
    keeper: Keeper<'_>,
    version: Option<&str>,
    acquired: SystemTime,
    now: SystemTime,
) -> Value {
    let mut metadata = json!({
        "name": keeper.lease, "namespace": namespace, "labels": { format!("{NOTES}{LEASE}"): keeper.lease },
    });
    if let Some(version) = version {
        metadata["resourceVersion"] = version.into();
    }
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata,
        "spec": {
            "holderIdentity": keeper.holder, "leaseDurationSeconds": TTL.as_secs(),
            "acquireTime": moment(acquired), "renewTime": moment(now),
        },
    })
}

/// As Kubernetes' MicroTime.
fn moment(time: SystemTime) -> String {
    let form = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
    OffsetDateTime::from(time).format(form).unwrap_or_default()
}

/// Only what was read may be deleted.
pub(super) fn deletion(version: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "DeleteOptions", "preconditions": { "resourceVersion": version } })
}

/// As Istio knows a host: its program, and that it takes HBONE, as a waypoint or ztunnel dials it.
pub(super) fn workload_entry(
    key: &Key,
    said: &Registration,
    names: &BTreeMap<u16, String>,
    keeper: Keeper<'_>,
    version: Option<u64>,
) -> Value {
    let mut metadata = metadata(key, said, keeper, version);
    metadata["labels"] = json!({ format!("{NOTES}{LEASE}"): keeper.lease });
    let ports: Map<String, Value> = said
        .ports
        .iter()
        .map(|port| {
            let name = names.get(&port.port).filter(|name| !name.is_empty());
            (name.cloned().unwrap_or_else(|| format!("port-{}", port.port)), port.target.into())
        })
        .collect();
    let mut labels = json!({ "app": key.service.name() });
    if said.mesh_port == crate::DEFAULT_MESH_PORT {
        labels["networking.istio.io/tunnel"] = "http".into();
    }
    let mut spec =
        json!({ "address": said.address.to_string(), "ports": ports, "labels": labels, "weight": said.weight });
    let account = said.identity.as_deref().and_then(|identity| identity.rsplit_once("/sa/")).map(|(_, name)| name);
    let more = [("serviceAccount", account.unwrap_or_default()), ("network", &said.network), ("locality", &said.zone)];
    for (field, text) in more.into_iter().filter(|(_, text)| !text.is_empty()) {
        spec[field] = text.into();
    }
    json!({ "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry", "metadata": metadata, "spec": spec })
}

#[cfg(test)]
#[path = "written_tests.rs"]
mod tests;
