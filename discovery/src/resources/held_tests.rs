use std::time::Duration;

use super::*;
use crate::fake;

fn policy(name: &str) -> Record {
    fake::resources(name, &fake::allowing("payments.shop", name))
}

fn listed(store: &str, position: u64, names: &[&str]) -> News {
    let epoch = Epoch { store: store.into(), position };
    let records = names.iter().map(|name| policy(name)).collect();
    News::Listed { prefix: "".into(), epoch, records, refused: vec![] }
}

fn changed(position: u64, changes: Vec<Change>) -> News {
    News::Changed { prefix: "".into(), position, changes }
}

fn removed(names: &[&str]) -> Vec<Change> {
    names.iter().map(|name| Change::Removed((*name).into())).collect()
}

fn refusal(key: &str, meanwhile: Option<Record>) -> Refusal {
    Refusal { key: key.into(), problems: vec![format!("{key}: bad")], meanwhile }
}

/// What stands for a policy of a service that cannot be understood.
fn unclear(name: &str) -> Record {
    let text = fake::allowing("payments.shop", name).replace("rules", "rulez");
    let [document] = &crate::resources::read(&text, &fake::trust_domain())[..] else { panic!("one document") };
    let resources = document.meanwhile(document.id.as_ref().unwrap()).into_iter().collect();
    Record { key: name.into(), origin: name.into(), resources }
}

struct Fixture {
    held: HeldResources,
    now: Instant,
}

impl Fixture {
    fn new(names: &[&str]) -> Fixture {
        let mut fixture = Fixture { held: HeldResources::new(Belief::Guarded), now: Instant::now() };
        fixture.after(0, listed("one", 10, names));
        assert_eq!(fixture.names(), names);
        fixture
    }

    fn after(&mut self, seconds: u64, news: News) -> Touched {
        self.now += Duration::from_secs(seconds);
        self.held.apply(news, self.now)
    }

    fn names(&self) -> Vec<String> {
        self.held.records().map(|record| record.key.to_string()).collect()
    }
}

#[test]
fn a_minute_in_which_the_source_was_away_or_its_store_another_one_repeats_nothing() {
    for is_away in [true, false] {
        let mut fixture = Fixture::new(&["a", "b"]);
        fixture.after(1, listed("two", 1, &[]));
        let store = if is_away { "two" } else { "three" };
        if is_away {
            fixture.held.is_away(fixture.now + Duration::from_secs(50));
            fixture.now += Duration::from_secs(50);
        } else {
            fixture.after(50, listed(store, 1, &[]));
        }
        fixture.after(59, listed(store, 1, &[]));
        assert_eq!(fixture.names(), ["a", "b"]);
        fixture.after(1, listed(store, 1, &[]));
        assert!(fixture.names().is_empty());
    }
}

#[test]
fn a_store_that_answers_empty_or_was_put_back_takes_no_policy_away_until_it_has_said_so_for_a_minute() {
    for answer in [listed("one", 20, &[]), listed("two", 20, &["a"]), listed("one", 5, &["a"])] {
        let mut fixture = Fixture::new(&["a", "b", "c"]);
        assert!(fixture.after(1, answer.clone()).is_empty());
        assert_eq!(fixture.names(), ["a", "b", "c"]);
        let doubted = fixture.held.stale();
        assert!(doubted >= 2);
        fixture.after(59, answer.clone());
        assert_eq!(fixture.names().len(), 3);
        let touched = fixture.after(1, answer);
        assert_eq!((fixture.held.stale(), fixture.names().len(), touched.ids.len()), (0, 3 - doubted, doubted));
    }
}

#[test]
fn what_is_listed_again_is_doubted_no_more() {
    let mut fixture = Fixture::new(&["a", "b", "c"]);
    fixture.after(1, listed("one", 20, &[]));
    fixture.after(1, listed("one", 21, &["a", "b", "c"]));
    assert_eq!(fixture.held.stale(), 0);
    fixture.after(120, listed("one", 22, &["a", "b", "c"]));
    assert_eq!(fixture.names().len(), 3);
}

