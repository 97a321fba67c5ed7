use std::time::Duration;

use proptest::prelude::*;

use super::read::Said;
use super::*;
use crate::fake::trust_domain;

#[path = "import_tests.rs"]
mod imports;

const EXAMPLES: [(&str, &str); 7] = [
    ("http-route.yaml", include_str!("../../../deploy/examples/http-route.yaml")),
    ("grpc-route.yaml", include_str!("../../../deploy/examples/grpc-route.yaml")),
    ("tcp-route.yaml", include_str!("../../../deploy/examples/tcp-route.yaml")),
    ("service-policy.yaml", include_str!("../../../deploy/examples/service-policy.yaml")),
    ("authorization-policy.yaml", include_str!("../../../deploy/examples/authorization-policy.yaml")),
    ("mesh-service.yaml", include_str!("../../../deploy/examples/mesh-service.yaml")),
    ("imported.yaml", include_str!("../../../deploy/examples/imported.yaml")),
];

fn resources_of(text: &str) -> Vec<Resource> {
    let mut all = Vec::new();
    for document in read(text, &trust_domain()) {
        match document.outcome.unwrap() {
            Said::Resources(resources) => all.extend(resources),
            Said::Service(_) => {}
        }
    }
    all
}

/// As an API server gives it, with the times it wrote.
fn of_a_server(text: &str) -> Vec<Resource> {
    let json = crate::yaml::parse(text, 1).ok().unwrap().to_json();
    match read_json(&json, &trust_domain()).outcome.unwrap() {
        Said::Resources(resources) => resources,
        Said::Service(_) => Vec::new(),
    }
}

fn problems_of(text: &str) -> Vec<String> {
    let documents = read(text, &trust_domain());
    let problems = documents.into_iter().filter_map(|document| document.outcome.err()).flatten();
    problems.map(|problem| format!("{}: {}: {}", problem.line, problem.field, problem.reason)).collect()
}

fn document(api: &str, kind: &str, spec: &str) -> String {
    format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{ name: web, namespace: shop }}\nspec: {spec}\n")
}

fn http(spec: &str) -> String {
    let parent = "parentRefs: [ { group: \"\", kind: Service, name: payments } ]";
    document("gateway.networking.k8s.io/v1", "HTTPRoute", &format!("{{ {parent}, {spec} }}"))
}

#[test]
fn every_example_is_understood_and_comes_back_as_it_was_from_disk() {
    for (file, text) in EXAMPLES {
        assert_eq!(problems_of(text), Vec::<String>::new(), "{file}");
        for resource in resources_of(text) {
            let saved = serde_json::to_string(&resource).unwrap();
            assert_eq!(serde_json::from_str::<Resource>(&saved).unwrap(), resource, "{saved}");
        }
    }
}

#[test]
fn an_http_route_says_what_it_says() {
    let resources = resources_of(EXAMPLES[0].1);
    let [Resource::Http(route)] = &resources[..] else { panic!("{resources:?}") };
    assert_eq!(resources[0].targets(), [Target::Service("payments.shop".parse().unwrap())]);
    let rules = &route.spec.rules;
    assert!(rules[0].matches[0].headers[0].matches(b"v2") && !rules[0].matches[0].headers[0].matches(b"v22"));
    assert!(rules[0].matches[0].path.matches("/anything"));
    assert!(rules[1].matches[0].path.matches("/v0/x") && !rules[1].matches[0].path.matches("/v01"));
    assert_eq!(rules[2].backend_refs.iter().map(|backend| backend.weight).collect::<Vec<_>>(), [9, 1]);
    assert_eq!(rules[2].timeouts.request.map(Span::get), Some(Duration::from_secs(10)));
    assert!(
        matches!(&rules[2].filters[1], Filter::RequestMirror { request_mirror } if request_mirror.share() == (5, 100))
    );
    assert!(resources[0].backends().contains(&"payments-v2.shop".parse().unwrap()));
}

