use serde_json::{Value, json};

use super::super::BASE;
use super::*;
use crate::fake::trust_domain;

fn reading() -> Reading {
    Reading { trust_domain: trust_domain(), namespace: "shop".into(), base: BASE.into(), resources: None }
}

/// As Consul 1.20 writes it, with more fields than are read.
fn entry(meta: Value, more: impl FnOnce(&mut Value)) -> Value {
    let mut entry = json!({
        "Node": { "ID": "", "Node": "web", "Address": "10.0.0.7", "Datacenter": "dc1", "Meta": null },
        "Service": {
            "ID": "payments-1", "Service": "payments", "Tags": [], "Address": "", "Meta": meta, "Port": 8080,
            "Weights": { "Passing": 1, "Warning": 1 }, "Connect": {}, "ModifyIndex": 22,
        },
        "Checks": [{ "CheckID": "serfHealth", "Status": "passing" }],
    });
    more(&mut entry);
    entry
}

fn read(entry: Value, reading: &Reading) -> Instance {
    let name = entry["Service"]["Service"].as_str().unwrap();
    super::read(name, entry.to_string().as_bytes(), reading).unwrap().unwrap()
}

fn set(instance: Instance) -> Record {
    match Arc::unwrap_or_clone(instance.said) {
        Change::Set(record) => record,
        other => panic!("{other:?}"),
    }
}

