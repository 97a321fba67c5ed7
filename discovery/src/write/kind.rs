//! The kinds of resources, by the names kubectl knows them by, and where each lies in a backend.

use std::fmt;

use crate::ServiceName;
use crate::name::check_label;
use crate::stored::{self, Meaning};
use crate::yaml::unknown;

/// What a document is of.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// As documents say it.
    pub name: &'static str,
    pub plural: &'static str,
    pub short: &'static str,
    /// Of `apiVersion`, and of Kubernetes' paths.
    pub group: &'static str,
    pub version: &'static str,
}

pub static KINDS: [Kind; 1] =
    [Kind { name: "MeshService", plural: "meshservices", short: "msvc", group: "meshd.dev", version: "v1alpha1" }];

impl Kind {
    /// By any of its names, in any case.
    pub fn find(text: &str) -> Result<&'static Kind, String> {
        let lower = text.to_lowercase();
        let qualified = |kind: &Kind| format!("{}.{}", kind.plural, kind.group);
        let is = |kind: &&Kind| [kind.plural, kind.short, &kind.singular(), &qualified(kind)].contains(&lower.as_str());
        let names: Vec<&str> = KINDS.iter().flat_map(|kind| [kind.plural, kind.short]).collect();
        KINDS.iter().find(is).ok_or_else(|| unknown("kind", text, &names))
    }

    /// That of a document.
    pub(super) fn of(api_version: &str, kind: &str) -> Result<&'static Kind, String> {
        let names: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
        let found = KINDS.iter().find(|known| known.name == kind).ok_or_else(|| unknown("kind", kind, &names))?;
        if found.api_version() != api_version {
            return Err(format!("unknown apiVersion `{api_version}` of {kind}; write `{}`", found.api_version()));
        }
        Ok(found)
    }

    pub fn api_version(&self) -> String {
        format!("{}/{}", self.group, self.version)
    }

    /// As keys and messages have it.
    pub fn singular(&self) -> String {
        self.name.to_lowercase()
    }
}

/// One resource of a mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceName {
    pub kind: &'static Kind,
    pub namespace: String,
    pub name: String,
}

impl ResourceName {
    /// `payments` with a namespace, or `payments.shop` without.
    pub fn new(kind: &'static Kind, name: &str, namespace: Option<&str>) -> Result<ResourceName, String> {
        let (name, namespace) = match (name.split_once('.'), namespace) {
            (Some((name, namespace)), None) => (name, namespace),
            (None, Some(namespace)) => (name, namespace),
            (None, None) => return Err(format!("{name} of which namespace? write {name}.shop, or -n shop")),
            (Some(_), Some(_)) => return Err(format!("{name} names its namespace already; leave -n out")),
        };
        check_label("name", name).and_then(|()| check_label("namespace", namespace)).map_err(|e| e.to_string())?;
        Ok(ResourceName { kind, namespace: namespace.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}.{}", self.kind.singular(), self.name, self.namespace)
    }
}

/// Where documents lie in a store of keys.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    /// Below which those of services are, beside their registrations.
    services: String,
}

impl Keys {
    pub(crate) fn new(services: &str) -> Keys {
        Keys { services: services.to_owned() }
    }

    pub(crate) fn key(&self, resource: &ResourceName) -> String {
        format!("{}/{}/{}/service", self.services, resource.namespace, resource.name)
    }

    /// Below which all of a kind are, and others.
    pub(crate) fn prefix(&self, namespace: Option<&str>) -> String {
        namespace.map_or(format!("{}/", self.services), |namespace| format!("{}/{namespace}/", self.services))
    }

    /// What lies under a key, if it is one of that kind.
    pub(crate) fn resource(&self, kind: &'static Kind, key: &str) -> Option<ResourceName> {
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
            assert_eq!(Kind::find(name).unwrap().name, "MeshService", "{name}");
        }
        assert!(Kind::find("meshservces").unwrap_err().contains("did you mean `meshservices`?"));
        assert!(Kind::of("meshd.dev/v1", "MeshService").unwrap_err().contains("write `meshd.dev/v1alpha1`"));
    }

    #[test]
    fn a_resource_has_a_namespace_given_in_one_way() {
        let new = |name, namespace| ResourceName::new(&KINDS[0], name, namespace).map(|found| found.to_string());
        assert_eq!(new("payments.shop", None).unwrap(), "meshservice/payments.shop");
        assert_eq!(new("payments", Some("shop")).unwrap(), "meshservice/payments.shop");
        assert!(new("payments", None).unwrap_err().contains("which namespace"));
        assert!(new("payments.shop", Some("shop")).unwrap_err().contains("leave -n out"));
        assert!(new("Payments.shop", None).unwrap_err().contains("lower case"));
    }

    #[test]
    fn a_key_is_that_of_the_source_and_read_back() {
        let keys = Keys::new("/meshd-discovery/v1");
        let payments = ResourceName::new(&KINDS[0], "payments.shop", None).unwrap();
        assert_eq!(keys.key(&payments), "/meshd-discovery/v1/shop/payments/service");
        assert_eq!(keys.resource(&KINDS[0], &keys.key(&payments)), Some(payments));
        assert_eq!(keys.resource(&KINDS[0], "/meshd-discovery/v1/shop/payments/endpoints/web"), None);
    }
}
