//! How `meshd get` shows documents.

use std::fmt::Write;

use meshd_discovery::write::{NOTED, Stored, versioned, yaml};
use serde_json::{Value, json};

use super::{Found, Shown};

pub(super) fn show(found: &[Found], output: Shown) -> anyhow::Result<String> {
    Ok(match output {
        Shown::Table => table(found),
        Shown::Yaml => found.iter().map(document).collect::<Vec<_>>().join("---\n"),
        Shown::Json => serde_json::to_string_pretty(&found.iter().map(row).collect::<Vec<_>>())? + "\n",
    })
}

/// What `apply` takes, with its origin as a comment.
fn document(found: &Found) -> String {
    let Found { source, stored } = found;
    let by = stored.by.as_ref().map_or(String::new(), |by| format!(", by {by}"));
    let head = format!("{NOTED}{source}: {}{by}\n", stored.origin);
    match &stored.document {
        Ok(document) => head + &yaml(&versioned(document, &stored.version)),
        Err(reason) => format!("{head}# it cannot be read: {reason}\n"),
    }
}

fn row(found: &Found) -> Value {
    let Found { source, stored } = found;
    let Stored { resource, origin, version, by, document } = stored;
    json!({
        "kind": resource.kind.name(), "namespace": resource.namespace, "name": resource.name, "source": source,
        "origin": origin, "version": version, "by": by, "problem": document.as_ref().err(),
        "document": document.as_ref().ok().map(|document| versioned(document, version)),
    })
}

fn table(found: &[Found]) -> String {
    if found.is_empty() {
        return "there is none\n".to_owned();
    }
    let rows = found.iter().map(|Found { source, stored }| {
        let what = stored.document.as_ref().map_or_else(|reason| format!("cannot be read: {reason}"), summary);
        let by = stored.by.clone().unwrap_or_else(|| "-".to_owned());
        [stored.resource.namespace.clone(), stored.resource.name.clone(), what, source.clone(), by]
    });
    let head = ["NAMESPACE", "NAME", "WHAT", "SOURCE", "CHANGED BY"].map(str::to_owned);
    let rows: Vec<[String; 5]> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    rows.iter().fold(String::new(), |mut text, row| {
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a String does not fail.
            write!(text, "{cell:<width$}  ").unwrap_or_default();
        }
        text + &row[4] + "\n"
    })
}

/// A document in a few words: where a service is, or what a route or policy is about.
fn summary(document: &Value) -> String {
    let spec = &document["spec"];
    let list = |name: &str| spec[name].as_array().map(Vec::as_slice).unwrap_or_default();
    let parents = list("parentRefs").iter().chain(spec.get("targetRef"));
    let about = parents.map(|of| of["name"].as_str().unwrap_or("everybody")).collect::<Vec<_>>().join(",");
    if !about.is_empty() {
        let rules = counted(list("rules").len(), "rule");
        return if rules.is_empty() { format!("for {about}") } else { format!("{rules} for {about}") };
    }
    let ports = list("ports").iter().map(|port| match port["protocol"].as_str() {
        Some(protocol) => format!("{}/{protocol}", port["port"]),
        None => port["port"].to_string(),
    });
    let ports = ports.collect::<Vec<_>>().join(",");
    let endpoints = counted(list("endpoints").len(), "endpoint");
    if endpoints.is_empty() { ports } else { format!("{ports} at {endpoints}") }
}

fn counted(number: usize, what: &str) -> String {
    match number {
        0 => String::new(),
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    }
}

#[cfg(test)]
mod tests {
    use meshd_discovery::write::{Kind, ResourceName};

    use super::*;

    fn found(document: Result<Value, String>) -> Found {
        let resource = ResourceName::new(Kind::MeshService, "payments.shop", None).unwrap();
        let stored =
            Stored { resource, origin: "a.yaml:1".into(), version: "7".into(), by: Some("root@web".into()), document };
        Found { source: "files".to_owned(), stored }
    }

    #[test]
    fn a_route_is_told_by_what_it_is_for() {
        let parents = json!([{ "name": "payments" }, { "name": "ledger" }]);
        assert_eq!(summary(&json!({ "spec": { "parentRefs": parents, "rules": [{}] } })), "1 rule for payments,ledger");
        assert_eq!(summary(&json!({ "spec": { "targetRef": { "kind": "TrustDomain" } } })), "for everybody");
    }

    #[test]
    fn a_document_is_shown_in_a_line_and_in_full_with_its_version() {
        let document = json!({
            "apiVersion": "meshd.dev/v1alpha1", "kind": "MeshService",
            "metadata": { "name": "payments", "namespace": "shop" },
            "spec": { "ports": [{ "port": 80, "protocol": "http" }, { "port": 81 }], "endpoints": [{}] },
        });
        let all = [found(Ok(document)), found(Err("line 1: x".to_owned()))];
        let table = show(&all, Shown::Table).unwrap();
        assert!(table.starts_with("NAMESPACE  NAME      WHAT"), "{table}");
        assert!(table.contains("shop       payments  80/http,81 at 1 endpoint"), "{table}");
        assert!(table.contains("cannot be read: line 1: x"), "{table}");
        let text = show(&all, Shown::Yaml).unwrap();
        assert!(text.starts_with("# meshd get: files: a.yaml:1, by root@web\napiVersion: "), "{text}");
        assert!(
            text.contains("resourceVersion: \"7\"") && text.contains("\n---\n# meshd get: files: a.yaml:1"),
            "{text}"
        );
        let rows: Value = serde_json::from_str(&show(&all, Shown::Json).unwrap()).unwrap();
        assert_eq!(rows[0]["document"]["metadata"]["resourceVersion"], "7");
        assert_eq!((rows[1]["problem"].as_str(), &rows[1]["document"]), (Some("line 1: x"), &Value::Null));
    }
}