fn profile(spec: &str) -> String {
    document("linkerd.io/v1alpha2", "ServiceProfile", spec).replace("name: web", "name: web.shop.svc.cluster.local")
}

#[test]
fn what_is_wrong_is_told_with_its_line_its_field_and_what_to_do() {
    let policy = |spec: &str| {
        let target = "targetRef: { kind: Service, name: payments }";
        document("meshd.dev/v1alpha1", "ServicePolicy", &format!("{{ {target}, {spec} }}"))
    };
    let authorization = |spec: &str| document("meshd.dev/v1alpha1", "AuthorizationPolicy", spec);
    let target = "targetRef: { kind: Service, name: payments }";
    for (text, expected) in [
        (http("hostnames: [a.example]"), "spec.hostnames: is not supported by meshd: routes between services apply"),
        (
            http("rules: [ { sessionPersistence: {} } ]"),
            "spec.rules[0].sessionPersistence: is not supported by meshd: use a ServicePolicy",
        ),
        (http("rules: [ { backendRef: [] } ]"), "unknown field `backendRef`; did you mean `backendRefs`?"),
        (http("rules: [ { filters: [ { type: CORS } ] } ]"), "`CORS` is not supported by meshd"),
        (
            http("rules: [ { filters: [ { type: URLRewrite } ] } ]"),
            "with `URLRewrite` the field `urlRewrite` is needed",
        ),
        (
            http("rules: [ { timeouts: { request: 1s, backendRequest: 2s } } ]"),
            "`backendRequest` is longer than `request`",
        ),
        (http("rules: [ { timeouts: { request: 1.5s } } ]"), "GEP-2257"),
        (
            http("rules: [ { matches: [ { path: { value: v1 } } ] } ]"),
            "spec.rules[0].matches[0].path.value: must begin with `/`",
        ),
        (http("rules: [ { matches: [ { path: { type: RegularExpression, value: \"(\" } } ] } ]"), "RE2"),
        (
            http("rules: [ { matches: [ { headers: [ { name: A, value: b }, { name: a, value: c } ] } ] } ]"),
            "matched twice",
        ),
        (
            http("rules: [ { backendRefs: [ { kind: MeshService, name: x } ] } ]"),
            "a MeshService is of group `meshd.dev`",
        ),
        (http("rules: [ { backendRefs: [ { name: x, weight: 1000001 } ] } ]"), "from 0 to 1000000"),
        (http("rules: []"), "spec.rules: is empty, so that nothing would be answered"),
        (http("rules: [ { name: a }, { name: a } ]"), "spec.rules[1]: `a` is listed twice"),
        (
            http(
                "rules: [ { backendRefs: [ { name: x, filters: [ { type: RequestRedirect, requestRedirect: { port: 1 } } ] } ] } ]",
            ),
            "a rule that redirects sends nothing",
        ),
        (
            document("gateway.networking.k8s.io/v1", "HTTPRoute", "{ parentRefs: [ { name: gate } ] }"),
            "none is a Service or MeshService",
        ),
        (
            document("gateway.networking.k8s.io/v1", "HTTPRoute", "{ parentRefs: [ { kind: Service, name: x } ] }"),
            "a Service is of group ``",
        ),
        (
            document("gateway.networking.k8s.io/v2", "HTTPRoute", "{}"),
            "1: apiVersion: `gateway.networking.k8s.io/v2` is not one of HTTPRoute",
        ),
        (document("x/v1", "HttpRoute", "{}"), "2: kind: unknown value `HttpRoute`; did you mean `HTTPRoute`?"),
        (policy("balancing: { hashHeader: x }"), "has a meaning with `algorithm: ringHash` only"),
        (policy("retryBudget: { window: 0s }"), "must be from 1s to 60s"),
        (policy("outlierEjection: { successRate: { window: 99999h } }"), "must be from 1s to 10m"),
        (policy("timeouts: { connect: 0s }"), "must be longer than nothing"),
        (policy("failover: { belowPercent: 90 }"), "go to and fro"),
        (policy("outlierEjection: { minTime: 2m }"), "`minTime` is longer than `maxTime`"),
        (policy("timeouts: {}"), "says nothing; give at least one of `connect`"),
        (policy("rateLimits: [ { per: host, requestsPerSecond: 1 } ]"), "use one of `service`, `route`, `client`"),
        (
            authorization(&format!("{{ {target}, rules: [ {{ from: [ {{ networks: [ 10.0.0.1/8 ] }} ] }} ] }}")),
            "write 10.0.0.0/8",
        ),
        (authorization(&format!("{{ {target}, rules: [ {{ from: [ {{ identities: [ web ] }} ] }} ] }}")), "ns/"),
        (
            authorization(&format!("{{ {target}, rules: [ {{ to: [ {{ paths: [ \"/a*b\" ] }} ] }} ] }}")),
            "one `*` at the end",
        ),
        (authorization(&format!("{{ {target}, rules: [ {{ to: [] }} ] }}")), "is empty; list at least one"),
        (
            authorization("{ targetRef: { group: meshd.dev, kind: TrustDomain } }"),
            "belongs into namespace meshd-system",
        ),
        (authorization("{ targetRef: { kind: Service } }"), "names no service"),
        (
            authorization(&format!("{{ {target}, rules: [ {{ from: }} ] }}")),
            "spec.rules[0].from: is empty, and without it everybody",
        ),
        (
            authorization(&format!(
                "{{ {target}, rules: [ {{ from: [ {{ identities: , networks: [ 10.0.0.0/8 ] }} ] }} ] }}"
            )),
            "spec.rules[0].from[0].identities: is empty, and without it everybody",
        ),
        (authorization(&format!("{{ {target}, action: deny }}")), "denies nothing"),
        (authorization(&format!("{{ {target}, action: deny, rules: [] }}")), "denies nothing"),
        (
            authorization(&format!(
                "{{ {target}, rules: [ {{ from: [ {{ networks: [ \"::ffff:10.0.0.0/104\" ] }} ] }} ] }}"
            )),
            "write 10.0.0.0/8",
        ),
        (
            authorization(&format!("{{ {target}, rules: [ {{ to: [ {{ paths: [ //admin/* ] }} ] }} ] }}")),
            "contains `//`",
        ),
        (
            authorization(&format!("{{ {target}, rules: [ {{ to: [ {{ paths: [ /admin/.. ] }} ] }} ] }}")),
            "contains `/..`",
        ),
        (
            authorization("{ targetRef: { group: meshd.dev, kind: TrustDomain, name: other.example } }"),
            "names another trust domain than",
        ),
        (
            document(
                "gateway.networking.k8s.io/v1",
                "HTTPRoute",
                "{ parentRefs: [ { group: \"\", kind: Service, name: x, sectionName: http } ] }",
            ),
            "spec.parentRefs[0].sectionName: is not supported by meshd",
        ),
        (
            "apiVersion: meshd.dev/v1alpha1\nkind: ServicePolicy\nmetadata: { name: x }\n".to_owned(),
            "3: metadata.namespace: missing",
        ),
    ] {
        let problems = problems_of(&text);
        assert!(problems.iter().any(|problem| problem.contains(expected)), "{expected}\n{text}\n{problems:#?}");
    }
}

