//! Several sources become one directory. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Authority, Directory, Offer, Service, ServiceName};

/// One source's contribution; layers are given in order of precedence, first wins.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    pub source: &'a str,
    pub authority: &'a Authority,
    pub offers: &'a [Offer],
}

/// What became of one layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerReport {
    pub accepted: usize,
    /// Defined by a source of higher precedence as well, which holds.
    pub shadowed: Vec<ServiceName>,
    /// Offered without authority for the namespace; full messages.
    pub refused: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Merged {
    pub directory: Directory,
    pub reports: Vec<LayerReport>,
}

/// A service is taken whole from the first layer that offers it and has authority for its namespace. Services and
/// endpoints equal to those of `previous` keep their allocation.
pub fn merge(previous: &Directory, layers: &[Layer<'_>]) -> Merged {
    let mut taken: BTreeMap<ServiceName, Arc<Service>> = BTreeMap::new();
    let reports = layers.iter().map(|layer| take_layer(layer, previous, &mut taken)).collect();
    Merged { directory: Directory::from_services(taken.into_values()), reports }
}

fn take_layer(layer: &Layer<'_>, previous: &Directory, taken: &mut BTreeMap<ServiceName, Arc<Service>>) -> LayerReport {
    let mut report = LayerReport::default();
    for offer in layer.offers {
        let name = &offer.service.name;
        if !layer.authority.covers(name.namespace()) {
            report.refused.push(no_authority(layer.source, offer));
        } else if taken.contains_key(name) {
            report.shadowed.push(name.clone());
        } else {
            taken.insert(name.clone(), reuse(previous.get(name), &offer.service));
            report.accepted += 1;
        }
    }
    report
}

fn no_authority(source: &str, offer: &Offer) -> String {
    let namespace = offer.service.name.namespace();
    format!(
        "{origin}: metadata.namespace: source `{source}` has no authority for namespace `{namespace}`, so service \
         `{name}` is not believed; add \"{namespace}\" to `authority` of the [[source]] named \"{source}\" in meshd.toml, \
         or remove the document",
        origin = offer.origin,
        name = offer.service.name,
    )
}

fn reuse(old: Option<&Arc<Service>>, new: &Arc<Service>) -> Arc<Service> {
    match old {
        None => new.clone(),
        Some(old) if Arc::ptr_eq(old, new) || old == new => old.clone(),
        Some(old) => Arc::new(new.keeping_endpoints_of(old)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake;

    fn everything() -> Authority {
        Authority::everything()
    }

    fn offer(name: &str, source: &str, addresses: &[&str]) -> Offer {
        Offer { service: fake::service(name, source, addresses), origin: format!("{name}.yaml:1").into() }
    }

    #[test]
    fn the_first_source_that_defines_a_service_holds_and_the_other_is_told() {
        let (first, second) =
            (vec![offer("a.shop", "one", &["10.0.0.1"])], vec![offer("a.shop", "two", &["10.0.0.2"])]);
        let authority = everything();
        let layers = [
            Layer { source: "one", authority: &authority, offers: &first },
            Layer { source: "two", authority: &authority, offers: &second },
        ];
        let merged = merge(&Directory::default(), &layers);
        assert_eq!(&*merged.directory.find("a.shop").unwrap().source, "one");
        assert_eq!((merged.reports[0].accepted, merged.reports[1].accepted), (1, 0));
        assert_eq!(merged.reports[1].shadowed[0].as_str(), "a.shop");
    }

    #[test]
    fn a_source_without_authority_is_refused_and_does_not_shadow_the_one_that_has_it() {
        let (first, second) =
            (vec![offer("a.shop", "one", &["10.0.0.1"])], vec![offer("a.shop", "two", &["10.0.0.2"])]);
        let (billing, shop) = (Authority::new(["billing"]).unwrap(), Authority::new(["shop"]).unwrap());
        let layers = [
            Layer { source: "one", authority: &billing, offers: &first },
            Layer { source: "two", authority: &shop, offers: &second },
        ];
        let merged = merge(&Directory::default(), &layers);
        assert_eq!(&*merged.directory.find("a.shop").unwrap().source, "two");
        let message = &merged.reports[0].refused[0];
        assert!(message.starts_with("a.shop.yaml:1: metadata.namespace: "), "{message}");
        assert!(
            message.contains("add \"shop\" to `authority` of the [[source]] named \"one\" in meshd.toml"),
            "{message}"
        );
    }

    #[test]
    fn a_changed_service_keeps_the_allocation_of_its_unchanged_endpoints() {
        let authority = everything();
        let before = vec![offer("a.shop", "one", &["10.0.0.1", "10.0.0.2"])];
        let first = merge(&Directory::default(), &[Layer { source: "one", authority: &authority, offers: &before }]);
        let after = vec![offer("a.shop", "one", &["10.0.0.2", "10.0.0.3"])];
        let second = merge(&first.directory, &[Layer { source: "one", authority: &authority, offers: &after }]);
        let (old, new) = (first.directory.find("a.shop").unwrap(), second.directory.find("a.shop").unwrap());
        assert!(!Arc::ptr_eq(old, new));
        assert!(Arc::ptr_eq(&old.endpoints[1], &new.endpoints[0]));
        assert!(!second.directory.is_same_as(&first.directory));
    }

    /// (layer, service, address) triples: small ranges so that layers overlap often.
    fn scenario() -> impl Strategy<Value = Vec<Vec<(u8, u8)>>> {
        prop::collection::vec(prop::collection::vec((0u8..6, 0u8..4), 0..6), 1..4)
    }

    fn build(layers: &[Vec<(u8, u8)>]) -> Vec<Vec<Offer>> {
        let one = |source: usize, (service, address): &(u8, u8)| {
            offer(&format!("s{service}.ns{}", service % 2), &format!("source{source}"), &[&format!("10.0.0.{address}")])
        };
        layers.iter().enumerate().map(|(source, offers)| offers.iter().map(|o| one(source, o)).collect()).collect()
    }

    proptest! {
        #[test]
        fn each_service_comes_from_the_first_layer_that_may_define_it(scenario in scenario(), denied in 0usize..4) {
            let offers = build(&scenario);
            let only_one = Authority::new(["ns1"]).unwrap();
            let all = everything();
            let names: Vec<String> = (0..offers.len()).map(|index| format!("source{index}")).collect();
            let authority = |index: usize| if index == denied { &only_one } else { &all };
            let layers: Vec<Layer<'_>> = offers.iter().enumerate()
                .map(|(index, offers)| Layer { source: &names[index], authority: authority(index), offers }).collect();
            let merged = merge(&Directory::default(), &layers);

            let mut expected: BTreeMap<&str, &Service> = BTreeMap::new();
            for layer in &layers {
                for offer in layer.offers.iter().filter(|offer| layer.authority.covers(offer.service.name.namespace())) {
                    expected.entry(offer.service.name.as_str()).or_insert(&offer.service);
                }
            }
            prop_assert_eq!(merged.directory.len(), expected.len());
            for (name, service) in expected {
                prop_assert_eq!(&**merged.directory.find(name).unwrap(), service);
            }
            for (layer, report) in layers.iter().zip(&merged.reports) {
                prop_assert_eq!(report.accepted + report.shadowed.len() + report.refused.len(), layer.offers.len());
            }
        }

        #[test]
        fn merging_equal_content_again_changes_no_allocation(scenario in scenario()) {
            let all = everything();
            let (first_offers, second_offers) = (build(&scenario), build(&scenario));
            let layer = |offers| Layer { source: "x", authority: &all, offers };
            let first = merge(&Directory::default(), &first_offers.iter().map(|o| layer(o)).collect::<Vec<_>>());
            let second = merge(&first.directory, &second_offers.iter().map(|o| layer(o)).collect::<Vec<_>>());
            prop_assert!(second.directory.is_same_as(&first.directory));
        }
    }
}
