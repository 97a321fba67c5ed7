//! What is published is made of the shapes, and says the same as the parser. Written anew by `cargo xtask schema`.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::fake::trust_domain;
use crate::resources::read_json;

/// Set by `cargo xtask schema`.
const WRITE: &str = "MESHD_WRITE_SCHEMA";

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// JSON is YAML, but nobody wants to read a definition that way.
fn yaml(value: &Json, indent: usize, out: &mut String) {
    let pad = "  ".repeat(indent);
    match value {
        Json::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                *out += &format!("\n{pad}{key}:");
                yaml(value, indent + 1, out);
            }
        }
        Json::Array(items) if items.iter().any(Json::is_object) => {
            for item in items {
                let mut text = String::new();
                yaml(item, indent + 1, &mut text);
                *out +=
                    &format!("\n{pad}-{}", text.trim_start_matches('\n').replacen(&"  ".repeat(indent + 1), " ", 1));
            }
        }
        Json::String(text) if is_plain(text) => *out += &format!(" {text}"),
        other => *out += &format!(" {other}"),
    }
}

/// Means the same without quotation marks.
fn is_plain(text: &str) -> bool {
    let words = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    let plain = |c: char| c.is_ascii_alphanumeric() || "./-".contains(c);
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(plain) && !words.contains(&text)
}

fn definitions() -> String {
    let begun =
        "# The kinds of meshd.dev, for clusters that hold them. Made by `cargo xtask schema`; not to be edited.\n";
    let documents = crds().into_iter().map(|definition| {
        let mut document = String::new();
        yaml(&definition, 0, &mut document);
        document.trim_start().to_owned() + "\n"
    });
    begun.to_owned() + &documents.collect::<Vec<_>>().join("---\n")
}

fn published() -> Vec<(PathBuf, String)> {
    let schema = |kind: Kind| {
        let text = serde_json::to_string_pretty(&json_schema(kind)).unwrap() + "\n";
        (deploy().join(format!("schema/{}.json", kind.lower())), text)
    };
    let definitions = (deploy().join("kubernetes/crds.yaml"), definitions());
    PUBLISHED.into_iter().map(schema).chain([definitions]).collect()
}

#[test]
fn what_is_published_is_made_of_the_shapes() {
    for (path, text) in published() {
        if std::env::var_os(WRITE).is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == text, "{} is not what the shapes say; run `cargo xtask schema`", path.display());
    }
}

#[test]
fn the_definitions_are_yaml_that_says_what_they_are() {
    let text = definitions();
    let chunks = crate::documents::split(&text);
    let parsed: Vec<Json> =
        chunks.iter().map(|(line, chunk)| crate::yaml::parse(chunk, *line).ok().unwrap().to_json()).collect();
    assert_eq!(parsed, crds());
}

/// Whether the parser takes a document, and whether the schema does.
fn taken(document: &Json) -> (bool, bool) {
    let kind = Kind::ALL.into_iter().find(|kind| document["kind"] == kind.name()).unwrap();
    let schema = jsonschema::validator_for(&json_schema(kind)).unwrap();
    (read_json(document, &trust_domain()).outcome.is_ok(), schema.is_valid(document))
}

fn document(kind: Kind, spec: Json) -> Json {
    json!({
        "apiVersion": "meshd.dev/v1alpha1", "kind": kind.name(),
        "metadata": { "name": "payments", "namespace": "shop" }, "spec": spec,
    })
}

#[test]
fn every_example_of_ours_is_good_to_the_parser_and_the_schema() {
    let examples = [
        include_str!("../../../deploy/examples/mesh-service.yaml"),
        include_str!("../../../deploy/examples/service-policy.yaml"),
        include_str!("../../../deploy/examples/authorization-policy.yaml"),
    ];
    for (line, chunk) in examples.into_iter().flat_map(crate::documents::split) {
        let json = crate::yaml::parse(chunk, line).ok().unwrap().to_json();
        assert_eq!(taken(&json), (true, true), "{json}");
    }
}

#[test]
fn the_parser_and_the_schema_agree() {
    let target = json!({ "kind": "Service", "name": "payments" });
    let policy = |more: Json| {
        let mut spec = json!({ "targetRef": target });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        document(Kind::ServicePolicy, spec)
    };
    let rule = |rule: Json| document(Kind::AuthorizationPolicy, json!({ "targetRef": target, "rules": [rule] }));
    let service = |spec: Json| document(Kind::MeshService, spec);
    let good = [
        policy(json!({})),
        policy(json!({ "retryBudget": { "percent": 0 }, "timeouts": { "idle": "0s" } })),
        policy(json!({ "limits": { "maxRequests": 1 } })),
        rule(json!({})),
        rule(json!({ "from": [{ "identities": ["ns/shop/sa/web.v2", "spiffe://a.example/ns/Shop/sa/web_2"] }] })),
        service(json!({ "ports": [{ "port": 80 }], "identities": ["ns/shop/sa/web.v2"] })),
        rule(json!({ "from": [{ "identities": ["*"] }], "to": [{ "ports": [80], "paths": ["/a/*", "/b"] }] })),
        service(json!({ "ports": [{ "port": 80, "protocol": "grpc" }] })),
        service(json!({ "ports": [{ "port": 1 }], "endpoints": [{ "address": "2001:db8::1", "weight": 0 }] })),
    ];
    for document in good {
        assert_eq!(taken(&document), (true, true), "{document}");
    }
    let bad = [
        policy(json!({ "retryBudgets": {} })),
        policy(json!({ "retryBudget": { "percent": 1001 } })),
        policy(json!({ "retryBudget": { "percent": "20" } })),
        policy(json!({ "retryBudget": { "window": "1.5s" } })),
        policy(json!({ "balancing": { "algorithm": "random" } })),
        policy(json!({ "timeouts": {} })),
        policy(json!({ "rateLimits": [] })),
        policy(json!({ "rateLimits": [{ "per": "client" }] })),
        policy(json!({ "retries": { "statuses": [200] } })),
        document(Kind::ServicePolicy, json!({})),
        document(Kind::ServicePolicy, json!({ "targetRef": { "kind": "Gateway", "name": "x" } })),
        rule(json!({ "from": [{}] })),
        rule(json!({ "from": [{ "identities": ["web"] }] })),
        rule(json!({ "from": [{ "networks": ["host.example"] }] })),
        rule(json!({ "to": [{ "methods": ["get"] }] })),
        rule(json!({ "to": [{ "paths": ["a"] }] })),
        rule(json!({ "to": [{ "ports": [0] }] })),
        service(json!({ "ports": [] })),
        service(json!({ "ports": [{ "port": 80 }], "identities": ["*"] })),
        service(json!({ "ports": (1..=1025).map(|port| json!({ "port": port })).collect::<Vec<_>>() })),
        service(json!({ "ports": [{ "port": 70000 }] })),
        service(json!({ "ports": [{ "port": 80 }], "allowPlaintext": "yes" })),
        service(json!({ "ports": [{ "port": 80 }], "endpoints": [{ "weight": 1 }] })),
        service(json!({ "ports": [{ "port": 80 }], "unknown": 1 })),
    ];
    for document in bad {
        assert_eq!(taken(&document), (false, false), "{document}");
    }
}

/// What a real API server refuses by our rules, too.
#[test]
fn what_contradicts_itself_is_refused_by_the_parser_as_well() {
    let text = include_str!("../../../tests/kubernetes/contradictions.yaml");
    let documents = crate::resources::read(text, &trust_domain());
    assert!(documents.len() > 20);
    for document in documents {
        assert!(document.outcome.is_err(), "line {} is taken", document.line);
    }
}