#[test]
fn one_document_removed_by_name_is_gone_at_once_also_the_last_and_many_are_not() {
    let mut fixture = Fixture::new(&["a"]);
    let touched = fixture.after(1, changed(11, removed(&["a"])));
    assert!(fixture.names().is_empty() && touched.targets.contains(&Target::Service("payments.shop".parse().unwrap())));
    let mut fixture = Fixture::new(&["a", "b", "c"]);
    fixture.after(1, changed(11, removed(&["a", "b", "c"])));
    assert_eq!((fixture.names().len(), fixture.held.stale()), (3, 3));
    // Nor one after the other.
    let mut fixture = Fixture::new(&["a", "b", "c"]);
    for (n, name) in ["a", "b", "c"].into_iter().enumerate() {
        fixture.after(1, changed(11 + n as u64, removed(&[name])));
    }
    assert_eq!((fixture.names().len(), fixture.held.stale()), (2, 2));
}

#[test]
fn an_operator_can_say_that_what_is_doubted_is_gone() {
    let mut fixture = Fixture::new(&["a", "b", "c"]);
    fixture.after(1, listed("one", 20, &[]));
    assert_eq!(fixture.held.accept_losses().ids.len(), 3);
    assert_eq!((fixture.names().len(), fixture.held.stale(), fixture.held.len()), (0, 0, 0));
}

#[test]
fn a_bad_version_leaves_the_good_one_in_force_and_is_told() {
    let mut fixture = Fixture::new(&["a", "b"]);
    let refused = || refusal("a", None);
    assert!(fixture.after(1, changed(11, vec![Change::Refused(refused())])).is_empty());
    assert_eq!(
        (fixture.names().len(), fixture.held.refused().map(String::as_str).collect::<Vec<_>>()),
        (2, vec!["a: bad"])
    );
    let News::Listed { prefix, epoch, records, .. } = listed("one", 12, &["b"]) else { unreachable!() };
    fixture.after(1, News::Listed { prefix, epoch, records, refused: vec![refused()] });
    assert_eq!((fixture.names().len(), fixture.held.stale()), (2, 0));
    fixture.after(1, changed(13, vec![Change::Set(policy("a"))]));
    assert_eq!(fixture.held.refused().count(), 0);
}

#[test]
fn what_an_earlier_life_knew_is_there_and_a_list_of_another_life_of_the_store_is_doubted() {
    let mut held = HeldResources::new(Belief::Guarded);
    let epoch = Epoch { store: "one".into(), position: 10 };
    let touched = held.restore(vec![("".into(), epoch)], vec![policy("a"), policy("b")]);
    assert_eq!((touched.ids.len(), held.len()), (2, 2));
    held.apply(listed("two", 1, &[]), Instant::now());
    assert_eq!((held.len(), held.stale()), (2, 2));
    assert_eq!(
        held.settled().map(|(_, epoch)| &*epoch.store).collect::<Vec<_>>(),
        ["one"],
        "the doubt outlives a restart"
    );
}

#[test]
fn the_operators_own_files_are_believed_at_once() {
    let mut held = HeldResources::new(Belief::Always);
    held.apply(listed("", 0, &["a", "b"]), Instant::now());
    held.apply(listed("", 0, &[]), Instant::now());
    assert_eq!((held.len(), held.stale()), (0, 0));
}

#[test]
fn lists_of_two_prefixes_leave_each_other_alone() {
    let mut fixture = Fixture::new(&[]);
    let of = |prefix: &str, keys: &[&str]| News::Listed {
        prefix: prefix.into(),
        epoch: Epoch { store: "one".into(), position: 1 },
        records: keys.iter().map(|key| fake::resources(key, &fake::allowing("payments.shop", &key[2..]))).collect(),
        refused: vec![],
    };
    fixture.after(0, of("a/", &["a/x", "a/y", "a/z"]));
    fixture.after(0, of("b/", &["b/v", "b/w"]));
    fixture.after(1, of("a/", &["a/x", "a/y"]));
    assert_eq!(fixture.names(), ["a/x", "a/y", "b/v", "b/w"]);
}

