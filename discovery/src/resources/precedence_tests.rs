use std::collections::BTreeSet;

use tokio::time::Instant;

use super::super::{Attachments, HeldResources, Resource, ResourceLayer, ResourceNews, conflicts};
use super::*;
use crate::{Belief, Epoch, Namespaces, fake};

fn route(kind: &str, name: &str, namespace: &str, parents: &str) -> String {
    let backends = "rules: [ { backendRefs: [ { name: elsewhere } ] } ]";
    let parent = |port: &str| {
        let port = if port == "*" { String::new() } else { format!(", port: {port}") };
        format!("{{ group: \"\", kind: Service, name: payments, namespace: shop{port} }}")
    };
    let parents: Vec<String> = parents.split(' ').map(parent).collect();
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{ name: {name}, namespace: {namespace} }}\nspec: {{ \
         parentRefs: [ {} ], {backends} }}\n",
        parents.join(", ")
    )
}

fn resources(texts: &[String]) -> Vec<Resource> {
    texts.iter().flat_map(|text| fake::resources("", text).resources).collect()
}

fn attached(texts: &[String]) -> Attachments {
    let mut held = HeldResources::new(Belief::Always);
    let records = texts.iter().enumerate().map(|(n, text)| fake::resources(&n.to_string(), text)).collect();
    let (prefix, epoch) = ("".into(), Epoch::default());
    held.apply(ResourceNews::Listed { prefix, epoch, records, refused: vec![] }, Instant::now());
    let everything = Namespaces::everything();
    let layer = ResourceLayer { source: &"files".into(), routes: &everything, policies: &everything, held: &held };
    let targets: BTreeSet<_> = resources(texts).iter().flat_map(Resource::targets).collect();
    targets.iter().fold(Attachments::default(), |attached, target| attached.with(target, std::slice::from_ref(&layer)))
}

/// The routes for clients of a namespace on a port.
fn names(attached: &Attachments, namespace: &str, port: u16, carried: Carried) -> Vec<String> {
    let service = "payments.shop".parse().unwrap();
    let name = |meta: &super::super::Meta| meta.name.to_string();
    match attached.routes_for(&service, namespace, port, carried) {
        PortRoutes::None => vec![],
        PortRoutes::Grpc(routes) => routes.iter().map(|route| name(&route.metadata)).collect(),
        PortRoutes::Http(routes) => routes.iter().map(|route| name(&route.metadata)).collect(),
        PortRoutes::Tcp(routes) => routes.iter().map(|route| name(&route.metadata)).collect(),
    }
}

#[test]
fn a_consumer_route_of_one_port_displaces_the_producers_of_that_port_only() {
    let attached = attached(&[
        route("HTTPRoute", "producer", "shop", "*"),
        route("HTTPRoute", "consumer", "web", "80"),
        route("TCPRoute", "bytes", "web", "5432"),
    ]);
    let of = |namespace, port| names(&attached, namespace, port, Carried::Requests);
    assert_eq!((of("web", 80), of("web", 81)), (vec!["consumer".to_owned()], vec!["producer".to_owned()]));
    assert_eq!((of("shop", 80), of("other", 80)), (vec!["producer".to_owned()], vec!["producer".to_owned()]));
    let bytes = |namespace, port| names(&attached, namespace, port, Carried::Bytes);
    assert_eq!((bytes("web", 5432), bytes("web", 80), bytes("shop", 5432)), (vec!["bytes".to_owned()], vec![], vec![]));
}

#[test]
fn on_each_port_the_first_kind_counts_of_which_there_is_a_route() {
    let attached = attached(&[
        route("TCPRoute", "tcp", "shop", "*"),
        route("HTTPRoute", "http", "shop", "80 81"),
        route("GRPCRoute", "grpc", "shop", "81"),
    ]);
    let of = |port, carried| names(&attached, "any", port, carried).join(" ");
    let requests = [80, 81, 82].map(|port| of(port, Carried::Requests));
    assert_eq!(requests, ["http", "grpc", "tcp"]);
    assert_eq!([80, 81, 82].map(|port| of(port, Carried::Bytes)), ["tcp"; 3]);
}

/// What is told as a contradiction is one where clients ask, and the other way round.
#[test]
fn contradictions_of_kinds_are_told_where_one_of_them_does_not_count() {
    for (one, other) in [("80", "81"), ("80", "80"), ("*", "80"), ("80", "*"), ("*", "*"), ("80 82", "81 82")] {
        let texts = [route("GRPCRoute", "grpc", "shop", one), route("HTTPRoute", "http", "shop", other)];
        let attached = attached(&texts);
        let ports: BTreeSet<u16> =
            [one, other].iter().flat_map(|ports| ports.split(' ')).flat_map(str::parse).collect();
        let ports = if ports.is_empty() { BTreeSet::from([80]) } else { ports };
        let counts = |port: &u16| names(&attached, "any", *port, Carried::Requests).join(" ");
        let is_http = |port: &&u16| other == "*" || other.split(' ').any(|own| own.parse() == Ok(**port));
        let displaced = ports.iter().filter(is_http).any(|port| counts(port) == "grpc");
        let told = conflicts(&resources(&texts));
        assert_eq!(!told.is_empty(), displaced, "{one} against {other}: {told:?}");
    }
}

#[test]
fn more_of_a_call_is_matched_first() {
    let found = |text: &str| serde_json::from_str::<GrpcMatch>(text).unwrap();
    let all = [
        found(r#"{"method":{"type":"Exact","service":"shop.Payments","method":"Charge"}}"#),
        found(
            r#"{"method":{"type":"Exact","service":"shop.Payments"},"headers":[{"type":"Exact","name":"a","value":"b"}]}"#,
        ),
        found(r#"{"method":{"type":"Exact","service":"shop.Payments"}}"#),
        found(r#"{"method":{"type":"Exact","service":"shop.Pay","method":"ChargeEverything"}}"#),
        found(r#"{"method":{"type":"RegularExpression","service":"shop[.].*"}}"#),
        found(r#"{"method":{"type":"Exact","method":"Charge"}}"#),
        found(r#"{"headers":[{"type":"Exact","name":"a","value":"b"}]}"#),
        found("{}"),
    ];
    let mut order = all.clone();
    order.reverse();
    order.sort_by_key(|found| Reverse(found.specificity()));
    assert_eq!(order, all);
}

#[test]
fn matches_of_all_routes_are_tried_in_one_order_and_those_alike_in_that_of_the_routes() {
    let with = |name: &str, rules: &str| {
        route("HTTPRoute", name, "shop", "*").replace("rules: [ { backendRefs: [ { name: elsewhere } ] } ]", rules)
    };
    let first = with("first", "rules: [ { name: all }, { name: b, matches: [ { path: { value: /b } } ] } ]");
    let second = with(
        "second",
        "rules: [ { name: exact, matches: [ { path: { type: Exact, value: /b } }, { path: { value: /b } } ] } ]",
    );
    let attached = attached(&[first, second]);
    let service = "payments.shop".parse().unwrap();
    let PortRoutes::Http(routes) = attached.routes_for(&service, "any", 80, Carried::Requests) else { panic!("none") };
    let order: Vec<&str> = http_order(&routes).iter().filter_map(|found| found.rule.name.as_deref()).collect();
    assert_eq!(order, ["exact", "b", "exact", "all"]);
}
