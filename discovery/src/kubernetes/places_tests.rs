use serde_json::{Value, json};

use super::super::fake_cluster::Cluster;
use super::super::samples::{own_slice, pod, service, slice};
use super::*;

#[test]
fn a_pod_outside_the_mesh_is_plaintext_and_one_that_is_not_known_is_nothing() {
    let mut cluster = Cluster::new();
    cluster.pods = vec![pod("payments-0", "payer", false)];
    let places = cluster.places();
    assert_eq!(places.iter().map(|place| place.transport).collect::<Vec<_>>(), [Transport::Plaintext]);
    let mut other_life = pod("payments-1", "payer", true);
    other_life["metadata"]["uid"] = json!("another");
    cluster.pods = vec![other_life];
    assert!(cluster.places().is_empty());
}

#[test]
fn one_that_ends_takes_new_connections_only_where_no_other_does() {
    let weights = |ready: bool| {
        let mut cluster = Cluster::new();
        cluster.slices[0]["endpoints"][0]["conditions"] =
            json!({ "ready": false, "serving": true, "terminating": true });
        cluster.slices[0]["endpoints"][1]["conditions"] = json!({ "ready": ready });
        cluster.places().iter().map(|place| (place.weight, place.health)).collect::<Vec<_>>()
    };
    assert_eq!(weights(true), [(0, Health::Healthy), (100, Health::Healthy)]);
    assert_eq!(weights(false), [(100, Health::Healthy), (100, Health::Unhealthy)]);
}

#[test]
fn who_writes_a_slice_says_how_its_endpoints_are_reached() {
    let notes = [
        ("transport", "meshd"),
        ("identity", "ns/shop/sa/payments"),
        ("mesh-port", "15018"),
        ("weight", "7"),
        ("network", "vm"),
        ("epoch", "3"),
        ("later", "unknown"),
    ];
    let places = Cluster::of_nobody(vec![own_slice("payments-web", "10.0.0.9", &notes)]).places();
    let expected = Place {
        mesh_port: 15018,
        ports: vec![PortTarget { port: 80, target: 8080 }],
        identity: Some("spiffe://example.org/ns/shop/sa/payments".parse().unwrap()),
        network: "vm".into(),
        zone: "rack-1".into(),
        weight: 7,
        epoch: 3,
        ..crate::fake::place("10.0.0.9")
    };
    assert_eq!(places, [Arc::new(expected)]);
    let plain = Cluster::of_nobody(vec![own_slice("payments-web", "10.0.0.9", &[])]).places();
    assert_eq!(plain[0].transport, Transport::Plaintext);
}

#[test]
fn annotations_that_mean_nothing_are_named_and_the_others_of_the_service_hold() {
    for (notes, expected) in [
        (("transport", "tcp"), "annotation meshd.dev/transport: write meshd, hbone or plaintext"),
        (("weight", "heavy"), "annotation meshd.dev/weight: `heavy` is no such number"),
        (("mesh-port", "70000"), "annotation meshd.dev/mesh-port: `70000` is no such number"),
        (("identity", "payments"), "identity: "),
        (("network", "a b"), "network: "),
        (("weight", "9999999"), "weight: 9999999 is too much"),
    ] {
        let good = own_slice("payments-a", "10.0.0.8", &[("transport", "meshd")]);
        let bad = own_slice("payments-b", "10.0.0.9", &[("transport", "meshd"), notes]);
        let cluster = Cluster::of_nobody(vec![good, bad]);
        let problems = cluster.problems();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(
            problems[0].starts_with("EndpointSlice shop/payments-b: ") && problems[0].contains(expected),
            "{problems:?}"
        );
        assert_eq!(cluster.read().len(), 3);
    }
    for (notes, expected) in [
        (("identities", ""), "nobody may serve"),
        (("identities", "payments"), "annotation meshd.dev/identities: "),
        (("identities", "ns/meshd-system/sa/web"), "is a host"),
        (("allow-plaintext", "yes"), "write \"true\" or \"false\""),
    ] {
        let problems = Cluster { service: service("payments", &[notes]), ..Cluster::new() }.problems();
        assert!(problems[0].starts_with("Service shop/payments: ") && problems[0].contains(expected), "{problems:?}");
    }
}

#[test]
fn what_nobody_can_use_takes_no_connections_from_one_that_ends() {
    let mut cluster = Cluster { is_named: false, ..Cluster::new() };
    cluster.slices[0]["endpoints"][0]["conditions"] = json!({ "ready": false, "serving": true, "terminating": true });
    let weights = |cluster: &Cluster| cluster.places().iter().map(|place| place.weight).collect::<Vec<_>>();
    assert_eq!(weights(&cluster), [0, 100]);
    // Its successor does not take part in the mesh, or is not known yet.
    cluster.pods[1] = pod("payments-1", "payer", false);
    assert_eq!(weights(&cluster), [100]);
    cluster.pods.remove(1);
    assert_eq!(weights(&cluster), [100]);
}

