use std::time::Duration;

use serde_json::json;

use super::super::read::BASE;
use super::*;
use crate::fake::trust_domain;

struct Bed {
    known: Known,
    now: Instant,
    index: u64,
}

fn shop(name: &str) -> Scope {
    Scope::Service(format!("{name}.shop").parse().unwrap())
}

fn instances(name: &str) -> Query {
    Query::Instances(name.into())
}

fn documents() -> Query {
    Query::Documents(Some("shop".into()))
}

fn entry(service: &str, id: u8, meta: &serde_json::Value) -> Bytes {
    let entry = json!({
        "Node": { "Node": format!("node-{id}"), "Address": format!("10.0.0.{id}") },
        "Service": { "ID": format!("{service}-{id}"), "Service": service, "Port": 80, "Meta": meta },
    });
    entry.to_string().into()
}

/// On the mesh.
fn entries(service: &str, ids: &[u8]) -> Content {
    let meta = json!({ "meshd-transport": "meshd" });
    Content::Instances(ids.iter().map(|id| entry(service, *id, &meta)).collect())
}

fn document(service: &str, modified: u64) -> Pair {
    let text = format!(
        "{{apiVersion: meshd.dev/v1alpha1, kind: MeshService, metadata: {{name: {service}, namespace: shop}}, spec: {{ports: \
         [{{port: 80}}]}}}}"
    );
    Pair { key: format!("{BASE}/shop/{service}/service"), modified, value: text.into_bytes() }
}

impl Bed {
    fn wanting(services: &[&str]) -> Bed {
        let services = services.iter().map(|name| name.parse().unwrap()).collect();
        Bed::begun(&Wanted { services, ..Wanted::default() })
    }

    fn begun(wanted: &Wanted) -> Bed {
        let reading =
            Reading { trust_domain: trust_domain(), namespace: "shop".into(), base: BASE.into(), resources: None };
        let mut bed = Bed { known: Known::new(reading), now: Instant::now(), index: 10 };
        bed.known.meets(Some(&"one".into()), bed.now);
        bed.known.adjust(wanted, bed.now);
        bed
    }

    fn take(&mut self, query: &Query, content: Content) -> Vec<SourceEvent> {
        self.index += 1;
        self.take_at(query, content, self.index)
    }

    fn take_at(&mut self, query: &Query, content: Content, index: u64) -> Vec<SourceEvent> {
        self.now += Duration::from_millis(1);
        self.known.take(query, Answer { index, content }, self.now).unwrap()
    }
}

/// Scope, position and keys of the records of a list.
fn listed(events: &[SourceEvent]) -> (Scope, u64, Vec<&str>) {
    match events {
        [SourceEvent::Listed(listing)] => {
            let keys = listing.records.iter().map(|record| &*record.key).collect();
            (listing.scope.clone(), listing.epoch.position, keys)
        }
        other => panic!("{other:?}"),
    }
}

fn changed(events: &[SourceEvent]) -> Vec<String> {
    let [SourceEvent::Changed { changes, .. }] = events else { panic!("{events:?}") };
    let shown = |change: &Change| match change {
        Change::Set(record) => format!("set {}", record.key),
        Change::Removed(key) => format!("removed {key}"),
        Change::Refused(refused) => format!("refused {}", refused.key),
    };
    changes.iter().map(shown).collect()
}

#[test]
fn a_service_is_listed_once_documents_and_instances_were_read_and_then_told_by_what_changes() {
    let mut bed = Bed::wanting(&["a.shop"]);
    assert_eq!(bed.known.queries(), BTreeSet::from([documents(), instances("a")]));
    assert_eq!(bed.take(&instances("a"), entries("a", &[1, 2])), []);
    assert!(!bed.known.is_whole());
    let events = bed.take(&documents(), Content::Documents(vec![document("a", 5), document("b", 5)]));
    let keys = vec!["catalog:a.shop/node-1/a-1", "catalog:a.shop/node-2/a-2", "meshd-discovery/v1/shop/a/service"];
    assert_eq!(listed(&events), (shop("a"), 11, keys), "of the catalog alone");
    assert!(bed.known.is_whole());
    let events = bed.take(&instances("a"), entries("a", &[2, 3]));
    assert_eq!(changed(&events), ["removed catalog:a.shop/node-1/a-1", "set catalog:a.shop/node-3/a-3"]);
    assert_eq!(bed.take(&instances("a"), entries("a", &[2, 3])), [], "the same again");
    let events = bed.take(&documents(), Content::Documents(vec![]));
    assert_eq!(changed(&events), ["removed meshd-discovery/v1/shop/a/service"]);
}

