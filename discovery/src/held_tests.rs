use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::belief::REPEATED_FOR;
use crate::fake;

fn held() -> Held {
    Held::new(Belief::Guarded)
}

fn listing(position: u64, records: Vec<Record>) -> SourceEvent {
    of_store("one", position, records)
}

fn of_store(store: &str, position: u64, records: Vec<Record>) -> SourceEvent {
    let epoch = Epoch { store: store.into(), position };
    SourceEvent::Listed(Listing { scope: Scope::Everything, epoch, records, refused: vec![] })
}

fn changed(change: Change) -> SourceEvent {
    SourceEvent::Changed { scope: Scope::Everything, position: 9, changes: vec![change] }
}

/// `a.shop` to the `count`th letter, each with a place.
fn services(count: u8) -> Vec<Record> {
    (0..count).map(|n| fake::record(&format!("{}.shop", char::from(b'a' + n)), &[&format!("10.0.0.{n}")])).collect()
}

/// Places, and stale ones.
fn counts(held: &Held) -> (usize, usize) {
    let places = held.entries().map(|entry| entry.record.places.len()).sum();
    (places, held.entries().map(|entry| entry.stale.len()).sum())
}

#[test]
fn a_service_that_goes_while_most_stay_is_gone_at_once() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(1, services(4)), now);
    let touched = held.apply(changed(Change::Removed("d.shop".into())), now);
    assert_eq!(touched.iter().map(ServiceName::as_str).collect::<Vec<_>>(), ["d.shop"]);
    assert_eq!((counts(&held), held.entries().count()), ((3, 0), 3));
}

#[test]
fn a_list_that_is_empty_takes_nothing_away_until_it_was_so_for_a_minute() {
    let (mut held, start) = (held(), Instant::now());
    held.apply(listing(1, services(4)), start);
    let touched = held.apply(listing(2, vec![]), start);
    assert_eq!((touched.len(), counts(&held)), (4, (0, 4)));
    assert!(held.apply(listing(3, vec![]), start + Duration::from_secs(59)).is_empty());
    assert_eq!(counts(&held), (0, 4));
    assert_eq!(held.apply(listing(4, vec![]), start + REPEATED_FOR).len(), 4);
    assert_eq!((counts(&held), held.entries().count()), ((0, 0), 0));
}

#[test]
fn a_minute_in_which_some_of_the_source_could_not_be_read_repeats_a_loss_of_the_rest() {
    let (mut held, start) = (held(), Instant::now());
    let at = |seconds| start + Duration::from_secs(seconds);
    held.apply(listing(1, services(4)), start);
    held.apply(listing(2, vec![]), start);
    held.apply(SourceEvent::Troubled { error: "forbidden".into() }, at(50));
    assert_eq!(held.apply(listing(3, vec![]), at(60)).len(), 4);
}

#[test]
fn a_minute_in_which_the_source_was_away_or_its_store_another_one_repeats_nothing() {
    let away = || SourceEvent::Unavailable { error: "away".into() };
    for broken_by in [away(), of_store("three", 1, vec![])] {
        let (mut held, start) = (held(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        held.apply(listing(1, services(4)), start);
        held.apply(of_store("two", 1, vec![]), start);
        held.apply(broken_by.clone(), at(50));
        let SourceEvent::Listed(broken) = broken_by else {
            held.apply(of_store("two", 2, vec![]), at(109));
            assert_eq!(counts(&held), (0, 4));
            assert_eq!(held.apply(of_store("two", 3, vec![]), at(110)).len(), 4);
            continue;
        };
        held.apply(SourceEvent::Listed(broken.clone()), at(109));
        assert_eq!(counts(&held), (0, 4));
        assert_eq!(held.apply(SourceEvent::Listed(broken), at(110)).len(), 4);
    }
}

/// One service of what is followed, read again.
fn reread(store: &str, position: u64, service: &str, records: Vec<Record>) -> SourceEvent {
    let (scope, epoch) = (Scope::Service(service.parse().unwrap()), Epoch { store: store.into(), position });
    SourceEvent::Reread { within: Scope::Everything, listing: Listing { scope, epoch, records, refused: vec![] } }
}

#[test]
fn a_service_that_is_read_again_is_compared_with_the_whole_it_is_of_and_says_nothing_of_the_rest() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(10, services(4)), now);
    let moved = fake::record("a.shop", &["10.0.9.9"]);
    held.apply(reread("one", 20, "a.shop", vec![moved]), now);
    assert_eq!(counts(&held), (4, 0));
    held.apply(reread("one", 21, "b.shop", vec![]), now);
    assert_eq!((counts(&held), held.entries().count()), ((3, 0), 3));
    // Of the past, or of another store: nothing of it is taken away.
    for old in [reread("one", 19, "c.shop", vec![]), reread("two", 30, "d.shop", vec![])] {
        held.apply(old, now);
    }
    assert_eq!(counts(&held), (1, 2));
    held.apply(listing(22, services(4)), now);
    assert_eq!(counts(&held), (4, 0));
    assert_eq!(
        held.settled().map(|(scope, epoch)| (scope, epoch.position)).collect::<Vec<_>>(),
        [(&Scope::Everything, 22)]
    );
}

