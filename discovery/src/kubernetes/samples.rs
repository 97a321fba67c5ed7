//! Objects as an API server sends them, for tests.

use serde_json::{Value, json};

use super::json::read_list;
use super::objects::{Kind, Object};

pub(super) fn service(name: &str, notes: &[(&str, &str)]) -> Value {
    let annotations: serde_json::Map<String, Value> =
        notes.iter().map(|(key, value)| (format!("meshd.dev/{key}"), json!(value))).collect();
    json!({
        "metadata": { "name": name, "namespace": "shop", "annotations": annotations, "managedFields": [{}] },
        "spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "selector": { "app": name },
            "ports": [
                { "name": "web", "port": 80, "targetPort": "http", "protocol": "TCP", "appProtocol": "http" },
                { "name": "dns", "port": 53, "targetPort": 53, "protocol": "UDP" },
            ],
        },
        "status": { "loadBalancer": {} },
    })
}

/// With an endpoint for each address, whose pod is `NAME-N`; `payments-a1b2` is a slice of `payments`.
pub(super) fn slice(name: &str, addresses: &[&str]) -> Value {
    let service = name.rsplit_once('-').expect("a slice's name").0;
    let endpoint = |(n, address): (usize, &&str)| {
        json!({
            "addresses": [address], "conditions": { "ready": true, "serving": true, "terminating": false },
            "targetRef": { "kind": "Pod", "name": format!("{service}-{n}"), "namespace": "shop", "uid": format!("uid-{n}") },
            "nodeName": "node-1", "zone": "rack-1",
        })
    };
    json!({
        "metadata": { "name": name, "namespace": "shop", "labels": { "kubernetes.io/service-name": service } },
        "addressType": "IPv4",
        "endpoints": addresses.iter().enumerate().map(endpoint).collect::<Vec<_>>(),
        "ports": [{ "name": "web", "port": 8080, "protocol": "TCP" }],
    })
}

/// `payments-0` is one that the Service `payments` selects.
pub(super) fn pod(name: &str, account: &str, hbone: bool) -> Value {
    let (service, number) = name.rsplit_once('-').expect("a pod's name");
    let uid = format!("uid-{number}");
    let redirection = if hbone { "enabled" } else { "disabled" };
    json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": uid,
            "labels": { "app": service }, "annotations": { "ambient.istio.io/redirection": redirection },
        },
        "spec": { "serviceAccountName": account, "containers": [{ "name": "main", "image": "x" }] },
        "status": { "podIP": "10.0.0.1" },
    })
}

/// A document of ours with one endpoint.
pub(super) fn mesh(name: &str, port: u16) -> Value {
    json!({
        "metadata": { "name": name, "namespace": "shop", "uid": "u", "generation": 1, "labels": { "team": "pay" } },
        "spec": { "ports": [{ "port": port }], "endpoints": [{ "address": "10.0.1.1" }] },
    })
}

/// Of a Service that selects no pods: one endpoint, and what its annotations say.
pub(super) fn own_slice(name: &str, address: &str, notes: &[(&str, &str)]) -> Value {
    let mut slice = slice(name, &[address]);
    let annotations: serde_json::Map<String, Value> =
        notes.iter().map(|(key, value)| (format!("meshd.dev/{key}"), json!(value))).collect();
    slice["metadata"]["annotations"] = annotations.into();
    slice["endpoints"][0]["targetRef"] = Value::Null;
    slice
}

pub(super) fn objects(kind: Kind, objects: &[Value]) -> Vec<Object> {
    let list = json!({ "kind": "List", "metadata": { "resourceVersion": "7" }, "items": objects });
    read_list(kind, list.to_string().as_bytes()).expect("a list").objects
}

pub(super) fn object(kind: Kind, object: Value) -> Object {
    objects(kind, &[object]).pop().expect("an object")
}
