use super::*;

use crate::Service;
use crate::fake::trust_domain;

const HEAD: &str = "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: { name: payments, namespace: shop }\n";

/// `spec` starts at line 4, its first field at line 5.
fn with_spec(spec: &str) -> String {
    format!("{HEAD}spec:\n{spec}")
}

fn service(spec: &str) -> Service {
    let mut documents = parse(&with_spec(spec), &trust_domain());
    assert_eq!(documents.len(), 1);
    let record = documents.remove(0).outcome.unwrap().record("payments.yaml:1".into());
    crate::merge::tests::alone("files", record)
}

/// All problems of a document as `line: field: reason`.
fn problems(text: &str) -> Vec<String> {
    let documents = parse(text, &trust_domain());
    let found = documents.iter().filter_map(|document| document.outcome.as_ref().err()).flatten();
    found.map(|problem| format!("{}: {}: {}", problem.line, problem.field, problem.reason)).collect()
}

#[test]
fn the_least_a_service_needs_is_a_name_and_a_port() {
    let service = service("  ports: [ { port: 80 } ]\n");
    assert_eq!(service.name.as_str(), "payments.shop");
    assert_eq!(service.ports, [ServicePort { port: 80, protocol: Protocol::Detect }]);
    assert_eq!(service.identities[0].as_str(), "spiffe://example.org/ns/shop/sa/payments");
    assert!(!service.allow_plaintext && service.endpoints.is_empty());
    assert_eq!(&*service.source, "files");
}

#[test]
fn an_endpoint_gets_the_defaults_and_one_record_per_port() {
    let service =
        service("  ports: [ { port: 80 }, { port: 443, protocol: tls } ]\n  endpoints: [ { address: 10.87.0.12 } ]\n");
    assert_eq!(service.endpoints.len(), 2);
    let endpoint = service.endpoints_on(443).next().unwrap();
    assert_eq!(endpoint.dial, "10.87.0.12:15008".parse().unwrap());
    assert_eq!(endpoint.target, "10.87.0.12:443".parse().unwrap());
    assert_eq!((endpoint.transport, endpoint.weight, endpoint.epoch), (Transport::Meshd, 100, 0));
    assert_eq!(endpoint.identity, service.identities[0]);
    assert_eq!(service.port(443).unwrap().protocol, Protocol::Tls);
}

#[test]
fn every_field_of_an_endpoint_is_taken() {
    let service = service(concat!(
        "  ports: [ { port: 80, protocol: http } ]\n",
        "  identities: [ ns/shop/sa/payments, \"spiffe://other.org/ns/x/sa/y\" ]\n",
        "  allowPlaintext: true\n",
        "  endpoints:\n",
        "  - { address: \"fd00::7\", meshPort: 15009, identity: \"spiffe://other.org/ns/x/sa/y\", transport: hbone, targetPort: 8080,\n",
        "      network: dc-1, zone: a, weight: 5 }\n",
        "  - { address: 10.0.0.9, transport: plaintext, targetPort: 8081, identity: ns/shop/sa/payments }\n",
        "  - { address: \"::ffff:10.0.0.8\", identity: ns/shop/sa/payments }\n",
    ));
    let [hbone, plaintext, mapped] = service.endpoints.as_slice() else { panic!("{:?}", service.endpoints) };
    assert_eq!((hbone.dial, hbone.target), ("[fd00::7]:15009".parse().unwrap(), "[fd00::7]:8080".parse().unwrap()));
    assert_eq!((&*hbone.network, &*hbone.zone, hbone.weight), ("dc-1", "a", 5));
    assert_eq!((hbone.transport, hbone.identity.as_str()), (Transport::Hbone, "spiffe://other.org/ns/x/sa/y"));
    assert_eq!(
        (plaintext.dial, plaintext.target),
        ("10.0.0.9:8081".parse().unwrap(), "10.0.0.9:8081".parse().unwrap())
    );
    assert_eq!(mapped.dial, "10.0.0.8:15008".parse().unwrap());
}

