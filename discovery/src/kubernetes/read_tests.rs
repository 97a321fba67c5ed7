use serde_json::{Value, json};

use super::super::fake_cluster::{Cluster, definition, shorts};
use super::super::objects::{Kind, Object};
use super::super::samples::{self, object, own_slice, pod, service};
use super::*;
use crate::fake::trust_domain;
use crate::{Namespaces, Place, PortTarget, Protocol};

#[test]
fn a_service_is_its_ports_its_addresses_and_the_accounts_of_its_pods() {
    let mut cluster = Cluster::new();
    cluster.pods[1] = pod("payments-1", "other", true);
    let found = cluster.definition().unwrap();
    assert_eq!(found.ports, [ServicePort { port: 80, protocol: Protocol::Http }]);
    assert_eq!(shorts(&found), ["ns/shop/sa/other", "ns/shop/sa/payer"]);
    assert_eq!(found.addresses, ["10.96.0.7".parse::<std::net::IpAddr>().unwrap()]);
    let places = cluster.places();
    assert_eq!(places.len(), 2);
    let expected = Place {
        ports: vec![PortTarget { port: 80, target: 8080 }],
        transport: Transport::Hbone,
        identity: Some("spiffe://example.org/ns/shop/sa/payer".parse().unwrap()),
        zone: "rack-1".into(),
        ..crate::fake::place("10.0.0.1")
    };
    assert_eq!(*places[0], expected);
}

#[test]
fn a_service_may_name_who_serves_it_and_nobody_else_does_then() {
    let cluster =
        Cluster { service: service("payments", &[("identities", "ns/shop/sa/a, ns/b/sa/c")]), ..Cluster::new() };
    assert_eq!(shorts(&cluster.definition().unwrap()), ["ns/shop/sa/a", "ns/b/sa/c"]);
}

/// Reads by pattern see every pod of a namespace.
#[test]
fn a_slice_makes_no_pod_a_server_that_the_service_does_not_select() {
    let elsewhere = |change: fn(&mut Cluster)| {
        let mut cluster = Cluster::new();
        cluster.pods[1] = pod("payments-1", "strange", true);
        change(&mut cluster);
        (shorts(&cluster.definition().unwrap()).join(" "), cluster.places().len())
    };
    let mine = ("ns/shop/sa/payer".to_owned(), 1);
    assert_eq!(elsewhere(|_| {}), ("ns/shop/sa/payer ns/shop/sa/strange".to_owned(), 2));
    assert_eq!(elsewhere(|cluster| cluster.pods[1]["metadata"]["labels"] = Value::Null), mine);
    assert_eq!(elsewhere(|cluster| cluster.pods[1]["metadata"]["labels"]["app"] = json!("other")), mine);
    let of_another_namespace = |cluster: &mut Cluster| {
        cluster.pods[1]["metadata"]["namespace"] = json!("evil");
        cluster.slices[0]["endpoints"][1]["targetRef"]["namespace"] = json!("evil");
    };
    assert_eq!(elsewhere(of_another_namespace), mine);
    let of_nobody = |cluster: &mut Cluster| cluster.service["spec"]["selector"] = Value::Null;
    assert_eq!(elsewhere(of_nobody).0, "ns/shop/sa/payments");
}

#[test]
fn identities_outlive_the_pods_so_that_what_is_doubted_may_still_serve() {
    let (mut cluster, mut learned) = (Cluster::new(), Learned::default());
    cluster.read_at(&mut learned, Instant::now());
    cluster.pods.clear();
    cluster.slices.clear();
    assert_eq!(shorts(&definition(&cluster.read_at(&mut learned, Instant::now())).unwrap()), ["ns/shop/sa/payer"]);
    assert!(cluster.definition().unwrap().identities.is_empty(), "nothing is made up over what others still know");
}

