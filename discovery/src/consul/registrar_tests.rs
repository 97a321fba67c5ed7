use super::super::read::{BASE, Reading};
use super::*;
use crate::fake::trust_domain;
use crate::register::Offer;
use crate::{Change, Transport};

fn offer() -> Offer {
    crate::register::offer_for_tests()
}

fn said() -> Registration {
    let ports = vec![PortTarget { port: 80, target: 8080 }, PortTarget { port: 443, target: 8443 }];
    Registration {
        address: [10, 0, 0, 1].into(),
        mesh_port: 15009,
        ports,
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

/// As the health endpoint shows what was registered.
fn shown(body: &Value, statuses: [&str; 2]) -> Value {
    let checks: Vec<Value> = (0..2)
        .map(|n| json!({ "CheckID": body["Checks"][n]["CheckID"], "Status": statuses[n] }))
        .chain([json!({ "CheckID": OF_THE_NODE, "Status": "passing" })])
        .collect();
    json!({
        "Node": { "Node": "n1", "Address": "10.0.0.9" }, "Checks": checks,
        "Service": { "ID": body["ID"], "Service": body["Name"], "Address": body["Address"], "Port": body["Port"],
                     "Meta": body["Meta"], "Weights": body["Weights"] },
    })
}

#[test]
fn what_is_registered_is_read_as_the_same_place() {
    let key = offer().key;
    let shown = shown(&body(&key, &said()), ["passing", "passing"]);
    let reading =
        Reading { trust_domain: trust_domain(), namespace: "default".into(), base: BASE.into(), resources: None };
    let instance = reading.instance(serde_json::from_value(shown).unwrap());
    let Change::Set(record) = instance.said else { panic!("{:?}", instance.said) };
    assert_eq!(record.service, key.service);
    assert_eq!(*record.places[0], said().place(&trust_domain()).unwrap());
}

#[test]
fn of_several_lives_the_latest_that_is_kept_counts() {
    let key = offer().key;
    let life = |epoch: u64, alive: &str| {
        let shown = shown(&body(&key, &Registration { epoch, ..said() }), [alive, "critical"]);
        serde_json::from_value::<Entry>(shown).unwrap()
    };
    let found = |entries: &[Entry]| latest(entries, &key).map(|found| found.epoch);
    assert_eq!(found(&[life(3, "passing"), life(7, "passing"), life(5, "passing")]), Some(7));
    // One that nobody keeps has ended; that its program is not well does not end it.
    assert_eq!(found(&[life(3, "passing"), life(7, "critical")]), Some(3));
    assert_eq!(found(&[]), None);
    let other = Key { instance: "api-1.443".to_owned(), ..key.clone() };
    assert_eq!(latest(&[life(3, "passing")], &other), None);
}

#[test]
fn one_that_leaves_or_is_not_well_is_critical_for_everybody() {
    assert_eq!(state(&said()).0, "passing");
    assert_eq!(state(&Registration { weight: 0, ..said() }).0, "critical");
    assert_eq!(state(&Registration { health: Health::Unhealthy, ..said() }).0, "critical");
}