/// In the family that the Service names first.
#[test]
fn a_pod_with_an_address_of_either_family_is_one_place() {
    let mut cluster = Cluster::new();
    let mut other = slice("payments-y", &["fd00::1", "fd00::2", "fd00::3"]);
    other["addressType"] = json!("IPv6");
    cluster.slices.push(other);
    cluster.pods.push(pod("payments-2", "payer", true));
    let addresses = |cluster: &Cluster| {
        let mut addresses: Vec<String> = cluster.places().iter().map(|place| place.address.to_string()).collect();
        addresses.sort();
        addresses
    };
    cluster.service["spec"]["ipFamilies"] = json!(["IPv4", "IPv6"]);
    assert_eq!(addresses(&cluster), ["10.0.0.1", "10.0.0.2", "fd00::3"], "the last has one of the other family only");
    cluster.service["spec"]["ipFamilies"] = json!(["IPv6"]);
    assert_eq!(addresses(&cluster), ["fd00::1", "fd00::2", "fd00::3"]);
}

#[test]
fn a_pod_that_moves_between_slices_is_what_the_readiest_of_them_says() {
    let mut cluster = Cluster::new();
    cluster.slices.push(slice("payments-a", &["10.0.0.1"]));
    for unready in [0, 1] {
        cluster.slices[unready]["endpoints"][0]["conditions"] = json!({ "ready": false });
        cluster.slices[1 - unready]["endpoints"][0]["conditions"] = json!({ "ready": true });
        let places = cluster.places();
        assert_eq!(places.len(), 2, "{places:?}");
        assert!(places.iter().all(|place| place.health == Health::Healthy), "{places:?}");
    }
}

/// As it is between a change of the Service and that of its slices.
#[test]
fn a_slice_of_none_of_the_services_ports_is_named_and_takes_nothing_away() {
    let mut cluster = Cluster::new();
    cluster.service["spec"]["ports"] = json!([{ "name": "site", "port": 80 }, { "name": "admin", "port": 81 }]);
    let problems = cluster.problems();
    let expected = "none of its ports (`web`) is one of the Service (`site`, `admin`)";
    assert!(problems.len() == 1 && problems[0].contains(expected), "{problems:?}");
    assert!(problems[0].contains("the last good version stays in force"), "{problems:?}");
    // Where another slice has them, this one is of something else.
    let mut other = slice("payments-y", &[]);
    other["ports"] = json!([{ "name": "site", "port": 8080 }]);
    cluster.slices.push(other);
    assert_eq!(cluster.problems(), Vec::<String>::new());
}

#[test]
fn a_port_without_a_number_is_the_services_own() {
    let mut cluster = Cluster::new();
    cluster.slices[0]["ports"] = json!([{ "name": "web" }]);
    assert_eq!(cluster.places()[0].ports, [PortTarget { port: 80, target: 80 }]);
}

#[test]
fn annotations_on_slices_of_pods_mean_nothing() {
    let mut cluster = Cluster::new();
    for (note, text) in [("weight", "heavy"), ("network", "vm"), ("epoch", "9"), ("transport", "?")] {
        cluster.slices[0]["metadata"]["annotations"][format!("meshd.dev/{note}")] = json!(text);
    }
    assert_eq!(cluster.places(), Cluster::new().places());
    assert_eq!(cluster.problems(), Vec::<String>::new());
}

#[test]
fn an_endpoint_that_cannot_be_is_named_and_the_others_are_used() {
    let mut cluster = Cluster::of_nobody(vec![own_slice("payments-x", "10.0.0.8", &[("transport", "meshd")])]);
    let endpoints = cluster.slices[0]["endpoints"].as_array_mut().unwrap();
    endpoints.push(json!({ "addresses": ["0.0.0.0"] }));
    let places = cluster.places();
    assert!(places.len() == 1 && places[0].address.to_string() == "10.0.0.8", "{places:?}");
    let problems = cluster.problems();
    assert!(problems.len() == 1 && problems[0].contains("0.0.0.0 is not the address of a host"), "{problems:?}");
    let alone: Vec<Value> = vec![cluster.slices[0]["endpoints"][1].clone()];
    cluster.slices[0]["endpoints"] = json!(alone);
    assert!(cluster.problems()[0].contains("the last good version stays in force"));
}
