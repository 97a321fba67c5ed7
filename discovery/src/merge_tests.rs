use proptest::prelude::*;
use tokio::time::Instant;

use super::*;
use crate::{Belief, Change, Epoch, Health, Listing, PortTarget, Record, Scope, SourceEvent, fake};

/// A source that says `records`.
fn said(records: Vec<Record>) -> Held {
    let mut held = Held::new(Belief::Always);
    let changes = records.into_iter().map(Change::Set).collect();
    let read = Listing::empty(Scope::Everything, Epoch::default());
    held.apply(SourceEvent::Listed(read), Instant::now());
    held.apply(SourceEvent::Changed { scope: Scope::Everything, position: 1, changes }, Instant::now());
    held
}

/// The service a single record of a trusted source makes.
pub(crate) fn alone(source: &str, record: Record) -> Service {
    let name = record.service.clone();
    let merged = merged(&name, &[(source, &["*"], &said(vec![record]))]);
    assert_eq!(merged.parts[0].refused, [] as [&str; 0]);
    Arc::unwrap_or_clone(merged.service.unwrap())
}

fn merged(name: &ServiceName, sources: &[(&str, &[&str], &Held)]) -> Merged {
    let named: Vec<(Arc<str>, Namespaces)> = sources
        .iter()
        .map(|(name, authority, _)| ((*name).into(), Namespaces::new(authority.to_vec()).unwrap()))
        .collect();
    let endpoints = Namespaces::everything();
    let layers: Vec<Layer<'_>> = (named.iter().zip(sources))
        .map(|((source, authority), (_, _, held))| Layer { source, authority, endpoints: &endpoints, held })
        .collect();
    merge(name, &fake::trust_domain(), None, &layers)
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

/// A registration: places, each serving port 80 with port 8080, and no definition.
fn registration(key: &str, service: &str, addresses: &[&str]) -> Record {
    let place = |address: &&str| Place { ports: vec![PortTarget { port: 80, target: 8080 }], ..fake::place(address) };
    Record {
        key: key.into(),
        origin: key.into(),
        service: name(service),
        definition: None,
        places: addresses.iter().map(|address| Arc::new(place(address))).collect(),
    }
}

fn dials(service: &Service) -> Vec<String> {
    service.endpoints.iter().map(|endpoint| endpoint.dial.ip().to_string()).collect()
}

#[test]
fn the_name_says_who_may_serve_where_the_source_never_knew() {
    let mut record = fake::record("a.shop", &["10.0.0.1"]);
    Arc::make_mut(record.definition.as_mut().unwrap()).identities.clear();
    let service = alone("cluster", record);
    assert_eq!(service.identities.iter().map(SpiffeId::short).collect::<Vec<_>>(), ["ns/shop/sa/a"]);
    assert_eq!(dials(&service), ["10.0.0.1"]);
}

#[test]
fn the_first_source_that_defines_a_service_holds_and_the_other_is_told() {
    let (first, second) =
        (said(vec![fake::record("a.shop", &["10.0.0.1"])]), said(vec![fake::record("a.shop", &["10.0.0.2"])]));
    let merged = merged(&name("a.shop"), &[("one", &["*"], &first), ("two", &["*"], &second)]);
    let service = merged.service.unwrap();
    assert_eq!((&*service.source, dials(&service)), ("one", vec!["10.0.0.1".into(), "10.0.0.2".into()]));
    assert!(merged.parts[0].defines && merged.parts[1].shadowed && !merged.parts[1].defines);
}

#[test]
fn a_source_without_authority_is_refused_and_does_not_shadow_the_one_that_has_it() {
    let (first, second) =
        (said(vec![fake::record("a.shop", &["10.0.0.1"])]), said(vec![fake::record("a.shop", &["10.0.0.2"])]));
    let merged = merged(&name("a.shop"), &[("one", &["billing"], &first), ("two", &["shop"], &second)]);
    let service = merged.service.unwrap();
    assert_eq!((&*service.source, dials(&service)), ("two", vec!["10.0.0.2".into()]));
    let message = &merged.parts[0].refused[0];
    assert!(message.starts_with("fake/a.shop: metadata.namespace: "), "{message}");
    assert!(message.contains("add \"shop\" to `authority` of the [[source]] named \"one\" in meshd.toml"), "{message}");
}

#[test]
fn a_registration_adds_places_to_a_service_that_another_source_defines_but_no_identity() {
    let defined = said(vec![fake::record("a.shop", &[])]);
    let mut stranger = registration("r/2", "a.shop", &["10.0.0.2"]);
    let identity = SpiffeId::workload(&fake::trust_domain(), "shop", "thief").unwrap();
    stranger.places = vec![Arc::new(Place { identity: Some(identity), ..(*stranger.places[0]).clone() })];
    let registered = said(vec![registration("r/1", "a.shop", &["10.0.0.1"]), stranger]);
    let merged = merged(&name("a.shop"), &[("files", &["*"], &defined), ("etcd", &[], &registered)]);
    assert_eq!(dials(&merged.service.unwrap()), ["10.0.0.1"]);
    let message = &merged.parts[1].refused[0];
    assert!(message.contains("ns/shop/sa/thief` may not serve a.shop; use one of `spiffe://"), "{message}");
}

#[test]
fn a_service_that_nobody_defines_has_its_default_identity_and_the_ports_that_are_served() {
    let registered = said(vec![registration("r/1", "a.shop", &["10.0.0.1"])]);
    let merged = merged(&name("a.shop"), &[("etcd", &[], &registered)]);
    let service = merged.service.unwrap();
    assert_eq!(service.ports, [ServicePort { port: 80, protocol: Protocol::Detect }]);
    assert_eq!(service.identities[0].short(), "ns/shop/sa/a");
    assert_eq!(service.endpoints[0].target, "10.0.0.1:8080".parse().unwrap());
    assert_eq!(&*service.source, "etcd");
}

#[test]
fn a_place_that_allows_no_authentication_needs_a_definition_that_says_so() {
    let mut record = registration("r/1", "a.shop", &["10.0.0.1"]);
    record.places = vec![Arc::new(Place { transport: Transport::Plaintext, ..(*record.places[0]).clone() })];
    let merged = merged(&name("a.shop"), &[("etcd", &["*"], &said(vec![record]))]);
    assert!(merged.service.unwrap().endpoints.is_empty());
    assert!(merged.parts[0].refused[0].contains("plaintext is not allowed"), "{:?}", merged.parts);
}

#[test]
fn places_that_are_wrong_in_the_same_way_are_told_once() {
    let mut record = fake::record("a.shop", &["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    for place in &mut record.places[1..] {
        *place = Arc::new(Place { transport: Transport::Plaintext, ..(**place).clone() });
    }
    let merged = merged(&name("a.shop"), &[("one", &["*"], &said(vec![record]))]);
    assert_eq!(merged.parts[0].refused.len(), 1, "{:?}", merged.parts);
    assert!(
        merged.parts[0].refused[0].starts_with("fake/a.shop: 10.0.0.2 and 1 more: plaintext"),
        "{:?}",
        merged.parts
    );
}

#[test]
fn a_registration_cannot_lead_callers_away_in_clear_even_where_plaintext_is_allowed() {
    let mut document = fake::record("a.shop", &["10.0.0.1"]);
    let definition = (**document.definition.as_ref().unwrap()).clone();
    document.definition = Some(Arc::new(Definition { allow_plaintext: true, ..definition }));
    let mut record = registration("r/1", "a.shop", &["10.6.6.6"]);
    record.places = vec![Arc::new(Place { transport: Transport::Plaintext, ..(*record.places[0]).clone() })];
    let (files, etcd) = (said(vec![document]), said(vec![record]));
    let without = merged(&name("a.shop"), &[("files", &["shop"], &files), ("etcd", &[], &etcd)]);
    assert_eq!(dials(&without.service.unwrap()), ["10.0.0.1"]);
    assert!(without.parts[1].refused[0].contains("plaintext is taken only from a source with authority"));
    let with = merged(&name("a.shop"), &[("files", &["shop"], &files), ("etcd", &["shop"], &etcd)]);
    assert_eq!(with.service.unwrap().endpoints.len(), 2);
}

#[test]
fn nobody_takes_a_service_for_undefined_before_every_source_that_may_define_it_was_read() {
    let registered = said(vec![registration("r/1", "a.shop", &["10.0.0.1"])]);
    let unread = Held::new(Belief::Always);
    let service = |authority: &[&str], held: &Held| {
        merged(&name("a.shop"), &[("files", authority, held), ("etcd", &[], &registered)]).service
    };
    assert!(service(&["shop"], &unread).is_none());
    assert!(service(&["billing"], &unread).is_some());
    assert!(service(&["shop"], &said(vec![])).is_some());
}

#[test]
fn a_registration_decides_no_raw_address() {
    let files = said(vec![fake::record("a.shop", &["10.0.0.1"])]);
    let etcd = said(vec![registration("r/1", "a.shop", &["10.0.0.2"])]);
    let service = merged(&name("a.shop"), &[("files", &["*"], &files), ("etcd", &[], &etcd)]).service.unwrap();
    assert_eq!(service.endpoints.len(), 2);
    assert_eq!(service.raw_addresses().collect::<Vec<_>>(), [("10.0.0.1:80".parse().unwrap(), 80)]);
}

#[test]
fn of_two_registrations_of_one_place_the_later_life_holds() {
    let with = |key: &str, epoch: u64, weight: u32| {
        let mut record = registration(key, "a.shop", &["10.0.0.1"]);
        record.places = vec![Arc::new(Place { epoch, weight, ..(*record.places[0]).clone() })];
        record
    };
    for records in [vec![with("r/1", 1, 10), with("r/2", 2, 20)], vec![with("r/1", 2, 20), with("r/2", 1, 10)]] {
        let merged = merged(&name("a.shop"), &[("etcd", &[], &said(records))]);
        let service = merged.service.unwrap();
        assert_eq!(
            service.endpoints.iter().map(|endpoint| (endpoint.epoch, endpoint.weight)).collect::<Vec<_>>(),
            [(2, 20)]
        );
    }
}

#[test]
fn what_a_source_is_sure_of_stands_for_a_place_another_has_lost() {
    let mut unsure = Held::new(Belief::Guarded);
    let now = Instant::now();
    let change = |change| SourceEvent::Changed { scope: Scope::Everything, position: 1, changes: vec![change] };
    unsure.apply(change(Change::Set(registration("r/1", "a.shop", &["10.0.0.1"]))), now);
    unsure.apply(change(Change::Removed("r/1".into())), now);
    let sure = said(vec![registration("s/1", "a.shop", &["10.0.0.1"])]);
    let alone = merged(&name("a.shop"), &[("one", &[], &unsure)]).service.unwrap();
    assert!(alone.endpoints[0].stale && alone.endpoints[0].health == Health::Healthy);
    let both = merged(&name("a.shop"), &[("one", &[], &unsure), ("two", &[], &sure)]).service.unwrap();
    assert_eq!(both.endpoints.iter().map(|e| (&*e.source, e.stale)).collect::<Vec<_>>(), [("two", false)]);
}

#[test]
fn a_changed_service_keeps_the_allocation_of_its_unchanged_endpoints() {
    let everything = Namespaces::everything();
    let build = |addresses: &[&str], previous: Option<&Arc<Service>>| {
        let (source, held) = ("one".into(), said(vec![fake::record("a.shop", addresses)]));
        let layer = Layer { source: &source, authority: &everything, endpoints: &everything, held: &held };
        merge(&name("a.shop"), &fake::trust_domain(), previous, &[layer]).service.unwrap()
    };
    let first = build(&["10.0.0.1", "10.0.0.2"], None);
    let second = build(&["10.0.0.2", "10.0.0.3"], Some(&first));
    assert!(!Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&first.endpoints[1], &second.endpoints[0]));
    assert!(Arc::ptr_eq(&second, &build(&["10.0.0.2", "10.0.0.3"], Some(&second))));
}

proptest! {
    /// Each source: does it define the service, may it, and which of four places it names.
    #[test]
    fn no_endpoint_is_named_twice_or_by_a_source_behind_one_that_names_it(
        sources in prop::collection::vec((any::<bool>(), any::<bool>(), prop::collection::vec(0u8..4, 0..4)), 1..4)
    ) {
        let held: Vec<Held> = sources.iter().map(|(defines, _, places)| {
            let mut addresses: Vec<String> = places.iter().map(|n| format!("10.0.0.{n}")).collect();
            addresses.sort();
            addresses.dedup();
            let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
            let record = fake::record("a.shop", &addresses);
            let ports = vec![PortTarget { port: 80, target: 80 }];
            let named = |place: &Arc<Place>| Arc::new(Place { ports: ports.clone(), ..(**place).clone() });
            let places = record.places.iter().map(named).collect();
            said(vec![if *defines { record } else { Record { definition: None, places, ..record } }])
        }).collect();
        let names: Vec<String> = (0..sources.len()).map(|index| format!("source{index}")).collect();
        let all: Vec<(&str, &[&str], &Held)> = names.iter().zip(&sources).zip(&held)
            .map(|((name, (_, may, _)), held)| (name.as_str(), if *may { &["shop"][..] } else { &[][..] }, held)).collect();
        let merged = merged(&name("a.shop"), &all);
        let believed = |index: usize| !sources[index].0 || sources[index].1;
        let mut expected: Vec<(u8, usize)> = Vec::new();
        for (index, (_, _, places)) in sources.iter().enumerate().filter(|(index, _)| believed(*index)) {
            for place in places {
                if !expected.iter().any(|(known, _)| known == place) {
                    expected.push((*place, index));
                }
            }
        }
        expected.sort_unstable();
        let mut found: Vec<(u8, usize)> = merged.service.iter().flat_map(|service| &service.endpoints)
            .map(|e| (e.dial.ip().to_string().rsplit('.').next().unwrap().parse().unwrap(), usize::from(e.rank))).collect();
        found.sort_unstable();
        prop_assert_eq!(found, expected);
        prop_assert!(merged.parts.iter().filter(|part| part.defines).count() <= 1);
    }
}
