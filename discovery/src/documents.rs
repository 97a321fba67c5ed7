//! The `MeshService` document: what may be in it, and what it means. Pure; docs/resources.md is its reference.

use std::net::IpAddr;
use std::sync::Arc;

use meshd_identity::{SYSTEM_NAMESPACE, SpiffeId, TrustDomain};

use crate::name::check_label;
use crate::resources;
use crate::yaml::{self, Field, Fields, Problem};
use crate::{Definition, Health, Place, PortTarget, Protocol, Record, ServiceName, ServicePort, Transport};

/// Where a mesh listener is unless an endpoint says otherwise.
pub const DEFAULT_MESH_PORT: u16 = 15008;
pub const DEFAULT_WEIGHT: u32 = 100;
pub const MAX_WEIGHT: u32 = 1_000_000;
const API_VERSION: &str = "meshd.dev/v1alpha1";
const KIND: &str = "MeshService";

/// One document of a file, good or not.
pub(crate) struct Document {
    pub(crate) line: u64,
    /// Known even of a bad document, as long as its name can be read.
    pub(crate) name: Option<ServiceName>,
    pub(crate) outcome: Result<Described, Vec<Problem>>,
}

/// A good document.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Described {
    pub(crate) service: ServiceName,
    pub(crate) definition: Definition,
    pub(crate) places: Vec<Arc<Place>>,
}

impl Described {
    /// Its key is the service: a source has one document of each.
    pub(crate) fn record(&self, origin: Arc<str>) -> Record {
        Record {
            key: self.service.as_str().into(),
            origin,
            service: self.service.clone(),
            definition: Some(Arc::new(self.definition.clone())),
            places: self.places.clone(),
        }
    }
}

/// Reads all documents of a file, each on its own: an error in one does not touch the next.
pub(crate) fn parse(text: &str, trust_domain: &TrustDomain) -> Vec<Document> {
    split(text).into_iter().map(|(line, text)| read_document(text, line, trust_domain)).collect()
}

/// Cuts at `---` lines. YAML forbids such a line inside any scalar, so this needs no parser, and broken syntax in one
/// document cannot swallow the next.
pub(crate) fn split(text: &str) -> Vec<(u64, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (mut chunks, mut start, mut start_line, mut marked, mut content, mut offset) =
        (Vec::new(), 0, 1, false, false, 0);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.strip_prefix("---").filter(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
        if marker.is_some() && (content || marked) {
            chunks.extend(content.then(|| (start_line, &text[start..offset])));
            (start, start_line, content) = (offset, index as u64 + 1, false);
        }
        marked |= marker.is_some();
        let body = marker.unwrap_or(line).trim();
        content |= !(body.is_empty() || body.starts_with('#') || body == "..." || line.starts_with('%'));
        offset += line.len();
    }
    chunks.extend(content.then(|| (start_line, &text[start..])));
    chunks
}

pub(crate) fn read_document(text: &str, first_line: u64, trust_domain: &TrustDomain) -> Document {
    match yaml::parse(text, first_line) {
        Ok(node) => read_node(&node, trust_domain),
        Err(problem) => Document { line: problem.line, name: None, outcome: Err(vec![problem]) },
    }
}

pub(crate) fn read_node(node: &yaml::Node, trust_domain: &TrustDomain) -> Document {
    let mut problems = Vec::new();
    let root = Field::root(node);
    let known = ["apiVersion", "kind", "metadata", "spec", "status"];
    let Some(fields) = root.mapping(&known, &mut problems) else {
        return Document { line: node.line, name: None, outcome: Err(problems) };
    };
    check_constant(&fields, "apiVersion", API_VERSION, &mut problems);
    check_constant(&fields, "kind", KIND, &mut problems);
    let name = read_name(&fields, &mut problems);
    let spec = fields.require("spec", "spec: { ports: [ { port: 80 } ] }", &mut problems);
    let service = name.as_ref().zip(spec).and_then(|(name, spec)| read_spec(name, &spec, trust_domain, &mut problems));
    if problems.is_empty() {
        // Its limits, which are published.
        resources::mesh_service_shape().check(&root, &mut problems);
    }
    let outcome = match service {
        Some(service) if problems.is_empty() => Ok(service),
        _ => Err(problems),
    };
    Document { line: node.line, name, outcome }
}