#[test]
fn what_is_read_again_of_what_was_never_listed_says_nothing() {
    let mut held = held();
    assert!(held.apply(reread("one", 5, "a.shop", services(1)), Instant::now()).is_empty());
    assert_eq!(held.entries().count(), 0);
}

#[test]
fn what_comes_back_within_the_minute_is_as_if_it_had_never_been_away() {
    let (mut held, start) = (held(), Instant::now());
    held.apply(listing(1, services(4)), start);
    held.apply(listing(2, vec![]), start);
    held.apply(listing(3, services(4)), start + Duration::from_secs(30));
    assert_eq!(counts(&held), (4, 0));
    held.apply(listing(4, vec![]), start + Duration::from_secs(61));
    assert_eq!(counts(&held), (0, 4), "the minute begins anew");
}

#[test]
fn who_may_serve_stays_where_the_source_does_not_know_it_now() {
    let (mut held, now) = (held(), Instant::now());
    let nobody_known = || {
        let mut record = fake::record("a.shop", &[]);
        Arc::make_mut(record.definition.as_mut().unwrap()).identities.clear();
        record
    };
    let identities = |held: &Held| held.entries().next().unwrap().definition().unwrap().identities.clone();
    let known = fake::record("a.shop", &[]).definition.unwrap().identities.clone();
    held.restore(vec![], vec![fake::record("a.shop", &["10.0.0.1"])], now);
    held.apply(listing(1, vec![nobody_known()]), now);
    assert_eq!((identities(&held), counts(&held)), (known.clone(), (0, 1)), "after a restart");
    held.apply(changed(Change::Removed("a.shop".into())), now);
    held.apply(changed(Change::Set(nobody_known())), now);
    assert_eq!((identities(&held), counts(&held)), (known, (0, 1)), "after it was away");
}

#[test]
fn nothing_is_lost_to_a_store_that_was_put_back_or_is_another_one() {
    for other in [of_store("two", 99, services(3)), of_store("one", 4, services(3))] {
        let (mut held, start) = (held(), Instant::now());
        held.apply(listing(5, services(4)), start);
        held.apply(other.clone(), start);
        assert_eq!(counts(&held), (3, 1), "{other:?}");
        // The same store further on: the loss was doubted, and stays so for its minute.
        let SourceEvent::Listed(mut again) = other else { unreachable!() };
        again.epoch.position += 1;
        held.apply(SourceEvent::Listed(again.clone()), start + Duration::from_secs(1));
        assert_eq!(counts(&held), (3, 1));
        held.apply(SourceEvent::Listed(again), start + REPEATED_FOR);
        assert_eq!(counts(&held), (3, 0));
    }
}

#[test]
fn a_store_is_emptied_step_by_step_no_faster_than_at_once() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(1, services(10)), now);
    for record in services(10) {
        held.apply(changed(Change::Removed(record.key)), now);
    }
    assert_eq!(counts(&held), (0, 6));
}

#[test]
fn all_places_may_be_replaced_within_seconds() {
    let (mut held, start) = (held(), Instant::now());
    let with = |places: &[String]| fake::record("a.shop", &places.iter().map(String::as_str).collect::<Vec<_>>());
    let mut places: Vec<String> = (0..10).map(|n| format!("10.0.0.{n}")).collect();
    held.apply(listing(1, vec![with(&places)]), start);
    for n in 0..10 {
        places[n] = format!("10.0.1.{n}");
        held.apply(changed(Change::Set(with(&places))), start + Duration::from_secs(n as u64));
        assert_eq!(counts(&held), (10, 0));
    }
}