#[test]
fn a_route_of_a_gateway_and_a_service_is_the_services_as_far_as_that_is_meant() {
    let text = document(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        "{ parentRefs: [ { name: gate, sectionName: https }, { group: serving.example, kind: Service, name: fn }, \
         { group: \"\", kind: Service, name: payments } ], hostnames: [ shop.example ], useDefaultGateways: All }",
    );
    assert_eq!(problems_of(&text), Vec::<String>::new());
    assert_eq!(resources_of(&text)[0].targets(), [Target::Service("payments.shop".parse().unwrap())]);
}

/// Matches headers by so many expressions.
fn with_expressions(count: usize) -> String {
    let header = |n: usize| format!("{{ type: RegularExpression, name: h{n}, value: \".{{300}}\" }}");
    let headers: Vec<String> = (0..count).map(header).collect();
    let matches: Vec<String> =
        headers.chunks(16).map(|some| format!("{{ headers: [ {} ] }}", some.join(", "))).collect();
    http(&format!("rules: [ {{ matches: [ {} ] }} ]", matches.join(", ")))
}

#[test]
fn one_document_makes_no_host_compile_expressions_without_end() {
    assert_eq!(problems_of(&with_expressions(64)), Vec::<String>::new());
    assert!(problems_of(&with_expressions(65))[0].contains("has 65 regular expressions and 64 are allowed"));
    let condition =
        "any: [ { pathRegex: /a }, { pathRegex: /b }, { pathRegex: /c }, { pathRegex: /d }, { pathRegex: /e } ]";
    let route = format!("{{ name: r, condition: {{ {condition} }} }}");
    let routes = |count: usize| profile(&format!("{{ routes: [ {} ] }}", vec![route.as_str(); count].join(", ")));
    assert_eq!(problems_of(&routes(12)), Vec::<String>::new());
    assert!(problems_of(&routes(13))[0].contains("has 65 regular expressions"));
}

