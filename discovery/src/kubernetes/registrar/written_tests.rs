use std::collections::HashMap;

use tokio::time::Instant;

use super::super::super::objects::{Kind, Object};
use super::super::super::read::{Known, Learned, Reader};
use super::super::super::samples;
use super::*;
use crate::fake::trust_domain;
use crate::register::offer_for_tests;
use crate::{Change, Namespaces, Place, PortTarget, Transport};

const KEEPER: Keeper<'static> = Keeper { lease: "api-1", holder: "api-1/7" };

fn said() -> Registration {
    Registration {
        address: [10, 0, 0, 1].into(),
        mesh_port: 15009,
        ports: vec![PortTarget { port: 80, target: 8080 }],
        identity: Some("ns/shop/sa/payments".to_owned()),
        transport: Transport::Meshd,
        network: "lan".to_owned(),
        zone: "a".to_owned(),
        weight: 50,
        health: Health::Healthy,
        epoch: 7,
        version: "1.2".to_owned(),
    }
}

fn names() -> BTreeMap<u16, String> {
    [(80, "web".to_owned())].into()
}

/// As the source reads what was written, of a Service that selects no pods.
fn read_back(said: &Registration, dead: bool) -> Place {
    let written = slice(&offer_for_tests().key, said, &names(), KEEPER, None);
    let mut service = samples::service("payments", &[]);
    service["spec"]["selector"] = Value::Null;
    let Object::Service(service) = samples::object(Kind::Service, service) else { panic!("no service") };
    let Object::Slice(slice) = samples::object(Kind::Slice, written) else { panic!("no slice") };
    let dead = dead.then(|| (KEEPER.lease.to_owned(), KEEPER.holder.to_owned()));
    let reader =
        Reader { trust_domain: trust_domain(), authority: Namespaces::default(), dead: dead.into_iter().collect() };
    let known =
        Known { service: &service, slices: vec![&slice], pods: &HashMap::new(), is_named: true, is_described: false };
    match reader.read(&known, &mut Learned::default(), Instant::now()).pop() {
        Some(Change::Set(record)) => (*record.places[0]).clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_written_is_read_as_the_same_place_and_as_unhealthy_once_its_host_is_dead() {
    let place = said().place(&trust_domain()).unwrap();
    assert_eq!(read_back(&said(), false), place);
    assert_eq!(read_back(&said(), true), Place { health: Health::Unhealthy, ..place });
}

#[test]
fn one_that_leaves_takes_nothing_new_and_one_that_is_not_well_is_unhealthy() {
    let leaves = Registration { weight: 0, ..said() };
    assert_eq!((read_back(&leaves, false).weight, read_back(&leaves, false).health), (0, Health::Healthy));
    let ill = Registration { health: Health::Unhealthy, ..said() };
    assert_eq!(read_back(&ill, false).health, Health::Unhealthy);
}

#[test]
fn names_are_ones_that_kubernetes_takes_and_no_two_registrations_share_one() {
    let named = |instance: &str| {
        let mut key = offer_for_tests().key;
        instance.clone_into(&mut key.instance);
        name_of(&key)
    };
    assert_eq!(named("api-1"), "meshd.payments.api-1");
    assert_eq!(named("api-1.443"), "meshd.payments.api-1.443");
    for odd in ["Api_1", "-a", "a.", "a..b"] {
        let name = named(odd);
        assert!(name.starts_with("meshd.payments.x") && name.len() == "meshd.payments.x".len() + 16, "{name}");
    }
    assert_ne!(named("Api_1"), named("api_1"));
}

#[test]
fn a_lease_says_its_time_as_kubernetes_writes_times() {
    let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(1_700_000_000_000_042);
    let lease = lease("meshd-system", KEEPER, Some("5"), at, at);
    assert_eq!(lease["spec"]["renewTime"], "2023-11-14T22:13:20.000042Z");
    assert_eq!(
        (&lease["metadata"]["resourceVersion"], &lease["spec"]["leaseDurationSeconds"]),
        (&json!("5"), &json!(9))
    );
}

#[test]
fn istio_is_told_the_program_its_account_and_that_it_takes_hbone() {
    let said = Registration { mesh_port: crate::DEFAULT_MESH_PORT, ..said() };
    let entry = workload_entry(&offer_for_tests().key, &said, &names(), KEEPER, None);
    let expected = json!({
        "address": "10.0.0.1", "ports": { "web": 8080 }, "weight": 50, "serviceAccount": "payments", "network": "lan",
        "locality": "a", "labels": { "app": "payments", "networking.istio.io/tunnel": "http" },
    });
    assert_eq!(entry["spec"], expected);
}
