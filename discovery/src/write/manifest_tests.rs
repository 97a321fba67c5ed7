use super::*;
use crate::fake::trust_domain;

const PAYMENTS: &str = "\
apiVersion: meshd.dev/v1alpha1
kind: MeshService
metadata:
  name: payments   # what customers pay with
  namespace: shop
  resourceVersion: \"17\"
spec:
  ports: [ { port: 80 } ]
";

fn all(text: &str) -> Result<Vec<Manifest>, Vec<String>> {
    read("x.yaml", text, &trust_domain())
}

fn one(text: &str) -> Manifest {
    all(text).unwrap().pop().unwrap()
}

#[test]
fn what_get_showed_is_taken_with_its_version_and_everything_people_wrote_stays() {
    let manifest = one(&format!("# meshd apply: root@web\n# meshd get: etcd\n{PAYMENTS}"));
    assert_eq!(manifest.based_on.as_deref(), Some("17"));
    assert_eq!(manifest.resource.to_string(), "meshservice/payments.shop");
    let signed = manifest.signed(&By::new("root@api\n2026"));
    assert!(signed.starts_with("# meshd apply: root@api\\n2026\napiVersion: "), "{signed}");
    assert!(signed.contains("# what customers pay with\n  namespace: shop\nspec:"), "{signed}");
    let (by, document) = understand(&signed);
    assert_eq!((by.as_deref(), document), (Some("root@api\\\\n2026"), Ok(manifest.document)));
}

#[test]
fn a_version_that_shares_its_line_is_taken_out_as_well() {
    let text = PAYMENTS.replace(
        "metadata:\n  name: payments   # what customers pay with\n  namespace: shop\n  resourceVersion: \"17\"\n",
        "metadata: { name: payments, namespace: shop, resourceVersion: 17 }\n",
    );
    let manifest = one(&text);
    assert_eq!(manifest.based_on.as_deref(), Some("17"));
    assert_eq!(manifest.document, one(PAYMENTS).document);
    assert!(!manifest.signed(&By::new("x")).contains("resourceVersion"));
}

#[test]
fn everything_wrong_is_told_with_its_line_and_nothing_is_taken() {
    let bad = PAYMENTS.replace("port: 80", "prot: 80");
    let problems = all(&format!("---\n{PAYMENTS}---\n{bad}---\nkind: [\n")).unwrap_err();
    assert!(problems.iter().any(|one| one.starts_with("x.yaml:18: spec.ports[0].prot: unknown field")), "{problems:?}");
    assert!(problems.iter().any(|one| one.contains("not valid YAML")), "{problems:?}");
    for (text, expected) in [
        (format!("{PAYMENTS}---\n{PAYMENTS}"), "meshservice/payments.shop is also at x.yaml:1"),
        (PAYMENTS.replace("MeshService", "MeshSrvice"), "did you mean `MeshService`?"),
        (PAYMENTS.replace("v1alpha1", "v1"), "`meshd.dev/v1alpha1`"),
        ("# nothing\n".to_owned(), "x.yaml: there is no document in it"),
        ("- a\n".to_owned(), "must be a mapping"),
    ] {
        let problems = all(&text).unwrap_err();
        assert!(problems.iter().any(|one| one.contains(expected)), "{problems:?}");
    }
}

#[test]
fn yaml_says_what_json_said() {
    let odd = json!({
        "a": ["80", "true", "no", "null", "2001:db8::7", "a: b", "# x", "", " x ", "1e3", "0x1f", "x\ny", "é"],
        "b": { "c": 80, "d": true, "e": 1.5, "f": {}, "g": [], "h": null }, "*": "*",
    });
    assert_eq!(parse(&yaml(&odd)), Ok(without_null(odd)));
}

/// An empty value counts as absent.
fn without_null(mut value: Value) -> Value {
    value["b"].as_object_mut().unwrap().remove("h");
    value
}

const POLICY: &str = "\
apiVersion: meshd.dev/v1alpha1
kind: ServicePolicy
metadata: { name: payments, namespace: shop }
spec: { targetRef: { group: meshd.dev, kind: MeshService, name: payments }, timeouts: { connect: 1s } }
";

#[test]
fn every_kind_is_taken_alone_or_in_a_list_as_kubectl_writes_it() {
    assert_eq!(one(POLICY).resource.to_string(), "servicepolicy/payments.shop");
    let items: Vec<Value> = [PAYMENTS, POLICY].iter().map(|text| parse(text).unwrap()).collect();
    let mut list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
    let found = all(&list.to_string()).unwrap();
    assert_eq!(found.iter().map(|one| one.resource.kind).collect::<Vec<_>>(), [Kind::MeshService, Kind::ServicePolicy]);
    assert_eq!(found[0].based_on.as_deref(), Some("17"));
    assert_eq!(documents(&list.to_string()).len(), 2);
    list["items"][1]["spec"]["timeout"] = "1s".into();
    let problems = all(&list.to_string()).unwrap_err();
    assert!(problems[0].starts_with("x.yaml:1: items[1].spec.timeout: unknown field"), "{problems:?}");
}
