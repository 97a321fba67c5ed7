//! The shape of `MeshService`, for the published schema; `documents.rs` reads it.

use super::forms::{IP_ADDRESS, MEMBER, TAG};
use super::shape::{Object, Shape, Unique};

pub(super) fn spec() -> Object {
    let protocols = &["detect", "tcp", "http", "http2", "grpc", "tls"];
    let port = Object::new().must("port", Shape::integer(1, 65535), "port: 80", "what clients ask for").may(
        "protocol",
        Shape::words(protocols),
        "what is spoken; a declaration wins over detection; detect by default",
    );
    let endpoint = Object::new()
        .must("address", &IP_ADDRESS, "address: 10.87.0.12", "of a host; names are not resolved")
        .may("meshPort", Shape::integer(1, 65535), "where the mesh listener is; 15008 by default; not with plaintext")
        .may("identity", &MEMBER, "who must answer there, of spec.identities; the service's if it has only one")
        .may(
            "transport",
            Shape::words(&["meshd", "hbone", "plaintext"]),
            "meshd by default; plaintext needs allowPlaintext",
        )
        .may(
            "targetPort",
            Shape::integer(1, 65535),
            "the program's own, on services with one port; the service's by default",
        )
        .may("network", &TAG, "which network the address belongs to")
        .may("zone", &TAG, "where it is")
        .may("weight", Shape::integer(0, 1_000_000), "share of the traffic relative to other endpoints; 100 by default")
        .cel(
            "!has(self.meshPort) || !has(self.transport) || self.transport != 'plaintext'",
            "`meshPort` has no meaning with transport plaintext; use `targetPort`, or remove it",
        );
    let ports = Shape::list_of_some(port, 1024).unique(Unique::By("port"));
    let identities = Shape::list_of_some(&MEMBER, 1024).unique(Unique::Elements);
    let addresses = Shape::list(&IP_ADDRESS, 1024).unique(Unique::Elements);
    Object::new()
        .must("ports", ports, "ports: [ { port: 80 } ]", "each once")
        .may("identities", identities, "who may serve it; ns/NAMESPACE/sa/NAME by default")
        .may("allowPlaintext", Shape::Boolean, "permits endpoints with transport plaintext; false by default")
        .may("addresses", addresses, "stable addresses programs know it by, on its own ports")
        .may("endpoints", Shape::list(endpoint, 100_000), "where it runs; each serves every port")
        .cel(
            "!has(self.endpoints) || (has(self.allowPlaintext) && self.allowPlaintext) || \
             self.endpoints.all(e, !has(e.transport) || e.transport != 'plaintext')",
            "plaintext is not allowed for this service; set `allowPlaintext: true`, or use transport meshd",
        )
        .cel(
            "!has(self.endpoints) || size(self.ports) == 1 || self.endpoints.all(e, !has(e.targetPort))",
            "one targetPort cannot stand for several ports; remove it, or make a service per port",
        )
        .cel(
            "!has(self.endpoints) || !has(self.identities) || size(self.identities) == 1 || \
             self.endpoints.all(e, has(e.identity))",
            "the service has several identities; say in `identity` of each endpoint which one answers there",
        )
}