/// Ten pods of one account lost by accident, while one of another is left.
#[test]
fn an_account_stays_beside_others_for_as_long_as_its_loss_may_be_doubted() {
    let (mut cluster, mut learned, start) = (Cluster::new(), Learned::default(), Instant::now());
    cluster.pods[1] = pod("payments-1", "other", true);
    cluster.read_at(&mut learned, start);
    cluster.pods.remove(0);
    let lost = start + 10 * LEAVES_AFTER;
    let mut who = |at: Instant| shorts(&definition(&cluster.read_at(&mut learned, at)).unwrap()).join(" ");
    assert_eq!(who(lost), "ns/shop/sa/other ns/shop/sa/payer");
    assert_eq!(who(lost + LEAVES_AFTER / 2), "ns/shop/sa/other ns/shop/sa/payer");
    assert_eq!(who(lost + LEAVES_AFTER), "ns/shop/sa/other");
}

#[test]
fn without_authority_it_says_where_and_not_what() {
    let cluster = Cluster { authority: Namespaces::default(), ..Cluster::new() };
    assert_eq!(cluster.definition(), None);
    assert_eq!(cluster.places().len(), 2);
    let explicit = Cluster { service: service("payments", &[("identities", "ns/shop/sa/a")]), ..cluster };
    assert!(explicit.definition().is_some(), "to be refused by name");
}

#[test]
fn by_a_pattern_only_what_takes_part_in_the_mesh_is_imported() {
    let mut plain = Cluster { is_named: false, ..Cluster::new() };
    assert_eq!(plain.read().len(), 2, "its pods take HBONE");
    plain.pods = vec![pod("payments-0", "payer", false)];
    assert_eq!(plain.read(), []);
    let mut learned = Learned { takes_mesh: true, ..Learned::default() };
    assert_eq!(plain.read_at(&mut learned, Instant::now()).len(), 2, "it was of the mesh before");
    plain.service = service("payments", &[("allow-plaintext", "true")]);
    assert_eq!(plain.places().len(), 1);
    assert!(plain.definition().unwrap().allow_plaintext);
}

#[test]
fn what_runs_nowhere_is_told_to_whoever_names_it() {
    let mut cluster = Cluster::new();
    cluster.service["spec"]["type"] = json!("ExternalName");
    assert!(cluster.problems()[0].contains("it is an ExternalName"));
    cluster.is_named = false;
    assert_eq!(cluster.read(), []);
    let mut udp = Cluster::new();
    udp.service["spec"]["ports"] = json!([{ "port": 53, "protocol": "UDP" }]);
    assert!(udp.problems()[0].contains("it has no TCP port"));
}

fn described(sample: Value) -> Option<Change> {
    let Object::Mesh(document) = object(Kind::Mesh, sample) else { panic!("no document") };
    Reader { trust_domain: trust_domain(), authority: Namespaces::everything(), dead: BTreeSet::new() }
        .document(&document)
}

#[test]
fn a_document_is_what_it_is_in_a_file_and_comes_before_a_service() {
    let Some(Change::Set(record)) = described(samples::mesh("payments", 80)) else { panic!("refused") };
    assert_eq!((&*record.key, &*record.origin), ("meshservice/shop/payments", "MeshService shop/payments"));
    assert!(record.key < service_key(&record.service));
    assert_eq!(shorts(record.definition.as_ref().unwrap()), ["ns/shop/sa/payments"]);
    assert_eq!(record.places.len(), 1);
    let mut bad = samples::mesh("payments", 80);
    bad["spec"]["ports"][0]["port"] = json!("eighty");
    let Some(Change::Refused(refused)) = described(bad) else { panic!("taken") };
    assert!(refused.problems[0].starts_with("MeshService shop/payments: spec.ports[0].port: "), "{refused:?}");
    let mut reserved = samples::mesh("payments", 80);
    reserved["metadata"]["namespace"] = json!("meshd-system");
    assert_eq!(described(reserved), None);
}

#[test]
fn of_a_service_beside_a_document_the_places_count_and_it_defines_something_only_if_it_says_something() {
    let registered = || vec![own_slice("payments-x", "10.0.0.1", &[("transport", "meshd")])];
    let mut cluster = Cluster { is_described: true, is_named: false, ..Cluster::of_nobody(registered()) };
    assert!(cluster.definition().is_none());
    assert_eq!(cluster.places().len(), 1);
    cluster.service = service("payments", &[("identities", "ns/shop/sa/other")]);
    assert!(cluster.definition().is_some(), "a collision that nobody is told of");
    let selecting = Cluster { is_described: true, ..Cluster::new() };
    assert!(selecting.definition().is_some() && selecting.places().len() == 2);
}