#[test]
fn a_document_is_read_when_it_was_written_and_a_bad_one_is_refused_under_its_key() {
    let mut bed = Bed::wanting(&["a.shop"]);
    bed.take(&instances("a"), entries("a", &[]));
    bed.take(&documents(), Content::Documents(vec![document("a", 5)]));
    let unread = Pair { value: b"kind: [".to_vec(), ..document("a", 5) };
    assert_eq!(bed.take(&documents(), Content::Documents(vec![unread.clone()])), []);
    let events = bed.take(&documents(), Content::Documents(vec![Pair { modified: 6, ..unread }]));
    assert_eq!(changed(&events), ["refused meshd-discovery/v1/shop/a/service"]);
}

#[test]
fn everything_is_listed_once_each_name_was_read_and_a_name_that_goes_takes_its_instances() {
    let mut bed = Bed::begun(&Wanted { everything: true, ..Wanted::default() });
    bed.take(&Query::Documents(None), Content::Documents(vec![]));
    assert_eq!(bed.take(&Query::Names, Content::Names(vec!["a".into(), "b".into()])), []);
    assert_eq!(bed.known.queries().len(), 4);
    let events = bed.take(&instances("a"), entries("a", &[1]));
    assert_eq!(changed(&events), ["set catalog:a.shop/node-1/a-1"], "what is there does not wait");
    assert!(matches!(&events[..], [SourceEvent::Changed { position: 0, .. }]));
    let events = bed.take(&instances("b"), entries("b", &[2]));
    assert_eq!(
        listed(&events),
        (Scope::Everything, 14, vec!["catalog:a.shop/node-1/a-1", "catalog:b.shop/node-2/b-2"])
    );
    assert_eq!(bed.take(&Query::Names, Content::Names(vec!["a".into(), "b".into(), "c".into()])), []);
    assert_eq!(changed(&bed.take(&instances("c"), entries("c", &[3]))), ["set catalog:c.shop/node-3/c-3"]);
    let events = bed.take(&Query::Names, Content::Names(vec!["a".into(), "c".into()]));
    assert_eq!(changed(&events), ["removed catalog:b.shop/node-2/b-2"]);
    assert_eq!(bed.take(&instances("b"), entries("b", &[2])), [], "an answer that was on its way");
}

#[test]
fn one_query_serves_the_namespaces_of_a_name_and_each_gets_its_own() {
    let mut bed = Bed::wanting(&["a.shop", "a.billing"]);
    assert_eq!(bed.known.queries().len(), 3);
    bed.take(&documents(), Content::Documents(vec![]));
    bed.take(&Query::Documents(Some("billing".into())), Content::Documents(vec![]));
    let billing = entry("a", 2, &json!({ "meshd-transport": "meshd", "meshd-namespace": "billing" }));
    let Content::Instances(mut both) = entries("a", &[1]) else { panic!("no instances") };
    both.push(billing);
    let events = bed.take(&instances("a"), Content::Instances(both));
    let keys = |event: &SourceEvent| listed(std::slice::from_ref(event)).2.join(" ");
    assert_eq!(
        events.iter().map(keys).collect::<Vec<_>>(),
        ["catalog:a.billing/node-2/a-2", "catalog:a.shop/node-1/a-1"]
    );
}

#[test]
fn an_instance_that_knows_nothing_of_the_mesh_counts_where_somebody_named_its_service() {
    let plain = || Content::Instances(vec![entry("a", 1, &json!({}))]);
    let mut bed = Bed::begun(&Wanted { everything: true, ..Wanted::default() });
    bed.take(&Query::Documents(None), Content::Documents(vec![]));
    bed.take(&Query::Names, Content::Names(vec!["a".into()]));
    assert_eq!(listed(&bed.take(&instances("a"), plain())).2, Vec::<&str>::new());
    let events = bed.take(&Query::Documents(None), Content::Documents(vec![document("a", 5)]));
    assert_eq!(changed(&events), ["set catalog:a.shop/node-1/a-1", "set meshd-discovery/v1/shop/a/service"]);
    let mut bed = Bed::wanting(&["a.shop"]);
    bed.take(&documents(), Content::Documents(vec![]));
    assert_eq!(listed(&bed.take(&instances("a"), plain())).2, ["catalog:a.shop/node-1/a-1"]);
}