#[test]
fn a_grpc_route_has_no_more_matches_than_an_http_route() {
    let rule = format!("{{ matches: [ {} ] }}", vec!["{ method: { method: Get } }"; 43].join(", "));
    let route = |rules: usize| {
        let parent = "parentRefs: [ { group: \"\", kind: Service, name: payments } ]";
        let spec = format!("{{ {parent}, rules: [ {} ] }}", vec![rule.as_str(); rules].join(", "));
        problems_of(&document("gateway.networking.k8s.io/v1", "GRPCRoute", &spec))
    };
    assert_eq!(route(2), Vec::<String>::new());
    assert!(route(3)[0].contains("have 129 matches together and 128 are allowed"));
}

/// What an API server adds to every object.
#[test]
fn what_is_ours_comes_back_from_an_api_server() {
    let ours = [EXAMPLES[3], EXAMPLES[4], EXAMPLES[5]];
    for (line, chunk) in ours.into_iter().flat_map(|(_, text)| crate::documents::split(text)) {
        let mut object = crate::yaml::parse(chunk, line).ok().unwrap().to_json();
        let added = serde_json::json!({
            "uid": "x", "resourceVersion": "7", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": { "app": "web" }, "annotations": { "a": "b" }, "managedFields": [{ "manager": "kubectl" }],
        });
        object["metadata"].as_object_mut().unwrap().extend(added.as_object().unwrap().clone());
        object["status"] = serde_json::json!({ "conditions": [] });
        let problems = read_json(&object, &trust_domain()).outcome.err();
        assert_eq!(problems, None, "{object}");
    }
}

#[test]
fn what_kubectl_writes_besides_is_taken() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: gateway.networking.k8s.io/v1\n  kind: HTTPRoute\n  metadata:\n    \
                name: web\n    namespace: shop\n    uid: x\n    resourceVersion: \"7\"\n    generation: 1\n    creationTimestamp: \
                \"2026-01-01T00:00:00Z\"\n    labels: { app: web }\n    annotations: { a: b }\n    managedFields: []\n  spec:\n    \
                parentRefs:\n    - { group: core, kind: Service, name: payments }\n    - { name: gate }\n  status:\n    parents: []\n";
    let resources = resources_of(text);
    assert_eq!((resources.len(), resources[0].parents().len()), (1, 1));
}

