//! Documents of a text: which kind each is, what is wrong with it, and what it says. Pure.

use std::sync::Arc;

use meshd_identity::{SYSTEM_NAMESPACE, TrustDomain};
use serde_json::{Value as Json, json};

use super::forms::{LABEL, SUBDOMAIN};
use super::references::{is_service_parent, keep_services};
use super::shape::{Object, Shape};
use super::{
    Id, Kind, Resource, UnclearSpec, authorization_policy, grpc_route, http_route, service_policy, service_profile,
    tcp_route, traffic_split, unclear_policy,
};
use crate::documents;
use crate::yaml::{self, Field, Node, Problem, Value};

const MOST_EXPRESSIONS: usize = 64;
const CREATED: &str = "creationTimestamp";
/// Into `metadata`, besides what people write.
pub(crate) const WRITTEN_BY_KUBERNETES: [&str; 11] = [
    CREATED,
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

/// One document, good or not.
pub struct Document {
    pub line: u64,
    /// Known even of a bad document, as long as it can be read.
    pub id: Option<Id>,
    pub(crate) outcome: Result<Said, Vec<Problem>>,
    /// Of an AuthorizationPolicy that decides something: what of it can be read also where it is bad.
    unclear: Option<UnclearSpec>,
    /// What does not mean what it may be meant to.
    pub(crate) warnings: Vec<Problem>,
}

impl Document {
    fn bad(line: u64, problems: Vec<Problem>) -> Document {
        Document { line, id: None, outcome: Err(problems), unclear: None, warnings: Vec::new() }
    }

    /// As what it counts, if it is bad and its key was never good.
    pub(crate) fn meanwhile(&self, key: &Id) -> Option<Resource> {
        let is_of_the_key = |id: &&Id| id.kind == key.kind && id.namespace == key.namespace;
        match self.id.as_ref().filter(is_of_the_key) {
            Some(_) => self.unclear.clone().and_then(|spec| unclear_policy::stands_for(key, Some(spec))),
            None => meanwhile(key),
        }
    }
}

/// As what something counts that is no document at all, if its key was never good.
pub(crate) fn meanwhile(key: &Id) -> Option<Resource> {
    unclear_policy::stands_for(key, None)
}

/// What a good document says.
#[derive(Debug)]
pub(crate) enum Said {
    Service(Box<documents::Described>),
    /// An import becomes several; what only concerns other controllers none.
    Resources(Vec<Resource>),
}

/// Reads all documents of a text, each on its own: an error in one does not touch the next.
pub fn read(text: &str, trust_domain: &TrustDomain) -> Vec<Document> {
    let chunks = documents::split(text).into_iter();
    chunks.flat_map(|(line, chunk)| read_chunk(chunk, line, trust_domain)).collect()
}

fn read_chunk(text: &str, line: u64, trust_domain: &TrustDomain) -> Vec<Document> {
    let node = match yaml::parse(text, line) {
        Ok(node) => node,
        Err(problem) => return vec![Document::bad(problem.line, vec![problem])],
    };
    match items_of_list(node) {
        Ok(items) => items.into_iter().map(|item| read_written(item, trust_domain)).collect(),
        Err(node) => vec![read_written(node, trust_domain)],
    }
}

/// A text that is one document.
pub(crate) fn read_one(text: &str, line: u64, trust_domain: &TrustDomain) -> Document {
    match yaml::parse(text, line) {
        Ok(node) => read_written(node, trust_domain),
        Err(problem) => Document::bad(problem.line, vec![problem]),
    }
}

/// `kubectl get -o yaml` writes a List.
fn items_of_list(mut node: Node) -> Result<Vec<Node>, Node> {
    let is_list = Field::root(&node)
        .entry("kind")
        .is_some_and(|kind| matches!(&kind.node.value, Value::Text(text) if text == "List"));
    match is_list.then(|| node.take("items")).flatten() {
        Some(Node { value: Value::List(items), .. }) => Ok(items),
        _ => Err(node),
    }
}

/// When it was made only a server knows: what somebody wrote would put it before others.
fn read_written(mut node: Node, trust_domain: &TrustDomain) -> Document {
    let _ = node.get_mut("metadata").and_then(|metadata| metadata.take(CREATED));
    read_node(&node, trust_domain)
}

/// An object of Kubernetes.
pub fn read_json(object: &Json, trust_domain: &TrustDomain) -> Document {
    read_node(&Node::from(object), trust_domain)
}

pub(crate) fn read_node(node: &Node, trust_domain: &TrustDomain) -> Document {
    let root = Field::root(node);
    let mut problems = Vec::new();
    match kind_of(&root, &mut problems) {
        // What says no kind is taken for what it most often is.
        Some(Kind::MeshService) | None if problems.is_empty() => {
            let document = documents::read_node(node, trust_domain);
            let id = document.name.map(|name| Id {
                kind: Kind::MeshService,
                namespace: name.namespace().into(),
                name: name.name().into(),
            });
            let outcome = document.outcome.map(|found| Said::Service(Box::new(found)));
            Document { line: document.line, id, outcome, unclear: None, warnings: Vec::new() }
        }
        Some(kind) => {
            let id = id_of(kind, &root);
            let outcome = read_resource(kind, &root, trust_domain, problems);
            let is_policy = kind == Kind::AuthorizationPolicy;
            let unclear = is_policy.then(|| unclear_policy::read(&root, trust_domain)).flatten();
            let is_profile = kind == Kind::ServiceProfile;
            let warnings = if is_profile { service_profile::warnings(&root) } else { Vec::new() };
            Document { line: node.line, id, outcome: outcome.map(Said::Resources), unclear, warnings }
        }
        None => Document::bad(node.line, problems),
    }
}

fn kind_of(root: &Field<'_>, problems: &mut Vec<Problem>) -> Option<Kind> {
    let field = root.entry("kind")?;
    let names: Vec<(&'static str, Kind)> = Kind::ALL.into_iter().map(|kind| (kind.name(), kind)).collect();
    let kind = field.choice(&names, problems)?;
    if let Some(field) = root.entry("apiVersion")
        && let Value::Text(text) = &field.node.value
        && kind != Kind::MeshService
    {
        let versions: Vec<String> =
            kind.versions().iter().map(|version| format!("{}/{version}", kind.group())).collect();
        if !versions.contains(text) {
            let reason = format!("`{}` is not one of {kind}; write {}", yaml::printable(text), versions.join(" or "));
            field.refuse(problems, reason);
        }
    }
    Some(kind)
}

fn id_of(kind: Kind, root: &Field<'_>) -> Option<Id> {
    let metadata = root.entry("metadata")?;
    let text = |name: &str| metadata.word(name).map(Arc::from);
    Some(Id { kind, namespace: text("namespace")?, name: text("name")? })
}

fn metadata() -> Object {
    let named = Object::new()
        .must("name", &SUBDOMAIN, "name: payments", "of the document")
        .must("namespace", &LABEL, "namespace: shop", "it is of")
        .may("labels", Shape::Texts, "not looked at")
        .may("annotations", Shape::Texts, "not looked at");
    WRITTEN_BY_KUBERNETES
        .into_iter()
        .fold(named, |object, name| object.may(name, Shape::Anything, "what Kubernetes writes"))
}

fn spec(kind: Kind) -> Object {
    match kind {
        Kind::MeshService => super::mesh_service::spec(),
        Kind::HTTPRoute => http_route::spec(),
        Kind::GRPCRoute => grpc_route::spec(),
        Kind::TCPRoute => tcp_route::spec(),
        Kind::ServicePolicy => service_policy::spec(),
        Kind::AuthorizationPolicy => authorization_policy::spec(),
        Kind::ServiceProfile => service_profile::spec(),
        Kind::TrafficSplit => traffic_split::spec(),
    }
}

pub(crate) fn mesh_service_shape() -> Shape {
    shape(Kind::MeshService).into()
}

/// All that may be in a document of a kind.
pub(super) fn shape(kind: Kind) -> Object {
    Object::new()
        .must("apiVersion", &super::forms::WORD, "apiVersion: meshd.dev/v1alpha1", "of the kind")
        .must("kind", &super::forms::WORD, "kind: HTTPRoute", "of the document")
        .must("metadata", metadata(), "metadata: { name: payments, namespace: shop }", "which one it is")
        .must("spec", spec(kind), "spec: { ... }", "what it says")
        .may("status", Shape::Anything, "what controllers write; not looked at")
}

fn read_resource(
    kind: Kind,
    root: &Field<'_>,
    trust_domain: &TrustDomain,
    mut problems: Vec<Problem>,
) -> Result<Vec<Resource>, Vec<Problem>> {
    let json = root.node.to_json();
    // Before any of them is compiled.
    if let Err(reason) = check_expressions(&json) {
        root.refuse(&mut problems, reason);
        return Err(problems);
    }
    Shape::Object(shape(kind)).check(root, &mut problems);
    let namespace = id_of(kind, root).map(|id| id.namespace);
    if let Some(spec) = root.entry("spec") {
        match kind {
            Kind::HTTPRoute => http_route::check(&spec, &mut problems),
            Kind::GRPCRoute => grpc_route::check(&spec, &mut problems),
            Kind::TCPRoute => tcp_route::check(&spec, &mut problems),
            Kind::ServicePolicy => service_policy::check(&spec, namespace.as_deref(), &mut problems),
            Kind::AuthorizationPolicy => {
                authorization_policy::check(&spec, namespace.as_deref(), trust_domain, &mut problems);
            }
            Kind::MeshService | Kind::ServiceProfile | Kind::TrafficSplit => {}
        }
        check_namespace(kind, root, &spec, &mut problems);
    }
    if !problems.is_empty() {
        problems.sort_by_key(|problem| problem.line);
        return Err(problems);
    }
    understand(kind, root, &json, trust_domain)
}

/// Hosts live in a namespace of their own, and what everybody has to obey beside them.
fn check_namespace(kind: Kind, root: &Field<'_>, spec: &Field<'_>, problems: &mut Vec<Problem>) {
    let Some(namespace) = root.entry("metadata").and_then(|metadata| metadata.entry("namespace")) else { return };
    let is_system = matches!(&namespace.node.value, Value::Text(text) if text == SYSTEM_NAMESPACE);
    let is_for_all = spec.entry("targetRef").is_some_and(|target| target.word("kind") == Some("TrustDomain"));
    if is_system && !(kind == Kind::AuthorizationPolicy && is_for_all) {
        namespace.refuse(problems, format!("`{SYSTEM_NAMESPACE}` is reserved for hosts, and for policies of the whole trust domain; choose another namespace"));
    }
}

/// A checked document, as what it means.
fn understand(
    kind: Kind,
    root: &Field<'_>,
    json: &Json,
    trust_domain: &TrustDomain,
) -> Result<Vec<Resource>, Vec<Problem>> {
    let mut spec = json.get("spec").cloned().unwrap_or_default();
    match kind {
        Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute => {
            keep_services(&mut spec);
            http_route::complete(&mut spec);
        }
        Kind::AuthorizationPolicy => authorization_policy::complete(&mut spec, trust_domain),
        Kind::ServiceProfile => return service_profile::convert(root, json),
        Kind::TrafficSplit => return traffic_split::convert(root, json),
        Kind::MeshService | Kind::ServicePolicy => {}
    }
    let metadata = json.get("metadata").cloned().unwrap_or_default();
    match resource(kind, &metadata, &spec) {
        Ok(resource) => Ok(vec![resource]),
        // What the shape let pass and the types do not: still the operator's to mend.
        Err(reason) => Err(vec![Problem { line: root.node.line, field: "spec".to_owned(), reason }]),
    }
}

fn resource(kind: Kind, metadata: &Json, spec: &Json) -> Result<Resource, String> {
    check_expressions(spec)?;
    let object = json!({ "kind": kind.name(), "metadata": metadata, "spec": spec });
    serde_json::from_value(object).map_err(|error| error.to_string())
}

/// What an import becomes. It has a name that no document can have, so that it takes the place of none.
pub(super) fn converted(from: Kind, kind: Kind, metadata: &Json, spec: &Json) -> Result<Resource, String> {
    let mut metadata = metadata.clone();
    let name = metadata["name"].as_str().unwrap_or_default();
    metadata["name"] = format!("{}/{name}", from.lower()).into();
    resource(kind, &metadata, spec)
}

/// Each takes memory and time of every host, whoever writes it.
fn check_expressions(document: &Json) -> Result<(), String> {
    match expressions(document) {
        0..=MOST_EXPRESSIONS => Ok(()),
        found => Err(format!(
            "has {found} regular expressions and {MOST_EXPRESSIONS} are allowed; match without them, or make several routes"
        )),
    }
}

fn expressions(value: &Json) -> usize {
    match value {
        Json::Array(items) => items.iter().map(expressions).sum(),
        Json::Object(members) => {
            let is_expression = members.get("type").is_some_and(|kind| kind == "RegularExpression");
            let own =
                ["value", "service", "method"].into_iter().filter(|name| is_expression && members.contains_key(*name));
            let below: usize = members.values().map(expressions).sum();
            own.count() + usize::from(members.contains_key("pathRegex")) + below
        }
        _ => 0,
    }
}

/// Whether a route of a cluster is any concern of ours: most are of Gateways.
pub(crate) fn is_between_services(object: &Json) -> bool {
    let node = Node::from(object);
    let parents = Field::root(&node).entry("spec").map(|spec| spec.items("parentRefs")).unwrap_or_default();
    parents.iter().any(is_service_parent)
}

/// `line 3: spec.rules: ...`, where the text is one value of a store.
pub(super) fn shown(problem: &Problem) -> String {
    let field = if problem.field.is_empty() { "document" } else { &problem.field };
    if problem.line == 0 {
        format!("{field}: {}", problem.reason)
    } else {
        format!("line {}: {field}: {}", problem.line, problem.reason)
    }
}