#[test]
fn every_mistake_names_line_field_and_remedy() {
    let two_identities = "  identities: [ ns/shop/sa/a, ns/shop/sa/b ]\n";
    let cases: &[(&str, &str)] = &[
        ("  port: 80\n", "5: spec.port: unknown field `port`; did you mean `ports`?"),
        ("  ports: 80\n", "5: spec.ports: must be a list, found the number 80"),
        ("  ports:\n", "5: spec.ports: missing; add it, for example `ports: [ { port: 80 } ]`"),
        ("  ports: []\n", "5: spec.ports: a service needs at least one port"),
        ("  ports: [ 80 ]\n", "5: spec.ports[0]: must be a mapping with `port`, `protocol`, found the number 80"),
        (
            "  ports:\n  - port: 0\n",
            "6: spec.ports[0].port: must be a whole number from 1 to 65535, found the number 0",
        ),
        ("  ports:\n  - port: 65536\n", "6: spec.ports[0].port: must be a whole number from 1 to 65535"),
        ("  ports:\n  - port: \"80\"\n", "found the text `80`"),
        ("  ports:\n  - port: eighty\n", "found the text `eighty`"),
        ("  ports:\n  - port: 80\n  - port: 80\n", "7: spec.ports[1]: port 80 is listed twice"),
        (
            "  ports:\n  - port: 80\n    protocol: htp\n",
            "7: spec.ports[0].protocol: unknown value `htp`; did you mean `http`?",
        ),
        ("  ports: [ { port: 80 } ]\n  identities: []\n", "6: spec.identities: nobody may serve this service"),
        (
            "  ports: [ { port: 80 } ]\n  identities: [ payments ]\n",
            "6: spec.identities[0]: identity `payments` is neither",
        ),
        (
            "  ports: [ { port: 80 } ]\n  identities: [ ns/a/sa/b, ns/a/sa/b ]\n",
            "6: spec.identities[1]: `ns/a/sa/b` is listed twice",
        ),
        (
            "  ports: [ { port: 80 } ]\n  identities: [ ns/meshd-system/sa/web ]\n",
            "6: spec.identities[0]: `ns/meshd-system/sa/web` is a host",
        ),
        ("  ports: [ { port: 80 } ]\n  allowPlaintext: yes please\n", "6: spec.allowPlaintext: must be true or false"),
        ("  ports: [ { port: 80 } ]\n  endpoints:\n  - weight: 5\n", "7: spec.endpoints[0].address: missing; add it"),
    ];
    for (spec, expected) in cases {
        let found = problems(&with_spec(spec));
        assert!(
            found.iter().any(|problem| problem.contains(expected)),
            "{spec}\nexpected {expected}\nfound {found:#?}"
        );
    }
    let endpoint_cases: &[(&str, &str, &str)] = &[
        ("", "adress: 10.0.0.1", "7: spec.endpoints[0].adress: unknown field `adress`; did you mean `address`?"),
        ("", "address: db.internal", "7: spec.endpoints[0].address: `db.internal` is not an IP address"),
        ("", "address: 10.0.0.1:8080", "the port goes into `meshPort` or `targetPort`"),
        ("", "address: 0.0.0.0", "0.0.0.0 is not the address of a host"),
        ("", "address: 224.0.0.1", "224.0.0.1 is not the address of a host"),
        (
            "",
            "{ address: 10.0.0.1, meshPort: 99999 }",
            "spec.endpoints[0].meshPort: must be a whole number from 1 to 65535",
        ),
        (
            "",
            "{ address: 10.0.0.1, weight: 1000001 }",
            "spec.endpoints[0].weight: must be a whole number from 0 to 1000000",
        ),
        ("", "{ address: 10.0.0.1, weight: -1 }", "found the number -1"),
        ("", "{ address: 10.0.0.1, weight: 1.5 }", "found the number 1.5"),
        (
            "",
            "{ address: 10.0.0.1, transport: plaintext }",
            "7: spec.endpoints[0].transport: plaintext is not allowed for this service; set `spec.allowPlaintext: true`",
        ),
        (
            "  allowPlaintext: true\n",
            "{ address: 10.0.0.1, transport: plaintext, meshPort: 1 }",
            "8: spec.endpoints[0].meshPort: has no meaning with transport plaintext",
        ),
        ("", "{ address: 10.0.0.1, transport: mesh }", "unknown value `mesh`; did you mean `meshd`?"),
        ("", "{ address: 10.0.0.1, zone: \"a b\" }", "spec.endpoints[0].zone: at most 63 of"),
        (
            "",
            "{ address: 10.0.0.1, zone: 1 }",
            "spec.endpoints[0].zone: must be text, found the number 1; put it in quotes",
        ),
        (
            "",
            "{ address: 10.0.0.1, identity: ns/shop/sa/other }",
            "spec.endpoints[0].identity: `ns/shop/sa/other` may not serve payments.shop; use one of `ns/shop/sa/payments`",
        ),
        (
            "",
            "{ address: 10.0.0.1, identity: \"spiffe://evil.org/ns/shop/sa/payments\" }",
            "`spiffe://evil.org/ns/shop/sa/payments` may not serve",
        ),
        (
            two_identities,
            "address: 10.0.0.1",
            "8: spec.endpoints[0].identity: missing; the service has several identities",
        ),
    ];
    for (extra, endpoint, expected) in endpoint_cases {
        let text = with_spec(&format!("  ports: [ {{ port: 80 }} ]\n{extra}  endpoints:\n  - {endpoint}\n"));
        let found = problems(&text);
        assert!(
            found.iter().any(|problem| problem.contains(expected)),
            "{text}\nexpected {expected}\nfound {found:#?}"
        );
    }
}