#[test]
fn the_older_of_two_that_say_the_same_holds_and_then_the_first_by_name() {
    let route = |name: &str, created: &str, spec: &str| {
        let created = if created.is_empty() { String::new() } else { format!(", creationTimestamp: \"{created}\"") };
        http(spec).replace("name: web,", &format!("name: {name}{created},"))
    };
    let rules = "rules: [ { matches: [ { path: { value: /a } } ] } ]";
    let of = |texts: &[String]| {
        let resources: Vec<Resource> = texts.iter().flat_map(|text| of_a_server(text)).collect();
        conflicts(&resources)
            .into_iter()
            .map(|conflict| (conflict.winner.name.to_string(), conflict.loser.name.to_string()))
            .collect::<Vec<_>>()
    };
    let pair = |winner: &str, loser: &str| vec![(winner.to_owned(), loser.to_owned())];
    let (old, new) = ("2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z");
    assert_eq!(of(&[route("b", "", rules), route("a", "", rules)]), pair("a", "b"));
    assert_eq!(of(&[route("b", old, rules), route("a", new, rules)]), pair("b", "a"));
    assert_eq!(of(&[route("b", new, rules), route("a", "", rules)]), pair("b", "a"));
    assert_eq!(of(&[route("a", "", rules), route("b", "", "rules: [ { matches: [ { path: { value: /b } } ] } ]")]), []);
    let tcp = document(
        "gateway.networking.k8s.io/v1alpha2",
        "TCPRoute",
        "{ parentRefs: [ { group: \"\", kind: Service, name: payments, port: 80 } ], rules: [ { backendRefs: [ { name: x } ] } ] }",
    );
    assert_eq!(of(&[tcp, route("b", "", rules)]), pair("b", "web"));
}

#[test]
fn when_a_document_was_made_is_believed_of_servers_only() {
    let text = http("rules: [ {} ]").replace("name: web,", "name: web, creationTimestamp: \"1970-01-01T00:00:00Z\",");
    assert_eq!(resources_of(&text)[0].meta().created, None);
    assert_eq!(of_a_server(&text)[0].meta().created.as_deref(), Some("1970-01-01T00:00:00Z"));
}

#[test]
fn a_grpc_route_that_says_nothing_is_for_every_call() {
    let parent = "parentRefs: [ { group: \"\", kind: Service, name: payments } ]";
    for rules in ["", ", rules: []", ", rules: [ { matches: [ { method: { service: \"\", method: \"\" } } ] } ]"] {
        let text = document("gateway.networking.k8s.io/v1", "GRPCRoute", &format!("{{ {parent}{rules} }}"));
        assert_eq!(problems_of(&text), Vec::<String>::new());
        let [Resource::Grpc(route)] = &resources_of(&text)[..] else { panic!("{text}") };
        assert_eq!(route.spec.rules.len(), 1, "{rules}");
        let [found] = route.spec.rules[0].alternatives() else { panic!("{rules}") };
        assert!(found.specificity() == GrpcMatch::default().specificity(), "{rules}");
    }
}

