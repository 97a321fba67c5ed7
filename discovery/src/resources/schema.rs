//! The shapes as JSON Schema, and as definitions for Kubernetes.

use serde_json::{Map, Value as Json, json};

use super::Kind;
use super::forms::Form;
use super::read::shape;
use super::shape::{Cel, Need, Object, Rule, Shape, Unique};

const DRAFT: &str = "https://json-schema.org/draft/2020-12/schema";
/// Those that are ours to publish.
pub const PUBLISHED: [Kind; 3] = [Kind::MeshService, Kind::ServicePolicy, Kind::AuthorizationPolicy];

/// JSON Schema of a kind of ours, for editors.
pub fn json_schema(kind: Kind) -> Json {
    let mut schema = object(&shape(kind), Dialect::JsonSchema);
    let version = format!("{}/{}", kind.group(), kind.versions()[0]);
    schema["properties"]["apiVersion"] = json!({ "const": version });
    schema["properties"]["kind"] = json!({ "const": kind.name() });
    schema["$schema"] = DRAFT.into();
    schema["title"] = kind.name().into();
    schema
}

/// The CustomResourceDefinitions of our kinds.
pub fn crds() -> Vec<Json> {
    PUBLISHED.into_iter().map(crd).collect()
}

fn crd(kind: Kind) -> Json {
    let shape = shape(kind);
    let spec = shape.members.iter().find(|member| member.name == "spec").map(|member| &member.shape);
    let (group, plural, name) = (kind.group(), kind.plural(), kind.name());
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.{group}") },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": { "kind": name, "listKind": format!("{name}List"), "plural": plural, "singular": kind.lower(),
                "shortNames": short_names(kind) },
            "versions": [{
                "name": kind.versions()[0],
                "served": true,
                "storage": true,
                "subresources": { "status": {} },
                "schema": { "openAPIV3Schema": {
                    "type": "object",
                    "required": ["spec"],
                    "properties": {
                        "spec": spec.map(|spec| of(spec, Dialect::Kubernetes)),
                        "status": { "type": "object", "x-kubernetes-preserve-unknown-fields": true },
                    },
                } },
            }],
        },
    })
}

/// For `kubectl get`.
fn short_names(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::MeshService => &["msvc"],
        Kind::ServicePolicy => &["svcpol"],
        Kind::AuthorizationPolicy => &["ap"],
        _ => &[],
    }
}

/// Kubernetes prunes or refuses what is not known by itself, and takes no `additionalProperties: false` beside `properties`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dialect {
    JsonSchema,
    Kubernetes,
}

fn of(shape: &Shape, dialect: Dialect) -> Json {
    match shape {
        Shape::Object(members) => object(members, dialect),
        Shape::Texts => json!({ "type": "object", "additionalProperties": { "type": "string" } }),
        Shape::List { of: item, least, most, unique } => {
            let mut list = json!({ "type": "array", "items": of(item, dialect), "maxItems": most });
            if *least > 0 {
                list["minItems"] = (*least).into();
            }
            match (unique, dialect) {
                (Some(Unique::Elements), Dialect::JsonSchema) => list["uniqueItems"] = true.into(),
                (Some(Unique::Elements), Dialect::Kubernetes) => list["x-kubernetes-list-type"] = "set".into(),
                (Some(Unique::By(name)), Dialect::Kubernetes) => {
                    list["x-kubernetes-list-type"] = "map".into();
                    list["x-kubernetes-list-map-keys"] = json!([name]);
                }
                // Said in words by the parser.
                (Some(Unique::By(_)), Dialect::JsonSchema) | (None, _) => {}
            }
            list
        }
        Shape::Text(form) => text(form, dialect),
        Shape::Choice { words, .. } => json!({ "type": "string", "enum": words }),
        Shape::Integer { least, most } => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Shape::Boolean => json!({ "type": "boolean" }),
        Shape::Anything if dialect == Dialect::Kubernetes => json!({ "x-kubernetes-preserve-unknown-fields": true }),
        Shape::Anything => json!({}),
    }
}

fn text(form: &Form, dialect: Dialect) -> Json {
    let mut text = json!({ "type": "string", "maxLength": form.most });
    if form.least > 0 {
        text["minLength"] = form.least.into();
    }
    if !form.pattern.is_empty() {
        text["pattern"] = form.pattern.into();
    }
    add_cel(&mut text, form.cel.as_slice(), dialect);
    text
}

fn add_cel(schema: &mut Json, rules: &[Cel], dialect: Dialect) {
    if dialect == Dialect::Kubernetes && !rules.is_empty() {
        let rule = |Cel { rule, message }: &Cel| json!({ "rule": rule, "message": message });
        schema["x-kubernetes-validations"] = rules.iter().map(rule).collect();
    }
}

fn object(shape: &Object, dialect: Dialect) -> Json {
    let offered = || shape.members.iter().filter(|member| !matches!(member.need, Need::Refused(_)));
    let mut properties = Map::new();
    for member in offered() {
        let mut schema = of(&member.shape, dialect);
        schema["description"] = member.about.into();
        properties.insert(member.name.to_owned(), schema);
    }
    let required: Vec<&str> =
        offered().filter(|member| matches!(member.need, Need::Required(_))).map(|member| member.name).collect();
    let mut object = json!({ "type": "object", "properties": properties });
    if dialect == Dialect::JsonSchema {
        object["additionalProperties"] = false.into();
    }
    if !required.is_empty() {
        object["required"] = required.into();
    }
    let needs = |name: &&str| json!({ "required": [name] });
    for rule in &shape.rules {
        match rule {
            Rule::AtLeastOne(names) => object["anyOf"] = names.iter().map(needs).collect(),
            Rule::NotBoth(one, other) => object["not"] = json!({ "required": [one, other] }),
            // Said in words by the parser; no kind that is published has one.
            Rule::Tagged(..) => {}
        }
    }
    add_cel(&mut object, &shape.cel, dialect);
    object
}

#[cfg(test)]
#[path = "schema_tests.rs"]
mod tests;