#[test]
fn raw_addresses_are_those_of_the_programs_and_of_the_service_itself() {
    let service = service(concat!(
        "  ports: [ { port: 80 } ]\n",
        "  addresses: [ 10.96.3.7, \"fd00::3\" ]\n",
        "  endpoints:\n",
        "  - { address: 10.0.0.1, targetPort: 8080 }\n",
        "  - { address: 10.0.0.2, meshPort: 15009 }\n",
    ));
    assert_eq!(service.endpoints[0].dial, "10.0.0.1:15008".parse().unwrap());
    let raw: Vec<String> = service.raw_addresses().map(|(address, port)| format!("{address}={port}")).collect();
    assert_eq!(raw, ["10.96.3.7:80=80", "[fd00::3]:80=80", "10.0.0.1:8080=80", "10.0.0.2:80=80"]);
    let spec = |addresses: &str| with_spec(&format!("  ports: [ {{ port: 80 }} ]\n  addresses: [ {addresses} ]\n"));
    assert!(problems(&spec("payments.internal"))[0].contains("spec.addresses[0]: `payments.internal` is not an IP"));
    assert!(problems(&spec("10.0.0.1, 10.0.0.1"))[0].contains("spec.addresses[1]: 10.0.0.1 is listed twice"));
}

#[test]
fn one_target_port_cannot_serve_several_ports_and_one_place_is_listed_once() {
    let spec = "  ports: [ { port: 80 }, { port: 81 } ]\n  endpoints: [ { address: 10.0.0.1, transport: hbone, targetPort: 8080 } ]\n";
    assert!(problems(&with_spec(spec))[0].contains("the service has 2 ports"));
    let twice =
        "  ports: [ { port: 80 } ]\n  endpoints:\n  - address: 10.0.0.1\n  - { address: 10.0.0.1, weight: 7 }\n";
    assert!(problems(&with_spec(twice))[0].starts_with("8: spec.endpoints[1]: endpoint 10.0.0.1 is listed twice"));
    let other_listener =
        "  ports: [ { port: 80 } ]\n  endpoints:\n  - address: 10.0.0.1\n  - { address: 10.0.0.1, meshPort: 15009 }\n";
    assert_eq!(service(other_listener).endpoints.len(), 2);
}

#[test]
fn the_head_of_a_document_is_checked() {
    let spec = "spec: { ports: [ { port: 80 } ] }\n";
    for (head, expected) in [
        (
            "apiVersion: meshd.dev/v1\nkind: MeshService\nmetadata: { name: a, namespace: b }\n",
            "1: apiVersion: unknown value `meshd.dev/v1`; did you mean `meshd.dev/v1alpha1`?",
        ),
        (
            "apiVersion: meshd.dev/v1alpha1\nkind: Service\nmetadata: { name: a, namespace: b }\n",
            "2: kind: unknown value `Service`; did you mean `MeshService`?",
        ),
        ("kind: MeshService\nmetadata: { name: a, namespace: b }\n", "1: apiVersion: missing"),
        (
            "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: { name: A, namespace: b }\n",
            "3: metadata.name: the name `A` contains `A`",
        ),
        (
            "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: { name: a }\n",
            "3: metadata.namespace: missing",
        ),
        (
            "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: { name: a, namespace: meshd-system }\n",
            "reserved for hosts",
        ),
        (
            "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata:\n  name: a\n  namespace: b\n  label: x\n",
            "6: metadata.label: unknown field",
        ),
    ] {
        let found = problems(&format!("{head}{spec}"));
        assert!(found.iter().any(|problem| problem.contains(expected)), "expected {expected}\nfound {found:#?}");
    }
    assert_eq!(
        problems("just words\n"),
        [
            "1: document: must be a mapping with `apiVersion`, `kind`, `metadata`, `spec`, `status`, found the text `just words`"
        ]
    );
}