fn check_constant(fields: &Fields<'_>, key: &str, expected: &'static str, problems: &mut Vec<Problem>) {
    if let Some(field) = fields.require(key, &format!("{key}: {expected}"), problems) {
        field.choice(&[(expected, ())], problems);
    }
}

fn read_name(fields: &Fields<'_>, problems: &mut Vec<Problem>) -> Option<ServiceName> {
    let metadata = fields.require("metadata", "metadata: { name: payments, namespace: shop }", problems)?;
    let known = [&["name", "namespace", "labels", "annotations"], &resources::WRITTEN_BY_KUBERNETES[..]].concat();
    let metadata = metadata.mapping(&known, problems)?;
    let name = label(&metadata, "name", "name: payments", problems);
    let namespace = label(&metadata, "namespace", "namespace: shop", problems);
    ServiceName::new(name?, namespace?).ok()
}

fn label<'n>(metadata: &Fields<'n>, key: &'static str, example: &str, problems: &mut Vec<Problem>) -> Option<&'n str> {
    let field = metadata.require(key, example, problems)?;
    let text = field.text(problems)?;
    if let Err(error) = check_label(key, text) {
        field.refuse(problems, error.to_string());
        return None;
    }
    if key == "namespace" && text == SYSTEM_NAMESPACE {
        field.refuse(problems, format!("`{SYSTEM_NAMESPACE}` is reserved for hosts; choose another namespace"));
        return None;
    }
    Some(text)
}

fn read_spec(
    name: &ServiceName,
    spec: &Field<'_>,
    trust_domain: &TrustDomain,
    problems: &mut Vec<Problem>,
) -> Option<Described> {
    let fields = spec.mapping(&["ports", "identities", "allowPlaintext", "addresses", "endpoints"], problems)?;
    let ports = read_ports(&fields, problems);
    let identities = read_identities(&fields, name, trust_domain, problems);
    let allow_plaintext = fields.get("allowPlaintext").and_then(|field| field.boolean(problems)).unwrap_or(false);
    let definition = Definition { ports, identities, allow_plaintext, addresses: read_addresses(&fields, problems) };
    let endpoints = fields.get("endpoints").and_then(|field| field.list(problems)).unwrap_or_default();
    let places = read_places(&endpoints, name, &definition, trust_domain, problems);
    Some(Described { service: name.clone(), definition, places })
}

fn read_ports(fields: &Fields<'_>, problems: &mut Vec<Problem>) -> Vec<ServicePort> {
    let Some(field) = fields.require("ports", "ports: [ { port: 80 } ]", problems) else { return Vec::new() };
    let Some(items) = field.list(problems) else { return Vec::new() };
    if items.is_empty() {
        field.refuse(problems, "a service needs at least one port; add one, for example `- port: 80`");
    }
    let mut ports: Vec<ServicePort> = Vec::new();
    for item in items {
        let Some(port) = read_port(&item, problems) else { continue };
        if ports.iter().any(|earlier| earlier.port == port.port) {
            item.refuse(problems, format!("port {} is listed twice; remove one of them", port.port));
        }
        ports.push(port);
    }
    ports
}

fn read_port(item: &Field<'_>, problems: &mut Vec<Problem>) -> Option<ServicePort> {
    let fields = item.mapping(&["port", "protocol"], problems)?;
    let protocol = fields.get("protocol").and_then(|field| field.choice(&Protocol::NAMES, problems));
    let port = fields.require("port", "port: 80", problems)?.port(problems)?;
    Some(ServicePort { port, protocol: protocol.unwrap_or_default() })
}