#[test]
fn much_of_one_prefix_or_kind_does_not_hide_that_all_of_another_went() {
    let route = |key: &str| {
        let text = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: { name: NAME, namespace: shop }\nspec: { \
                    parentRefs: [ { group: \"\", kind: Service, name: web } ], rules: [ { backendRefs: [ { name: web } ] } ] }\n";
        fake::resources(key, &text.replace("NAME", &key.replace('/', "-")))
    };
    let names = |prefix: &str| (0..20).map(|n| format!("{prefix}r{n}")).collect::<Vec<_>>();
    for (policies, routes) in [("a/", "b/"), ("", "")] {
        let of = |prefix: &str, records: &[Record]| {
            let epoch = Epoch { store: "one".into(), position: 11 };
            News::Listed { prefix: prefix.into(), epoch, records: records.to_vec(), refused: vec![] }
        };
        let many: Vec<_> = names(routes).iter().map(|key| route(key)).collect();
        let few = ["p", "q", "s"]
            .map(|name| fake::resources(&format!("{policies}{name}"), &fake::allowing("payments.shop", name)));
        let mut fixture = Fixture::new(&[]);
        fixture.after(0, of(routes, &many));
        let (before, after) =
            if policies == routes { ([&many[..], &few].concat(), many.clone()) } else { (few.to_vec(), vec![]) };
        fixture.after(0, of(policies, &before));
        assert_eq!(fixture.held.len(), 23);
        assert!(fixture.after(1, of(policies, &after)).is_empty());
        assert_eq!((fixture.held.len(), fixture.held.stale()), (23, 3));
    }
}

#[test]
fn a_loss_is_doubted_where_no_earlier_list_is_known() {
    let mut held = HeldResources::new(Belief::Guarded);
    held.restore(vec![], vec![policy("a"), policy("b"), policy("c")]);
    held.apply(listed("one", 1, &["a", "b"]), Instant::now());
    assert_eq!((held.len(), held.stale()), (3, 1));
}

#[test]
fn what_was_never_good_stands_for_itself_until_it_is_and_is_doubted_like_the_rest_when_it_goes() {
    let mut fixture = Fixture::new(&["b"]);
    let target = Target::Service("payments.shop".parse().unwrap());
    let touched = fixture.after(1, changed(11, vec![Change::Refused(refusal("a", Some(unclear("a"))))]));
    assert!(touched.targets.contains(&target) && fixture.held.unclear().count() == 1);
    assert_eq!((fixture.held.len(), fixture.held.count_refused()), (1, 1));
    // An answer of nothing takes neither away.
    fixture.after(1, listed("one", 12, &[]));
    assert_eq!((fixture.held.unclear().count(), fixture.held.stale()), (1, 2));
    let records: Vec<Record> = fixture.held.records().cloned().collect();
    let saved: Vec<Record> = serde_json::from_str(&serde_json::to_string(&records).unwrap()).unwrap();
    let mut restarted = HeldResources::new(Belief::Guarded);
    restarted.restore(vec![], saved);
    assert_eq!((restarted.unclear().count(), restarted.len()), (1, 1));
    fixture.after(1, changed(13, vec![Change::Set(policy("a"))]));
    assert_eq!((fixture.held.unclear().count(), fixture.held.count_refused()), (0, 0));
    assert!(fixture.held.get(&policy("a").resources[0].id()).is_some());
}

#[test]
fn what_was_good_is_not_replaced_by_what_stands_for_a_bad_one() {
    let mut fixture = Fixture::new(&["a"]);
    fixture.after(1, changed(11, vec![Change::Refused(refusal("a", Some(unclear("a"))))]));
    assert_eq!((fixture.held.unclear().count(), fixture.held.len()), (0, 1));
    let News::Listed { prefix, epoch, records, .. } = listed("one", 12, &[]) else { unreachable!() };
    fixture.after(1, News::Listed { prefix, epoch, records, refused: vec![refusal("a", Some(unclear("a")))] });
    assert_eq!((fixture.held.unclear().count(), fixture.held.len(), fixture.held.stale()), (0, 1, 0));
}

#[test]
fn a_document_that_says_it_is_a_trial_closes_nothing_any_more() {
    let mut fixture = Fixture::new(&[]);
    fixture.after(1, changed(11, vec![Change::Refused(refusal("a", Some(unclear("a"))))]));
    fixture.after(1, changed(12, vec![Change::Refused(refusal("a", None))]));
    assert_eq!((fixture.names(), fixture.held.count_refused()), (vec![], 1));
}