#[test]
fn more_specific_matches_come_first() {
    let found = |text: &str| serde_json::from_str::<HttpMatch>(text).unwrap();
    let exact = found(r#"{"path":{"type":"Exact","value":"/a"}}"#);
    let expression = found(r#"{"path":{"type":"RegularExpression","value":"/a.*"},"method":"GET"}"#);
    let longer = found(r#"{"path":{"type":"PathPrefix","value":"/abc"}}"#);
    let with_method = found(r#"{"path":{"type":"PathPrefix","value":"/a"},"method":"GET"}"#);
    let with_header =
        found(r#"{"path":{"type":"PathPrefix","value":"/a"},"headers":[{"type":"Exact","name":"a","value":"b"}]}"#);
    let mut order = [with_header.clone(), longer.clone(), exact.clone(), with_method.clone(), expression.clone()];
    order.sort_by_key(|found| std::cmp::Reverse(found.specificity()));
    assert_eq!(order, [exact, expression, longer, with_method, with_header]);
}

#[test]
fn files_are_checked_against_each_other() {
    let texts: Vec<Text> = [
        ("services.yaml", EXAMPLES[5].1.to_owned()),
        ("route.yaml", EXAMPLES[0].1.to_owned()),
        (
            "again.yaml",
            format!(
                "{}---\n{}",
                http("rules: [ { backendRefs: [ { name: payments, port: 81 }, { name: nowhere } ] } ]"),
                EXAMPLES[0].1
            ),
        ),
    ]
    .into_iter()
    .map(|(file, text)| Text { file: file.to_owned(), text })
    .collect();
    let (findings, documents) = validate(&texts, &trust_domain());
    assert_eq!(documents, 5);
    let said: Vec<String> = findings.iter().map(ToString::to_string).collect();
    for expected in [
        "again.yaml:1: warning: spec.rules[0].backendRefs[0]: payments.shop has no port 81",
        "again.yaml:1: warning: spec.rules[0].backendRefs[1]: nowhere.shop is not defined in these files",
        "metadata.name: HTTPRoute shop/payments is already at route.yaml:2",
        "HTTPRoute shop/web contradicts HTTPRoute shop/payments, which holds",
    ] {
        assert!(said.iter().any(|said| said.contains(expected)), "{expected}\n{said:#?}");
    }
    assert_eq!(findings.iter().filter(|found| found.severity == Severity::Error).count(), 1);
}

#[test]
fn a_deny_of_what_is_below_a_path_that_spares_the_path_itself_is_told() {
    let findings = |action: &str, paths: &str| {
        let spec = format!(
            "{{ targetRef: {{ kind: Service, name: payments }}, action: {action}, rules: [ {{ to: [ {{ paths: [ {paths} ] }} ] }} ] }}"
        );
        let text = document("meshd.dev/v1alpha1", "AuthorizationPolicy", &spec);
        let found = validate(&[Text { file: "deny.yaml".to_owned(), text }], &trust_domain()).0;
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let told = findings("deny", "/admin/*");
    assert!(
        told.len() == 1 && told[0].contains("warning: spec.rules[0].to: `/admin/*` does not deny `/admin`"),
        "{told:?}"
    );
    assert_eq!(
        [findings("deny", "/admin/*, /admin"), findings("allow", "/admin/*"), findings("deny", "/*")].concat(),
        [""; 0]
    );
}

/// Puts `value` where walking down `path` ends.
fn replace(document: &mut serde_json::Value, path: &[prop::sample::Index], value: serde_json::Value) {
    use serde_json::Value;
    let Some((first, rest)) = path.split_first() else { return *document = value };
    match document {
        Value::Array(items) if !items.is_empty() => {
            let at = first.index(items.len());
            replace(&mut items[at], rest, value);
        }
        Value::Object(map) if !map.is_empty() => {
            let at = first.index(map.len());
            if let Some(inner) = map.values_mut().nth(at) {
                replace(inner, rest, value);
            }
        }
        other => *other = value,
    }
}

fn scalar() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::json;
    prop_oneof![
        Just(json!(null)),
        Just(json!([])),
        Just(json!({})),
        any::<bool>().prop_map(|value| json!(value)),
        any::<i64>().prop_map(|value| json!(value)),
        any::<f64>().prop_map(|value| json!(value)),
        ".{0,12}".prop_map(|text| json!(text)),
        prop_oneof![Just("*"), Just("0s"), Just("::/0"), Just("RegularExpression"), Just("/a/*"), Just("(")]
            .prop_map(|text| json!(text)),
    ]
}

proptest! {
    /// Whatever somebody writes into a document is refused or means something that outlives a restart.
    #[test]
    fn no_document_panics_and_what_is_taken_is_read_back(
        example in any::<prop::sample::Index>(),
        changes in prop::collection::vec((prop::collection::vec(any::<prop::sample::Index>(), 1..9), scalar()), 1..4),
    ) {
        let chunks: Vec<_> = EXAMPLES.iter().flat_map(|(_, text)| crate::documents::split(text)).collect();
        let (line, chunk) = example.get(&chunks);
        let mut document = crate::yaml::parse(chunk, *line).ok().unwrap().to_json();
        for (path, value) in changes {
            replace(&mut document, &path, value);
        }
        if let Ok(Said::Resources(resources)) = read_json(&document, &trust_domain()).outcome {
            for resource in resources {
                let saved = serde_json::to_string(&resource).unwrap();
                prop_assert_eq!(serde_json::from_str::<Resource>(&saved).unwrap(), resource);
            }
        }
    }
}