fn read_identities(
    fields: &Fields<'_>,
    name: &ServiceName,
    trust_domain: &TrustDomain,
    problems: &mut Vec<Problem>,
) -> Vec<SpiffeId> {
    let Some(field) = fields.get("identities") else {
        // A service name is two DNS labels, which are always valid segments of an identity.
        return SpiffeId::workload(trust_domain, name.namespace(), name.name()).into_iter().collect();
    };
    let Some(items) = field.list(problems) else { return Vec::new() };
    if items.is_empty() {
        field.refuse(
            problems,
            "nobody may serve this service; list an identity, or leave the field out for the default",
        );
    }
    let mut identities = Vec::new();
    for item in items {
        let Some(identity) = read_identity(&item, trust_domain, problems) else { continue };
        if identities.contains(&identity) {
            item.refuse(problems, format!("`{}` is listed twice; remove one of them", identity.short()));
        }
        identities.push(identity);
    }
    identities
}

fn read_identity(field: &Field<'_>, trust_domain: &TrustDomain, problems: &mut Vec<Problem>) -> Option<SpiffeId> {
    match SpiffeId::parse_in(trust_domain, field.text(problems)?) {
        Ok(identity) if identity.is_system() => {
            field.refuse(problems, format!("`{}` is a host, which serves nothing; name a workload", identity.short()));
            None
        }
        Ok(identity) => Some(identity),
        Err(error) => {
            field.refuse(problems, error.to_string());
            None
        }
    }
}

fn read_addresses(fields: &Fields<'_>, problems: &mut Vec<Problem>) -> Vec<IpAddr> {
    let items = fields.get("addresses").and_then(|field| field.list(problems)).unwrap_or_default();
    let mut addresses = Vec::new();
    for item in items {
        let Some(found) = address(&item, problems) else { continue };
        if addresses.contains(&found) {
            item.refuse(problems, format!("{found} is listed twice; remove one of them"));
        }
        addresses.push(found);
    }
    addresses
}

