//! Our definitions, as a real Kubernetes API takes them.

use anyhow::{Context, Result, ensure};
use meshd_tests::kubernetes::Cluster;
use meshd_tests::lab::Lab;
use serde_json::{Value, json};

use crate::resources::{AUTHORIZATION, POLICIES, authorization, define, policy};

/// Each begins with what the server says of it.
const CONTRADICTIONS: &str = include_str!("contradictions.yaml");
const EXAMPLES: [&str; 3] = [
    include_str!("../../deploy/examples/mesh-service.yaml"),
    include_str!("../../deploy/examples/service-policy.yaml"),
    include_str!("../../deploy/examples/authorization-policy.yaml"),
];
const DEFINITIONS: [&str; 3] = ["meshservices", "servicepolicies", "authorizationpolicies"];

/// A cluster that knows our kinds, and the host it runs on.
fn taught() -> Result<(Lab, Cluster)> {
    let lab = Lab::new(&["store"])?;
    let cluster = Cluster::start(&lab.host("store"))?;
    for namespace in ["shop", "meshd-system"] {
        cluster.create("/api/v1/namespaces", &json!({ "metadata": { "name": namespace } }))?;
    }
    define(&cluster)?;
    Ok((lab, cluster))
}

fn definition(cluster: &Cluster, plural: &str) -> Result<Value> {
    let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.meshd.dev");
    Ok(serde_json::from_str(&cluster.get(&path)?)?)
}

#[test]
fn a_real_api_server_takes_our_definitions_and_refuses_what_they_do_not_allow() -> Result<()> {
    let (_lab, cluster) = taught()?;
    for plural in DEFINITIONS {
        let definition = definition(&cluster, plural)?;
        let conditions = definition["status"]["conditions"].as_array().context("no conditions")?;
        ensure!(!conditions.iter().any(|condition| condition["type"] == "NonStructuralSchema"), "{conditions:#?}");
    }
    for document in EXAMPLES.into_iter().flat_map(|text| text.split("\n---\n")) {
        create(&cluster, document)?;
    }
    let other = json!({ "name": "other", "namespace": "shop" });
    let mut policy = policy();
    policy["metadata"] = other;
    cluster.create(POLICIES, &policy)?;
    cluster.create(AUTHORIZATION, &authorization("web"))?;
    for (path, spec, expected) in [
        (
            POLICIES,
            json!({ "targetRef": { "kind": "Service", "name": "x" }, "retryBudget": { "percent": 1001 } }),
            "1000",
        ),
        (POLICIES, json!({ "targetRef": { "kind": "Service", "name": "x" }, "timeouts": {} }), "timeouts"),
        (POLICIES, json!({ "targetRef": { "kind": "Gateway", "name": "x" } }), "Unsupported value"),
        (AUTHORIZATION, json!({ "rules": [] }), "targetRef"),
        (
            AUTHORIZATION,
            json!({ "targetRef": { "kind": "Namespace" }, "rules": [{ "from": [{ "identities": ["web"] }] }] }),
            "identities",
        ),
    ] {
        let kind = if path == POLICIES { "ServicePolicy" } else { "AuthorizationPolicy" };
        let document = json!({
            "apiVersion": "meshd.dev/v1alpha1", "kind": kind, "metadata": { "name": "bad" }, "spec": spec,
        });
        let refused = cluster.create(path, &document).err().context(format!("taken: {document}"))?;
        ensure!(format!("{refused:#}").contains(expected), "{expected}: {refused:#}");
    }
    Ok(())
}

#[test]
fn a_real_api_server_refuses_what_contradicts_itself_by_each_of_our_rules() -> Result<()> {
    let (_lab, cluster) = taught()?;
    let mut told = String::new();
    for document in CONTRADICTIONS.split("\n---\n") {
        let expected = document.lines().next().and_then(|line| line.strip_prefix("# ")).context("a reason")?;
        let refused = create(&cluster, document).err().with_context(|| format!("taken:\n{document}"))?;
        let refused = format!("{refused:#}");
        ensure!(refused.contains(expected), "no `{expected}` in: {refused}");
        told += &refused;
    }
    for plural in DEFINITIONS {
        let mut messages = Vec::new();
        rules(&definition(&cluster, plural)?, &mut messages);
        ensure!(!messages.is_empty(), "{plural} has no rules");
        for message in messages {
            ensure!(told.contains(&message), "no document is refused by: {message}");
        }
    }
    Ok(())
}

/// What all rules of a schema say.
fn rules(schema: &Value, messages: &mut Vec<String>) {
    match schema {
        Value::Array(items) => items.iter().for_each(|item| rules(item, messages)),
        Value::Object(members) => {
            let own = members.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten();
            messages.extend(own.filter_map(|rule| rule["message"].as_str().map(str::to_owned)));
            members.values().for_each(|member| rules(member, messages));
        }
        _ => {}
    }
}

/// Creates a document of ours.
fn create(cluster: &Cluster, document: &str) -> Result<()> {
    let plural = match document.lines().find_map(|line| line.strip_prefix("kind: ")) {
        Some("MeshService") => DEFINITIONS[0],
        Some("ServicePolicy") => DEFINITIONS[1],
        Some("AuthorizationPolicy") => DEFINITIONS[2],
        other => anyhow::bail!("{other:?} is not ours:\n{document}"),
    };
    let namespace = document.split_once("namespace: ").context("no namespace")?.1;
    let namespace = namespace.split([' ', '\n']).next().context("no namespace")?;
    cluster.create_yaml(&format!("/apis/meshd.dev/v1alpha1/namespaces/{namespace}/{plural}"), document)
}