#[test]
fn all_mistakes_of_a_document_are_reported_together() {
    let found = problems(&with_spec("  ports:\n  - port: 0\n  endpoints:\n  - address: nowhere\n    weight: x\n"));
    assert_eq!(found.len(), 3, "{found:#?}");
}

#[test]
fn documents_of_a_file_are_read_one_by_one_with_lines_of_the_file() {
    let good = |name: &str| {
        format!(
            "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: {{ name: {name}, namespace: shop }}\nspec: {{ ports: [ {{ port: 80 }} ] }}\n"
        )
    };
    let text = format!(
        "# a comment\n---\n{}---\nbroken: [\n--- # third\n{}---\n# nothing\n---\n{}",
        good("a"),
        good("b").replace("80", "zero"),
        good("c")
    );
    let documents = parse(&text, &trust_domain());
    let names: Vec<_> = documents.iter().map(|document| document.name.as_ref().map(ServiceName::as_str)).collect();
    assert_eq!(names, [Some("a.shop"), None, Some("b.shop"), Some("c.shop")]);
    let good: Vec<bool> = documents.iter().map(|document| document.outcome.is_ok()).collect();
    assert_eq!(good, [true, false, false, true]);
    let syntax = &documents[1].outcome.as_ref().unwrap_err()[0];
    assert!((7..=9).contains(&syntax.line) && syntax.reason.starts_with("not valid YAML: "), "{syntax:?}");
    let value = &documents[2].outcome.as_ref().unwrap_err()[0];
    assert_eq!((value.line, value.field.as_str()), (13, "spec.ports[0].port"));
}

#[test]
fn a_repeated_key_is_refused_at_its_line() {
    let found = problems(&with_spec("  ports: [ { port: 80 } ]\n  ports: [ { port: 81 } ]\n"));
    assert!(found[0].starts_with("6: ") && found[0].contains("duplicate"), "{found:?}");
    assert!(!found[0].contains("DuplicateKeyPolicy"), "{found:?}");
}

#[test]
fn empty_files_and_comments_hold_no_documents() {
    for text in ["", "\n\n", "# only a comment\n", "---\n", "---\n---\n# x\n...\n"] {
        assert_eq!(parse(text, &trust_domain()).len(), 0, "{text:?}");
    }
}

#[test]
fn a_marker_inside_a_block_scalar_is_text_only_when_indented() {
    let documents = parse("a: |\n  ---\n  text\n", &trust_domain());
    assert_eq!(documents.len(), 1);
}

#[test]
fn an_alias_bomb_is_refused_quickly() {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let items = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{items}]\n"));
    }
    assert!(problems(&text)[0].contains("not valid YAML"));
}

proptest::proptest! {
    #[test]
    fn nonsense_is_an_error_and_never_a_panic(text in "[-a-z0-9:{}\\[\\]\"'|>&*!%@,# \n\t]{0,200}") {
        for document in parse(&text, &trust_domain()) {
            proptest::prop_assert!(document.outcome.is_err());
        }
    }
}

#[test]
fn the_examples_of_the_reference_are_valid() {
    let reference = include_str!("../../docs/resources.md");
    let blocks = reference.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let examples: Vec<&str> = blocks.filter(|block| block.contains("meshd.dev/v1alpha1")).collect();
    assert_eq!(examples.len(), 2);
    for example in examples {
        assert_eq!(problems(example), [""; 0], "{example}");
        assert_eq!(parse(example, &trust_domain()).len(), 1);
    }
}