#[test]
fn the_earlier_of_two_answers_changes_nothing_when_it_comes_last() {
    let mut bed = Bed::wanting(&["a.shop"]);
    bed.take(&documents(), Content::Documents(vec![]));
    bed.take_at(&instances("a"), entries("a", &[1]), 20);
    assert_eq!(bed.take_at(&instances("a"), entries("a", &[2]), 19), []);
    assert_eq!(bed.known.index(&instances("a")), 20);
}

#[test]
fn a_resync_lists_what_was_read_since_and_names_what_is_overdue() {
    let mut bed = Bed::wanting(&["a.shop"]);
    bed.take(&documents(), Content::Documents(vec![]));
    bed.take_at(&instances("a"), entries("a", &[1]), 20);
    assert!(bed.known.overdue().is_empty());
    bed.now += Duration::from_secs(1);
    bed.known.resync(bed.now);
    assert_eq!(bed.known.overdue(), BTreeSet::from([documents(), instances("a")]));
    assert_eq!(bed.take_at(&instances("a"), entries("a", &[1]), 20), []);
    assert_eq!(bed.known.overdue(), BTreeSet::from([documents()]));
    assert_eq!(
        listed(&bed.take(&documents(), Content::Documents(vec![]))),
        (shop("a"), 20, vec!["catalog:a.shop/node-1/a-1"])
    );
}

#[test]
fn another_cluster_is_read_whole_before_anything_is_told_of_it() {
    let mut bed = Bed::wanting(&["a.shop"]);
    bed.take(&documents(), Content::Documents(vec![]));
    bed.take_at(&instances("a"), entries("a", &[1]), 500);
    assert!(bed.known.meets(Some(&"one".into()), bed.now));
    assert!(!bed.known.meets(Some(&"two".into()), bed.now));
    assert_eq!(bed.take_at(&instances("a"), entries("a", &[]), 18), []);
    let events = bed.take_at(&documents(), Content::Documents(vec![]), 1);
    let [SourceEvent::Listed(listing)] = &events[..] else { panic!("{events:?}") };
    assert_eq!(listing.epoch, Epoch { store: "two".into(), position: 18 });
}

#[test]
fn what_is_wanted_later_is_listed_from_documents_read_since() {
    let mut bed = Bed::wanting(&["a.shop"]);
    let both = || Content::Documents(vec![document("a", 5), document("b", 5)]);
    bed.take(&documents(), both());
    bed.take(&instances("a"), entries("a", &[1]));
    bed.now += Duration::from_secs(1);
    let services = ["a.shop", "b.shop"].iter().map(|name| name.parse().unwrap()).collect();
    assert!(!bed.known.adjust(&Wanted { services, ..Wanted::default() }, bed.now));
    assert_eq!(bed.known.overdue(), BTreeSet::from([documents()]));
    bed.take(&instances("b"), entries("b", &[2]));
    let events = bed.take_at(&documents(), both(), 11);
    assert_eq!(listed(&events).2, ["catalog:b.shop/node-2/b-2", "meshd-discovery/v1/shop/b/service"]);
    let services = ["b.shop"].iter().map(|name| name.parse().unwrap()).collect();
    assert!(bed.known.adjust(&Wanted { services, ..Wanted::default() }, bed.now));
    assert_eq!(bed.take(&instances("a"), entries("a", &[])), []);
    assert_eq!(bed.known.documents.len() + bed.known.instances.len(), 2);
}

/// Keys that are held, and stale ones, after an instance was of `shop` and is of `billing`, and the other way round.
fn held_when_it_moves(wanted: &Wanted) -> Vec<Vec<String>> {
    let of = |namespace: &str| {
        let meta = json!({ "meshd-transport": "meshd", "meshd-namespace": namespace });
        let others = entries("a", &[2, 3, 4]);
        let Content::Instances(mut all) = others else { panic!("no instances") };
        all.push(entry("a", 1, &meta));
        Content::Instances(all)
    };
    let mut held = crate::held::Held::new(crate::belief::Belief::Guarded);
    let mut bed = Bed::begun(wanted);
    let mut seen = Vec::new();
    for of in [None, Some("shop".into()), Some("billing".into())] {
        bed.take(&Query::Documents(of), Content::Documents(vec![]));
    }
    bed.take(&Query::Names, Content::Names(vec!["a".into()]));
    for namespace in ["shop", "billing", "shop", "not a label", "billing"] {
        let events = bed.take(&instances("a"), of(namespace));
        let moved = events.into_iter().flat_map(|event| held.apply(event, bed.now)).collect::<BTreeSet<_>>();
        assert!(namespace == "not a label" || moved.contains("a.shop"), "{namespace}: {moved:?}");
        let keys = held.entries().map(|entry| entry.record.key.to_string());
        seen.push(keys.filter(|key| key.ends_with("a-1")).collect());
    }
    seen
}