#[test]
fn a_record_that_shrinks_to_nothing_keeps_its_places_as_stale_ones() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(1, vec![fake::record("a.shop", &["10.0.0.1", "10.0.0.2"])]), now);
    held.apply(changed(Change::Set(fake::record("a.shop", &[]))), now);
    assert_eq!(counts(&held), (0, 2));
    let entry = held.of(&"a.shop".parse().unwrap()).next().unwrap();
    assert_eq!((entry.record.places.len(), entry.stale.len()), (0, 2));
}

#[test]
fn an_operator_can_accept_a_loss() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(1, services(2)), now);
    held.apply(listing(2, vec![]), now);
    assert_eq!(counts(&held), (0, 2));
    assert_eq!(held.accept_losses().len(), 2);
    assert_eq!((counts(&held), held.entries().count()), ((0, 0), 0));
}

#[test]
fn what_cannot_be_understood_keeps_what_its_key_said_before_and_says_so_until_it_can() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(1, services(1)), now);
    let refused = || Refused { key: "a.shop".into(), problems: vec!["line 3: no".into()] };
    held.apply(changed(Change::Refused(refused())), now);
    assert_eq!((counts(&held), held.problems().count()), ((1, 0), 1));
    let SourceEvent::Listed(mut list) = listing(2, vec![]) else { unreachable!() };
    list.refused = vec![refused()];
    held.apply(SourceEvent::Listed(list), now);
    assert_eq!((counts(&held), held.problems().count()), ((1, 0), 1));
    held.apply(changed(Change::Set(services(1).remove(0))), now);
    assert_eq!((counts(&held), held.problems().count()), ((1, 0), 0));
}

#[test]
fn what_nobody_wants_any_more_is_forgotten_and_the_rest_stays() {
    let (mut held, now) = (held(), Instant::now());
    for record in services(2) {
        let (scope, epoch) = (Scope::Service(record.service.clone()), Epoch::default());
        held.apply(SourceEvent::Listed(Listing { scope, epoch, records: vec![record], refused: vec![] }), now);
    }
    let wanted = Wanted { services: ["b.shop".parse().unwrap()].into(), ..Wanted::default() };
    held.apply(SourceEvent::Narrowed(wanted), now);
    assert_eq!((counts(&held), held.of(&"b.shop".parse().unwrap()).count()), ((1, 0), 1));
}

#[test]
fn what_an_earlier_life_knew_is_doubted_like_any_other_loss() {
    let (mut held, start) = (held(), Instant::now());
    let epoch = Epoch { store: "one".into(), position: 7 };
    held.restore(vec![(Scope::Everything, epoch)], services(3), start);
    assert_eq!(counts(&held), (3, 0));
    held.apply(listing(3, vec![]), start);
    assert_eq!(counts(&held), (0, 3));
}

#[test]
fn documents_without_places_do_not_all_go_at_once_either() {
    let (mut held, now) = (held(), Instant::now());
    let documents = || ["a.shop", "b.shop"].map(|name| fake::record(name, &[])).to_vec();
    held.apply(listing(1, documents()), now);
    held.apply(listing(2, vec![]), now);
    assert_eq!(held.entries().filter(|entry| entry.definition().is_some()).count(), 2);
    held.apply(listing(3, vec![]), now + REPEATED_FOR);
    assert_eq!(held.entries().count(), 0);
}

#[test]
fn another_store_is_another_one_for_each_scope() {
    let (mut held, now) = (held(), Instant::now());
    let of = |record: &Record, store: &str, records: Vec<Record>| {
        let (scope, epoch) = (Scope::Service(record.service.clone()), Epoch { store: store.into(), position: 7 });
        SourceEvent::Listed(Listing { scope, epoch, records, refused: vec![] })
    };
    for record in services(4) {
        held.apply(of(&record, "one", vec![record.clone()]), now);
    }
    for record in services(4).into_iter().take(2) {
        held.apply(of(&record, "two", vec![]), now);
    }
    assert_eq!(counts(&held), (2, 2));
}

