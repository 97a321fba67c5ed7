use serde_json::{Value, json};

use super::super::objects::{Kind, Object};
use super::super::samples;
use super::super::samples::{object, objects, own_slice, pod, service, slice};
use super::*;
use crate::fake::trust_domain;
use crate::{Namespaces, Protocol};

/// What is there, and how it is imported.
struct Cluster {
    service: Value,
    slices: Vec<Value>,
    pods: Vec<Value>,
    is_named: bool,
    is_described: bool,
    authority: Namespaces,
}

impl Cluster {
    /// Two pods that take HBONE behind `payments`.
    fn new() -> Cluster {
        Cluster {
            service: service("payments", &[]),
            slices: vec![slice("payments-x", &["10.0.0.1", "10.0.0.2"])],
            pods: vec![pod("payments-0", "payer", true), pod("payments-1", "payer", true)],
            is_named: true,
            is_described: false,
            authority: Namespaces::everything(),
        }
    }

    fn of_nobody(slices: Vec<Value>) -> Cluster {
        let mut service = service("payments", &[]);
        service["spec"]["selector"] = Value::Null;
        Cluster { service, slices, pods: vec![], ..Cluster::new() }
    }

    fn read_with(&self, learned: &mut Learned) -> Vec<Change> {
        let Some(Object::Service(service)) = objects(Kind::Service, std::slice::from_ref(&self.service)).pop() else {
            panic!("no service")
        };
        let slices: Vec<Slice> = objects(Kind::Slice, &self.slices).into_iter().map(only_slice).collect();
        let pods = objects(Kind::Pod, &self.pods).into_iter().map(|object| match object {
            Object::Pod(key, pod) => (key, pod),
            other => panic!("{other:?}"),
        });
        let known = Known {
            service: &service,
            slices: slices.iter().collect(),
            pods: &pods.collect(),
            is_named: self.is_named,
            is_described: self.is_described,
        };
        Reader { trust_domain: trust_domain(), authority: self.authority.clone(), dead: BTreeSet::new() }
            .read(&known, learned)
    }

    fn read(&self) -> Vec<Change> {
        self.read_with(&mut Learned::default())
    }

    fn definition(&self) -> Option<Definition> {
        definition(&self.read())
    }

    fn places(&self) -> Vec<Arc<Place>> {
        self.read().iter().flat_map(|change| record(change).places.clone()).collect()
    }

    fn problems(&self) -> Vec<String> {
        let problems = |change| match change {
            Change::Refused(refused) => refused.problems,
            _ => vec![],
        };
        self.read().into_iter().flat_map(problems).collect()
    }
}

fn only_slice(object: Object) -> Slice {
    match object {
        Object::Slice(slice) => slice,
        other => panic!("{other:?}"),
    }
}

fn record(change: &Change) -> &Record {
    match change {
        Change::Set(record) => record,
        other => panic!("{other:?}"),
    }
}

fn definition(changes: &[Change]) -> Option<Definition> {
    changes.iter().find_map(|change| record(change).definition.as_deref().cloned())
}

fn shorts(definition: &Definition) -> Vec<&str> {
    definition.identities.iter().map(SpiffeId::short).collect()
}

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
    cluster.read_with(&mut learned);
    cluster.pods.clear();
    cluster.slices.clear();
    assert_eq!(shorts(&definition(&cluster.read_with(&mut learned)).unwrap()), ["ns/shop/sa/payer"]);
    assert!(cluster.definition().unwrap().identities.is_empty(), "nothing is made up over what others still know");
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
fn by_a_pattern_only_what_takes_part_in_the_mesh_is_imported() {
    let mut plain = Cluster { is_named: false, ..Cluster::new() };
    assert_eq!(plain.read().len(), 2, "its pods take HBONE");
    plain.pods = vec![pod("payments-0", "payer", false)];
    assert_eq!(plain.read(), []);
    let mut learned = Learned { takes_mesh: true, ..Learned::default() };
    assert_eq!(plain.read_with(&mut learned).len(), 2, "it was of the mesh before");
    plain.service = service("payments", &[("allow-plaintext", "true")]);
    assert_eq!(plain.places().len(), 1);
    assert!(plain.definition().unwrap().allow_plaintext);
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
