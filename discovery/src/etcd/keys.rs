//! What the keys in etcd mean: everything of a service lies below one prefix, so that one watch follows it.
//!
//! ```text
//! /meshd-discovery/v1/NAMESPACE/NAME/service                 a MeshService document (YAML or JSON)
//! /meshd-discovery/v1/NAMESPACE/NAME/endpoints/INSTANCE      a registration (JSON), under the lease of its host
//! ```

use meshd_etcd::Prefix;
use meshd_etcd::api::KeyValue;
use meshd_identity::TrustDomain;

use crate::{Change, Scope, ServiceName, stored};

/// Below which all keys lie, unless told otherwise.
pub(crate) const BASE: &str = "/meshd-discovery/v1";

pub(crate) fn prefix(base: &str, scope: &Scope) -> Prefix {
    match scope {
        Scope::Everything => Prefix::new(format!("{base}/")),
        Scope::Namespace(namespace) => Prefix::new(format!("{base}/{namespace}/")),
        Scope::Service(service) => Prefix::new(format!("{base}/{}/{}/", service.namespace(), service.name())),
    }
}

pub(crate) fn endpoint(base: &str, service: &ServiceName, instance: &str) -> String {
    format!("{base}/{}/{}/endpoints/{instance}", service.namespace(), service.name())
}

/// What was written to a key. A key of unknown form is passed over: a newer meshd may have written it.
pub(crate) fn read(base: &str, pair: &KeyValue, trust_domain: &TrustDomain) -> Option<Change> {
    let key = std::str::from_utf8(&pair.key).ok()?;
    Some(stored::read(key, stored::meaning(base, key)?, &pair.value, trust_domain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::trust_domain;

    fn pair(key: &str, value: &str) -> KeyValue {
        KeyValue { key: key.into(), value: value.into(), ..KeyValue::default() }
    }

    fn read_at(key: &str, value: &str) -> Option<Change> {
        read(BASE, &pair(&format!("{BASE}/{key}"), value), &trust_domain())
    }

    const PAYMENTS: &str = "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: { name: payments, namespace: shop }\nspec: { ports: [ { port: 80 } ] }\n";

    #[test]
    fn a_document_and_a_registration_are_told_apart_by_their_keys() {
        let Some(Change::Set(document)) = read_at("shop/payments/service", PAYMENTS) else { panic!("refused") };
        assert!(document.definition.is_some() && document.service.as_str() == "payments.shop");
        let registration = r#"{"address":"10.0.0.1","ports":[{"port":80,"target":80}]}"#;
        let Some(Change::Set(place)) = read_at("shop/payments/endpoints/web-1", registration) else {
            panic!("refused")
        };
        assert!(place.definition.is_none() && place.places.len() == 1);
        assert_eq!(&*place.key, "/meshd-discovery/v1/shop/payments/endpoints/web-1");
    }

    #[test]
    fn keys_of_another_form_are_passed_over() {
        let instances = ["shop/payments/endpoints/", "shop/payments/endpoints/a\nb", "meshd-system/pki/endpoints/a"];
        for key in
            ["shop", "shop/payments", "shop/payments/policy", "Shop/payments/service"].into_iter().chain(instances)
        {
            assert_eq!(read_at(key, PAYMENTS), None, "{key}");
        }
    }

    #[test]
    fn what_cannot_be_understood_names_key_line_and_field() {
        for (key, value, expected) in [
            ("shop/payments/service", "", "is empty"),
            ("shop/billing/service", PAYMENTS, "describes payments.shop, and the key is that of billing.shop"),
            ("shop/payments/service", "kind: MeshService\n", "line 1: apiVersion: missing"),
            ("shop/payments/endpoints/a", "garbage", "is no registration"),
        ] {
            let Some(Change::Refused(refused)) = read_at(key, value) else { panic!("{key}: taken") };
            assert!(refused.problems[0].starts_with(&format!("{BASE}/{key}: ")), "{refused:?}");
            assert!(refused.problems.iter().any(|problem| problem.contains(expected)), "{refused:?}");
        }
    }

    #[test]
    fn a_prefix_ends_where_the_name_ends() {
        let service = prefix(BASE, &Scope::Service("payments.shop".parse().unwrap()));
        assert_eq!(service.key, format!("{BASE}/shop/payments/").into_bytes());
        assert_eq!(service.end, format!("{BASE}/shop/payments0").into_bytes());
    }
}