#[test]
fn an_instance_that_moves_to_another_namespace_is_there_and_nowhere_else() {
    let (shop, billing) = ("catalog:a.shop/node-1/a-1", "catalog:a.billing/node-1/a-1");
    let expected = [[shop], [billing], [shop], [shop], [billing]];
    let services = ["a.shop", "a.billing"].iter().map(|name| name.parse().unwrap()).collect();
    assert_eq!(held_when_it_moves(&Wanted { services, ..Wanted::default() }), expected);
    assert_eq!(held_when_it_moves(&Wanted { everything: true, ..Wanted::default() }), expected);
}

#[test]
fn documents_are_followed_by_namespace_and_those_of_one_say_nothing_of_another() {
    let mut bed = Bed::wanting(&["a.shop", "a.billing"]);
    let billing = Query::Documents(Some("billing".into()));
    assert_eq!(bed.known.queries(), BTreeSet::from([documents(), billing.clone(), instances("a")]));
    bed.take(&instances("a"), entries("a", &[]));
    let of_shop = bed.take(&documents(), Content::Documents(vec![document("a", 5)]));
    assert_eq!(listed(&of_shop).0, shop("a"), "it does not wait for the other namespace");
    bed.take(&billing, Content::Documents(vec![]));
    assert_eq!(bed.take(&billing, Content::Documents(vec![])), []);
    assert_eq!(bed.known.documents.len(), 1);
    let mut bed = Bed::begun(&Wanted { namespaces: BTreeSet::from(["shop".to_owned()]), ..Wanted::default() });
    assert_eq!(bed.known.queries(), BTreeSet::from([documents(), Query::Names]));
    assert!(bed.known.adjust(&Wanted { everything: true, ..Wanted::default() }, bed.now));
    assert_eq!(bed.known.queries(), BTreeSet::from([Query::Documents(None), Query::Names]));
}

#[test]
fn what_was_said_of_an_instance_before_is_not_understood_again_and_its_end_is_seen() {
    let mut bed = Bed::wanting(&["a.shop"]);
    bed.take(&documents(), Content::Documents(vec![]));
    bed.take(&instances("a"), entries("a", &[1, 2]));
    let said = |bed: &Bed, at: &str| {
        let known = bed.known.instances["a"].iter().find(|known| known.instance.at() == at).unwrap();
        known.instance.said.clone()
    };
    let before = said(&bed, "node-2/a-2");
    assert_eq!(
        changed(&bed.take(&instances("a"), entries("a", &[3, 2]))),
        ["removed catalog:a.shop/node-1/a-1", "set catalog:a.shop/node-3/a-3"]
    );
    assert!(Arc::ptr_eq(&before, &said(&bed, "node-2/a-2")));
}

#[test]
fn an_answer_with_an_entry_that_has_no_name_changes_nothing() {
    let mut bed = Bed::wanting(&["a.shop"]);
    bed.take(&documents(), Content::Documents(vec![]));
    bed.take(&instances("a"), entries("a", &[1]));
    let odd = Answer { index: 50, content: Content::Instances(vec![Bytes::from_static(b"{}")]) };
    let error = bed.known.take(&instances("a"), odd, bed.now).unwrap_err().to_string();
    assert!(error.contains("service `a` cannot be understood"), "{error}");
    assert_eq!(bed.known.index(&instances("a")), 12);
    bed.known.resync(bed.now + Duration::from_secs(1));
    assert_eq!(bed.known.overdue(), BTreeSet::from([documents()]), "to ask again would not help");
    assert_eq!(changed(&bed.take_at(&instances("a"), entries("a", &[]), 51)), ["removed catalog:a.shop/node-1/a-1"]);
}
