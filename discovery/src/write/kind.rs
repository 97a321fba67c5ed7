//! Resources by the names kubectl knows, and where each lies in a store of keys.

use std::fmt;

use crate::name::check_label;
use crate::resources::{Id, Kind, StoredKey};
use crate::stored::{self, Meaning};
use crate::yaml::unknown;
use crate::{NameError, ServiceName};

/// By any of its names, in any case.
pub fn kind_named(text: &str) -> Result<Kind, String> {
    let lower = text.to_lowercase();
    let names = |kind: Kind| [kind.lower(), kind.plural(), short(kind)];
    let is =
        |kind: &Kind| names(*kind).contains(&lower.as_str()) || lower == format!("{}.{}", kind.plural(), kind.group());
    let known: Vec<&str> = Kind::ALL.into_iter().flat_map(names).filter(|name| !name.is_empty()).collect();
    Kind::ALL.into_iter().find(|kind| !text.is_empty() && is(kind)).ok_or_else(|| unknown("kind", text, &known))
}

/// Those of Linkerd, SMI and Istio are theirs; the Gateway API's routes have none.
fn short(kind: Kind) -> &'static str {
    match kind {
        Kind::MeshService => "msvc",
        Kind::ServicePolicy => "svcpol",
        Kind::AuthorizationPolicy => "ap",
        Kind::ServiceProfile => "sp",
        Kind::TrafficSplit => "ts",
        Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute => "",
    }
}

/// One resource of a mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceName {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
}

impl ResourceName {
    /// `payments` with a namespace, or `payments.shop` without.
    pub fn new(kind: Kind, name: &str, namespace: Option<&str>) -> Result<ResourceName, String> {
        let parts = namespace.map(|namespace| (name, namespace)).or_else(|| name.rsplit_once('.'));
        let (name, namespace) =
            parts.ok_or_else(|| format!("{name} of which namespace? write {name}.shop, or -n shop"))?;
        check(kind, name, namespace).map_err(|error| error.to_string())?;
        Ok(ResourceName { kind, namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

/// Services are DNS labels; names of routes and policies may be several, as in Kubernetes.
fn check(kind: Kind, name: &str, namespace: &str) -> Result<(), NameError> {
    check_label("namespace", namespace)?;
    match kind {
        Kind::MeshService => check_label("name", name),
        _ => name.split('.').try_for_each(|label| check_label("name", label)),
    }
}

impl From<&Id> for ResourceName {
    fn from(id: &Id) -> ResourceName {
        ResourceName { kind: id.kind, namespace: id.namespace.to_string(), name: id.name.to_string() }
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}.{}", self.kind.lower(), self.name, self.namespace)
    }
}

/// Where documents lie in a store of keys.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    /// Below which those of services are, beside their registrations.
    services: String,
    /// Below which all others are.
    resources: String,
}

impl Keys {
    pub(crate) fn new(services: &str, resources: &str) -> Keys {
        Keys { services: services.to_owned(), resources: resources.to_owned() }
    }

    fn base(&self, kind: Kind) -> &str {
        if kind == Kind::MeshService { &self.services } else { &self.resources }
    }

    pub(crate) fn key(&self, resource: &ResourceName) -> String {
        let ResourceName { kind, namespace, name } = resource;
        match kind {
            Kind::MeshService => format!("{}/{namespace}/{name}/service", self.services),
            _ => format!("{}/{namespace}/{}/{name}", self.resources, kind.lower()),
        }
    }

    /// Below which all of a kind are, and others.
    pub(crate) fn prefix(&self, kind: Kind, namespace: Option<&str>) -> String {
        let base = self.base(kind);
        namespace.map_or(format!("{base}/"), |namespace| format!("{base}/{namespace}/"))
    }

    /// What lies under a key, if it is one of that kind.
    pub(crate) fn resource(&self, kind: Kind, key: &str) -> Option<ResourceName> {
        if kind != Kind::MeshService {
            return StoredKey::read(&self.resources, key)
                .map(|key| ResourceName::from(&key.0))
                .filter(|it| it.kind == kind);
        }
        let of = |service: ServiceName| ResourceName {
            kind,
            namespace: service.namespace().to_owned(),
            name: service.name().to_owned(),
        };
        match stored::meaning(&self.services, key)? {
            Meaning::Service(service) => Some(of(service)),
            Meaning::Endpoint(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_the_names_that_kubectl_takes() {
        for name in ["MeshService", "meshservice", "meshservices", "MSVC", "meshservices.meshd.dev"] {
            assert_eq!(kind_named(name), Ok(Kind::MeshService), "{name}");
        }
        assert_eq!(kind_named("httproutes.gateway.networking.k8s.io"), Ok(Kind::HTTPRoute));
        assert!(kind_named("meshservces").unwrap_err().contains("did you mean `meshservices`?"));
        assert!(kind_named("").is_err());
    }

    #[test]
    fn a_resource_has_a_namespace_and_names_of_routes_may_have_dots() {
        let new = |kind, name, namespace| ResourceName::new(kind, name, namespace).map(|found| found.to_string());
        let service = Kind::MeshService;
        assert_eq!(new(service, "payments.shop", None).unwrap(), "meshservice/payments.shop");
        assert_eq!(new(service, "payments", Some("shop")).unwrap(), "meshservice/payments.shop");
        assert!(new(service, "payments", None).unwrap_err().contains("which namespace"));
        assert!(new(service, "payments.shop", Some("shop")).unwrap_err().contains("only a-z"));
        assert!(new(service, "Payments.shop", None).unwrap_err().contains("lower case"));
        assert_eq!(new(Kind::HTTPRoute, "a.b.shop", None), new(Kind::HTTPRoute, "a.b", Some("shop")));
        assert!(new(Kind::HTTPRoute, "a/b", Some("shop")).is_err());
    }

    #[test]
    fn a_key_is_that_of_the_source_and_read_back() {
        let keys = Keys::new("/meshd-discovery/v1", "/meshd-resources/v1");
        for (kind, key) in [
            (Kind::MeshService, "/meshd-discovery/v1/shop/payments/service"),
            (Kind::HTTPRoute, "/meshd-resources/v1/shop/httproute/payments"),
        ] {
            let payments = ResourceName::new(kind, "payments.shop", None).unwrap();
            assert_eq!(keys.key(&payments), key);
            assert!(key.starts_with(&keys.prefix(kind, Some("shop"))));
            assert_eq!(keys.resource(kind, key), Some(payments));
            assert_eq!(keys.resource(Kind::TCPRoute, key), None);
        }
        assert_eq!(keys.resource(Kind::MeshService, "/meshd-discovery/v1/shop/payments/endpoints/web"), None);
    }
}