fn problems(instance: &Instance) -> &[String] {
    match &*instance.said {
        Change::Refused(refused) => &refused.problems,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_instance_that_knows_nothing_of_the_mesh_is_plaintext_on_its_own_port() {
    let instance = read(entry(Value::Null, |_| {}), &reading());
    assert!(!instance.names_transport);
    let record = set(instance);
    assert_eq!((&*record.key, record.service.as_str()), ("catalog:payments.shop/web/payments-1", "payments.shop"));
    let place = &record.places[0];
    assert_eq!((place.address, place.transport), ("10.0.0.7".parse().unwrap(), Transport::Plaintext));
    assert_eq!(place.ports, [PortTarget { port: 8080, target: 8080 }]);
}

#[test]
fn meta_says_the_rest() {
    let meta = json!({
        "meshd-namespace": "billing", "meshd-port": "80", "meshd-mesh-port": "15009", "meshd-transport": "meshd",
        "meshd-identity": "ns/billing/sa/payments", "meshd-network": "lan", "meshd-zone": "a", "meshd-epoch": "7",
    });
    let instance = read(entry(meta, |entry| entry["Service"]["Address"] = json!("10.0.0.8")), &reading());
    assert!(instance.names_transport);
    let record = set(instance);
    assert_eq!(record.service.as_str(), "payments.billing");
    let place = &record.places[0];
    assert_eq!((place.address, place.mesh_port, place.epoch), ("10.0.0.8".parse().unwrap(), 15009, 7));
    assert_eq!(place.ports, [PortTarget { port: 80, target: 8080 }]);
    assert_eq!((&*place.network, &*place.zone, place.transport), ("lan", "a", Transport::Meshd));
    assert_eq!(place.identity.as_ref().unwrap().short(), "ns/billing/sa/payments");
}

#[test]
fn several_ports_and_an_exact_weight_are_in_meta() {
    let meta = json!({ "meshd-ports": "80:8080, 443:8443", "meshd-port": "80", "meshd-weight": "7" });
    let place = set(read(entry(meta, |_| {}), &reading())).places[0].clone();
    let ports = [PortTarget { port: 80, target: 8080 }, PortTarget { port: 443, target: 8443 }];
    assert_eq!((place.ports.as_slice(), place.weight), (ports.as_slice(), 7));
}

#[test]
fn a_critical_check_makes_it_unhealthy_and_a_warning_takes_the_weight_of_warnings() {
    let of = |status: &str| {
        let entry = entry(Value::Null, |entry| {
            entry["Service"]["Weights"] = json!({ "Passing": 3, "Warning": 2 });
            entry["Checks"] = json!([{ "Status": "passing" }, { "Status": status }]);
        });
        let place = set(read(entry, &reading())).places[0].clone();
        (place.health, place.weight)
    };
    assert_eq!(of("passing"), (Health::Healthy, 300));
    assert_eq!(of("warning"), (Health::Healthy, 200));
    assert_eq!(of("critical"), (Health::Unhealthy, 300));
    let heaviest = entry(Value::Null, |entry| entry["Service"]["Weights"] = json!({ "Passing": 65535, "Warning": 1 }));
    assert_eq!(set(read(heaviest, &reading())).places[0].weight, MAX_WEIGHT);
}

#[test]
fn everything_that_is_wrong_is_said_at_once_with_service_instance_and_key() {
    let meta = json!({
        "meshd-port": "http", "meshd-mesh-port": "99999", "meshd-transport": "tls", "meshd-zone": "a b",
        "meshd-epoch": "-1", "meshd-namespace": "Shop",
    });
    let instance = read(entry(meta, |entry| entry["Service"]["Address"] = json!("db.example.org")), &reading());
    assert_eq!(instance.service, None);
    let origin = "Consul service `payments`, instance `payments-1` on node `web`: ";
    let fields = ["Meta meshd-namespace", "Meta meshd-port", "Meta meshd-mesh-port", "Meta meshd-epoch"];
    for (problem, field) in problems(&instance).iter().zip(fields.iter().chain(&["Meta meshd-transport", "Address"])) {
        assert!(problem.starts_with(&format!("{origin}{field}: ")), "{problem}");
    }
    assert_eq!(problems(&instance).len(), 6);
    for (meta, field) in [
        (json!({ "meshd-zone": "a b" }), "Meta meshd-zone"),
        (json!({ "meshd-identity": "ns/meshd-system/sa/web" }), "Meta meshd-identity"),
        (json!({ "meshd-port": "0" }), "Port, Meta meshd-port, meshd-ports"),
        (json!({ "meshd-ports": "80:8080,443" }), "Meta meshd-ports"),
        (json!({ "meshd-weight": "1000001" }), "Weights, Meta meshd-weight"),
        (json!({ "meshd-mesh-port": "0" }), "Meta meshd-mesh-port"),
        (json!({ "meshd-namespace": "meshd-system" }), "Meta meshd-namespace"),
    ] {
        let instance = read(entry(meta, |_| {}), &reading());
        assert!(problems(&instance)[0].starts_with(&format!("{origin}{field}: ")), "{instance:?}");
    }
}

#[test]
fn an_instance_without_port_has_that_of_the_service_if_it_names_it() {
    let without = |meta: Value| read(entry(meta, |entry| entry["Service"]["Port"] = json!(0)), &reading());
    let place = set(without(json!({ "meshd-port": "80" }))).places[0].clone();
    assert_eq!(place.ports, [PortTarget { port: 80, target: 80 }]);
    assert!(problems(&without(json!({})))[0].contains("Port: none is registered"));
}

#[test]
fn what_the_network_says_is_escaped_and_cut() {
    let entry = entry(json!({ "meshd-port": "\u{1b}[31m" }), |entry| {
        entry["Service"]["ID"] = json!(format!("a\n{}", "b".repeat(500)));
    });
    let instance = read(entry, &reading());
    let problem = &problems(&instance)[0];
    assert!(!problem.contains(['\n', '\u{1b}']) && problem.len() < 600, "{problem}");
}

#[test]
fn no_name_makes_a_key_that_is_a_documents_or_another_instances() {
    let named = |service: &str, node: &str, id: &str| {
        let named = |entry: &mut Value| {
            (entry["Service"]["Service"], entry["Service"]["ID"]) = (json!(service), json!(id));
            entry["Node"]["Node"] = json!(node);
        };
        read(entry(Value::Null, named), &reading()).key
    };
    assert_eq!(
        &*named("meshd-discovery", "v1", "shop/a/service"),
        "catalog:meshd-discovery.shop/v1/shop%2Fa%2Fservice"
    );
    assert_ne!(named("a", "b", "c/d"), named("a", "b/c", "d"));
    assert_ne!(named("a", "b%2Fc", "d"), named("a", "b/c", "d"));
}

#[test]
fn an_entry_of_another_shape_is_refused_by_its_name_and_one_of_another_service_is_none() {
    let odd = entry(Value::Null, |entry| entry["Service"]["Port"] = json!("http"));
    let instance = read(odd, &reading());
    assert_eq!((instance.service.as_ref(), instance.at()), (None, "web/payments-1"));
    let origin = "Consul service `payments`, instance `payments-1` on node `web`: ";
    assert!(problems(&instance)[0].starts_with(origin), "{instance:?}");
    let text = entry(Value::Null, |_| {}).to_string();
    assert_eq!(super::read("Payments", text.as_bytes(), &reading()).unwrap(), None);
    assert!(super::read("payments", b"{}", &reading()).is_err());
}