#[test]
fn a_restart_does_not_end_a_doubt() {
    let (mut before, now) = (held(), Instant::now());
    before.apply(listing(5, services(5)), now);
    before.apply(of_store("two", 1, services(4)), now);
    assert_eq!(counts(&before), (4, 1));
    let epochs = before.settled().map(|(scope, epoch)| (scope.clone(), epoch.clone())).collect();
    let mut after = held();
    after.restore(epochs, services(5), now);
    after.apply(of_store("two", 2, services(4)), now);
    assert_eq!(counts(&after), (4, 1));
}

#[test]
fn what_is_doubted_and_comes_back_unreadable_is_there_as_it_was() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(1, services(1)), now);
    held.apply(listing(2, vec![]), now);
    assert_eq!(counts(&held), (0, 1));
    let SourceEvent::Listed(mut list) = listing(3, vec![]) else { unreachable!() };
    list.refused = vec![Refused { key: "a.shop".into(), problems: vec!["no".into()] }];
    held.apply(SourceEvent::Listed(list), now + REPEATED_FOR);
    assert_eq!((counts(&held), held.live(), held.stale()), ((1, 0), 2, 0));
}

#[derive(Debug, Clone)]
enum Step {
    List(Vec<u8>, bool),
    Set(u8, Vec<u8>),
    Remove(u8),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let places = || prop::collection::vec(0u8..6, 0..4);
    prop_oneof![
        (prop::collection::vec(0u8..5, 0..5), any::<bool>()).prop_map(|(services, same)| Step::List(services, same)),
        (0u8..5, places()).prop_map(|(service, places)| Step::Set(service, places)),
        (0u8..5).prop_map(Step::Remove),
        (0u64..90).prop_map(Step::Wait),
    ]
}

fn record(service: u8, mut places: Vec<u8>) -> Record {
    places.sort_unstable();
    places.dedup();
    let places: Vec<String> = places.iter().map(|n| format!("10.0.{service}.{n}")).collect();
    fake::record(&format!("s{service}.shop"), &places.iter().map(String::as_str).collect::<Vec<_>>())
}

proptest! {
    #[test]
    fn no_series_of_events_takes_most_places_within_a_minute(steps in prop::collection::vec(step(), 1..40)) {
        let (mut held, mut now, mut position) = (held(), Instant::now(), 0);
        // Everything there was, and when it was last said to be there.
        let mut last_minute: Vec<(Instant, usize)> = Vec::new();
        for step in steps {
            position += 1;
            match step {
                Step::List(mut services, same) => {
                    services.sort_unstable();
                    services.dedup();
                    let store = if same { "one" } else { "two" };
                    let records = services.into_iter().map(|service| record(service, vec![1, 2])).collect();
                    held.apply(of_store(store, position, records), now);
                }
                Step::Set(service, places) => { held.apply(changed(Change::Set(record(service, places))), now); }
                Step::Remove(service) => { held.apply(changed(Change::Removed(format!("s{service}.shop").into())), now); }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
            }
            let (live, stale) = (held.live(), held.stale());
            let there = |entry: &&Entry| entry.gone.is_none();
            let definitions = held.entries().filter(there).filter(|entry| entry.definition().is_some()).count();
            let gone = held.entries().filter(|entry| entry.gone.is_some() && entry.definition().is_some()).count();
            prop_assert_eq!((live, stale), (counts(&held).0 + definitions, counts(&held).1 + gone));
            last_minute.retain(|(at, _)| now.duration_since(*at) < REPEATED_FOR);
            let most = last_minute.iter().map(|(_, count)| *count).max().unwrap_or(0);
            prop_assert!((live + stale) * 2 >= most, "{} of {} are left", live + stale, most);
            last_minute.push((now, live));
        }
    }
}

#[test]
fn a_key_that_changes_its_service_changes_both_and_the_scope_it_left_takes_nothing_away() {
    let (mut held, now) = (held(), Instant::now());
    held.apply(listing(1, services(4)), now);
    let moved = Record { service: "e.shop".parse().unwrap(), ..fake::record("d.shop", &["10.0.0.3"]) };
    let touched = held.apply(changed(Change::Set(moved)), now);
    assert_eq!(touched.iter().map(ServiceName::as_str).collect::<Vec<_>>(), ["d.shop", "e.shop"]);
    let left = Scope::Service("d.shop".parse().unwrap());
    held.apply(
        SourceEvent::Changed { scope: left, position: 10, changes: vec![Change::Removed("d.shop".into())] },
        now,
    );
    assert_eq!(counts(&held), (4, 0));
}
