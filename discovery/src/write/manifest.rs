//! Documents as operators hand them over: each with its name, checked as hosts check it.

use meshd_identity::TrustDomain;
use serde_json::{Value, json};

use super::{By, Kind, ResourceName};
use crate::yaml::Problem;
use crate::{documents, resources, stored};

/// The first line of what `meshd apply` wrote where a backend keeps text.
const SIGNED: &str = "# meshd apply: ";
/// What `meshd get` adds for the reader.
pub const NOTED: &str = "# meshd get: ";

/// A document that hosts would take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub resource: ResourceName,
    /// `payments.yaml:3`
    pub origin: String,
    /// `metadata.resourceVersion`: which version it was made of.
    pub based_on: Option<String>,
    pub document: Value,
    /// As it was written, comments included, without the version.
    text: String,
}

impl Manifest {
    /// What is stored where a backend keeps text.
    pub(crate) fn signed(&self, by: &By) -> String {
        format!("{SIGNED}{by}\n{}", self.text)
    }
}

/// All documents of a text, or everything that is wrong with any of them: `origin:line: field: reason`.
pub fn read(origin: &str, text: &str, trust_domain: &TrustDomain) -> Result<Vec<Manifest>, Vec<String>> {
    let (mut manifests, mut problems): (Vec<Manifest>, Vec<String>) = (Vec::new(), Vec::new());
    for (line, chunk) in documents::split(text) {
        match read_chunk(origin, line, chunk, trust_domain) {
            Ok(found) => manifests.extend(found),
            Err(found) => problems.extend(found),
        }
    }
    for (n, manifest) in manifests.iter().enumerate() {
        if let Some(first) = manifests[..n].iter().find(|earlier| earlier.resource == manifest.resource) {
            let Manifest { origin, resource, .. } = manifest;
            problems.push(format!("{origin}: {resource} is also at {}; remove one of them", first.origin));
        }
    }
    if manifests.is_empty() && problems.is_empty() {
        problems.push(format!("{origin}: there is no document in it"));
    }
    if problems.is_empty() { Ok(manifests) } else { Err(problems) }
}

/// One document, or those of a List, which is how kubectl writes several.
fn read_chunk(origin: &str, line: u64, chunk: &str, trust_domain: &TrustDomain) -> Result<Vec<Manifest>, Vec<String>> {
    match parse(chunk).as_ref().map(items) {
        Ok(Some(items)) => {
            let read = |item: &Value| read_one(origin, line, &yaml(item), trust_domain);
            let (mut manifests, mut problems) = (Vec::new(), Vec::new());
            for (n, read) in items.iter().map(read).enumerate() {
                match read {
                    Ok(manifest) => manifests.push(manifest),
                    // Their lines are not those of the file.
                    Err(found) => {
                        problems.extend(found.into_iter().map(|one| told(origin, Problem { line, ..one }, n)));
                    }
                }
            }
            if problems.is_empty() { Ok(manifests) } else { Err(problems) }
        }
        _ => {
            let one = read_one(origin, line, chunk, trust_domain).map(|manifest| vec![manifest]);
            one.map_err(|problems| problems.into_iter().map(|problem| shown(origin, &problem)).collect())
        }
    }
}

fn shown(origin: &str, problem: &Problem) -> String {
    let field = if problem.field.is_empty() { String::new() } else { format!("{}: ", problem.field) };
    format!("{origin}:{}: {field}{}", problem.line, problem.reason)
}

fn told(origin: &str, problem: Problem, item: usize) -> String {
    shown(origin, &Problem { field: format!("items[{item}].{}", problem.field), ..problem })
}

fn items(document: &Value) -> Option<&Vec<Value>> {
    document.get("items").and_then(Value::as_array).filter(|_| field(document, "kind") == "List")
}