fn read_places(
    items: &[Field<'_>],
    name: &ServiceName,
    definition: &Definition,
    trust_domain: &TrustDomain,
    problems: &mut Vec<Problem>,
) -> Vec<Arc<Place>> {
    let mut places: Vec<Arc<Place>> = Vec::new();
    for item in items {
        let Some(place) = read_place(item, name, definition, trust_domain, problems) else { continue };
        if places.iter().any(|earlier| earlier.is_same_as(&place)) {
            item.refuse(problems, format!("endpoint {} is listed twice; remove one of them", place.address));
            continue;
        }
        places.push(Arc::new(place));
    }
    places
}

fn read_place(
    item: &Field<'_>,
    name: &ServiceName,
    definition: &Definition,
    trust_domain: &TrustDomain,
    problems: &mut Vec<Problem>,
) -> Option<Place> {
    let known = ["address", "meshPort", "identity", "transport", "targetPort", "network", "zone", "weight"];
    let fields = item.mapping(&known, problems)?;
    let transport = read_transport(&fields, definition, problems);
    let mesh_port = fields.get("meshPort").and_then(|field| field.port(problems)).unwrap_or(DEFAULT_MESH_PORT);
    let ports = read_ports_served(&fields, definition, problems);
    let network = tag(&fields, "network", problems).into();
    let zone = tag(&fields, "zone", problems).into();
    let weight = fields.get("weight").and_then(|field| field.integer(0..=MAX_WEIGHT, problems));
    let identity = endpoint_identity(item, &fields, name, definition, trust_domain, problems);
    let address = fields.require("address", "address: 10.87.0.12", problems).and_then(|f| address(&f, problems));
    let (address, identity) = (address?, identity?);
    let (weight, identity) = (weight.unwrap_or(DEFAULT_WEIGHT), Some(identity));
    Some(Place {
        address,
        mesh_port,
        ports,
        transport,
        identity,
        network,
        zone,
        weight,
        health: Health::Healthy,
        epoch: 0,
    })
}

fn read_transport(fields: &Fields<'_>, definition: &Definition, problems: &mut Vec<Problem>) -> Transport {
    let Some(field) = fields.get("transport") else { return Transport::default() };
    let transport = field.choice(&Transport::NAMES, problems).unwrap_or_default();
    if transport == Transport::Plaintext {
        if !definition.allow_plaintext {
            field.refuse(
                problems,
                "plaintext is not allowed for this service; set `spec.allowPlaintext: true` if traffic to this \
                 endpoint may go unencrypted and unauthenticated, or use transport meshd",
            );
        }
        if let Some(mesh_port) = fields.get("meshPort") {
            mesh_port.refuse(problems, "has no meaning with transport plaintext; use `targetPort`, or remove it");
        }
    }
    transport
}

/// An endpoint serves all ports of the service, on the same numbers unless told otherwise.
fn read_ports_served(fields: &Fields<'_>, definition: &Definition, problems: &mut Vec<Problem>) -> Vec<PortTarget> {
    let Some(field) = fields.get("targetPort") else { return Vec::new() };
    let target = field.port(problems);
    if definition.ports.len() > 1 {
        field.refuse(
            problems,
            format!(
                "the service has {} ports and one targetPort cannot stand for all of them; remove it, or make a service per port",
                definition.ports.len()
            ),
        );
    }
    let served = target.zip(definition.ports.first()).map(|(target, port)| PortTarget { port: port.port, target });
    served.into_iter().collect()
}

fn endpoint_identity(
    item: &Field<'_>,
    fields: &Fields<'_>,
    name: &ServiceName,
    definition: &Definition,
    trust_domain: &TrustDomain,
    problems: &mut Vec<Problem>,
) -> Option<SpiffeId> {
    let allowed = || {
        definition.identities.iter().map(|id| format!("`{}`", shown(id, trust_domain))).collect::<Vec<_>>().join(", ")
    };
    let Some(field) = fields.get("identity") else {
        return match definition.identities.as_slice() {
            [only] => Some(only.clone()),
            // Refused already, where the identities are listed.
            [] => None,
            _ => {
                let field = format!("{}.identity", item.path);
                let reason =
                    format!("missing; the service has several identities, say which one answers here: {}", allowed());
                problems.push(Problem { line: item.node.line, field, reason });
                None
            }
        };
    };
    let identity = read_identity(&field, trust_domain, problems)?;
    if !definition.identities.is_empty() && !definition.identities.contains(&identity) {
        let reason = format!(
            "`{}` may not serve {}; use one of {}, or add it to spec.identities",
            shown(&identity, trust_domain),
            name,
            allowed()
        );
        field.refuse(problems, reason);
    }
    Some(identity)
}

/// Short within our trust domain, in full elsewhere.
fn shown<'i>(identity: &'i SpiffeId, trust_domain: &TrustDomain) -> &'i str {
    if identity.trust_domain() == trust_domain { identity.short() } else { identity.as_str() }
}

fn address(field: &Field<'_>, problems: &mut Vec<Problem>) -> Option<IpAddr> {
    let text = field.text(problems)?;
    let Ok(address) = text.parse::<IpAddr>().map(|address| address.to_canonical()) else {
        let hint = if text.contains(':') && text.contains('.') {
            "; the port goes into `meshPort` or `targetPort`"
        } else {
            ""
        };
        field.refuse(
            problems,
            format!(
                "`{}` is not an IP address; write an IPv4 or IPv6 address (names are not resolved){hint}",
                yaml::printable(text)
            ),
        );
        return None;
    };
    if !is_of_a_host(address) {
        field.refuse(problems, format!("{address} is not the address of a host; write the one peers dial"));
        return None;
    }
    Some(address)
}

pub(crate) fn is_of_a_host(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    !(address.is_unspecified() || address.is_multicast() || broadcast)
}

pub(crate) fn is_plain_word(text: &str) -> bool {
    text.len() <= 63 && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// `network` and `zone` end up in metrics and messages, so they are plain words.
fn tag(fields: &Fields<'_>, key: &str, problems: &mut Vec<Problem>) -> String {
    let Some(field) = fields.get(key) else { return String::new() };
    let Some(text) = field.text(problems) else { return String::new() };
    if !is_plain_word(text) {
        field.refuse(problems, "at most 63 of a-z, A-Z, 0-9, `-`, `_` and `.` are allowed; choose a plain word");
    }
    text.to_owned()
}

#[cfg(test)]
#[path = "documents_tests.rs"]
mod tests;