fn read_one(origin: &str, line: u64, text: &str, trust_domain: &TrustDomain) -> Result<Manifest, Vec<Problem>> {
    let wrong = |reason: String| vec![Problem { line, field: "document".to_owned(), reason }];
    let (bare, based_on) = without_version(text);
    let found = resources::read_one(&bare, line, trust_domain);
    found.outcome?;
    let id = found.id.ok_or_else(|| wrong("has no name; write metadata: { name: ..., namespace: ... }".to_owned()))?;
    let (resource, text) = (ResourceName::from(&id), plain(&bare));
    let most = if id.kind == Kind::MeshService { stored::MOST_BYTES } else { resources::MOST_BYTES };
    if text.len() > most {
        return Err(wrong(format!("{resource} has {} bytes and {most} are allowed", text.len())));
    }
    let document = value(&bare).map_err(wrong)?;
    Ok(Manifest { resource, origin: format!("{origin}:{}", found.line), based_on, document, text })
}

/// Without the marker of a document's begin, and what meshd added earlier.
fn plain(chunk: &str) -> String {
    let added = |line: &&str| ["---", SIGNED, NOTED].iter().any(|start| line.starts_with(start));
    let kept = chunk.lines().filter(|line| !added(line));
    let text = kept.collect::<Vec<_>>().join("\n");
    text.trim_matches('\n').to_owned() + "\n"
}

/// What `get` adds, taken out; the line it stands on stays for now, so that problems are told with those of the file.
fn without_version(chunk: &str) -> (String, Option<String>) {
    let unversioned = || (chunk.to_owned(), None);
    let Ok(mut document) = parse(chunk) else { return unversioned() };
    let removed = document.get_mut("metadata").and_then(Value::as_object_mut);
    let Some(version) = removed.and_then(|metadata| metadata.remove("resourceVersion")) else { return unversioned() };
    let version = version.as_str().map_or(version.to_string(), str::to_owned);
    let is_it = |line: &&str| line.trim_start().starts_with("resourceVersion:");
    let lines = chunk.lines().map(|line| if is_it(&line) { NOTED } else { line });
    let blanked = lines.collect::<Vec<_>>().join("\n") + "\n";
    let text = if parse(&blanked).as_ref() == Ok(&document) { blanked } else { yaml(&document) };
    (text, Some(version))
}

/// Of a document a backend has: who wrote it, and what it says.
pub(crate) fn understand(text: &str) -> (Option<String>, Result<Value, String>) {
    (signer(text), value(text))
}

pub(super) fn signer(text: &str) -> Option<String> {
    text.lines().next().and_then(|line| line.strip_prefix(SIGNED)).map(crate::yaml::printable)
}

/// All that one part of a file holds.
pub(super) fn documents(chunk: &str) -> Vec<Result<Value, String>> {
    let document = value(chunk);
    match document.as_ref().ok().and_then(items) {
        Some(items) => items.iter().cloned().map(Ok).collect(),
        None => vec![document],
    }
}

/// The document in a text, if it names what it is.
pub(super) fn value(text: &str) -> Result<Value, String> {
    let document = parse(text)?;
    if document.is_object() { Ok(document) } else { Err("is no document".to_owned()) }
}

fn parse(text: &str) -> Result<Value, String> {
    let node = crate::yaml::parse(text, 1).map_err(|problem| format!("line {}: {}", problem.line, problem.reason))?;
    Ok(node.to_json())
}

/// The name of a document, whether it is right or not.
pub(super) fn name_of(document: &Value) -> Option<ResourceName> {
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == field(document, "kind"))?;
    let metadata = document.get("metadata")?;
    ResourceName::new(kind, field(metadata, "name"), Some(field(metadata, "namespace"))).ok()
}

fn field<'v>(document: &'v Value, name: &str) -> &'v str {
    document.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The same document, saying which version it is, for whoever changes it and applies it again.
pub fn versioned(document: &Value, version: &str) -> Value {
    let mut document = document.clone();
    if let Some(metadata) = document.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".to_owned(), json!(version));
    }
    document
}

/// As YAML, ending in a line's end.
pub fn yaml(document: &Value) -> String {
    // A tree of JSON is YAML in any case.
    let text = serde_saphyr::to_string(document).unwrap_or_else(|_| document.to_string());
    text.trim_end().to_owned() + "\n"
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
