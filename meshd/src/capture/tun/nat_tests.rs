use std::collections::HashMap;
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

fn tuple(client: u16) -> Tuple<Ipv4Addr> {
    let client = End { address: Ipv4Addr::new(10, 0, 0, 1), port: client };
    Tuple { client, original: End { address: Ipv4Addr::new(240, 240, 0, 1), port: 80 } }
}

/// A connection opened and closed by both sides at `now`.
fn closed(table: &mut Table<Ipv4Addr>, tuple: Tuple<Ipv4Addr>, now: Seconds) -> u32 {
    let number = table.outward(tuple, Event::Opens, now).unwrap();
    table.outward(tuple, Event::EndsStream, now);
    table.inward(number, Event::EndsStream, now);
    number
}

#[test]
fn a_connection_keeps_its_number_and_its_answers_find_back() {
    let mut table = Table::new(8);
    let number = table.outward(tuple(1), Event::Opens, 0).unwrap();
    assert_eq!(table.inward(number, Event::Data, 0), Some(tuple(1)));
    assert_eq!(table.outward(tuple(1), Event::Data, 1), Some(number));
    assert_eq!(table.tuple(number), Some(tuple(1)));
    assert_ne!(table.outward(tuple(2), Event::Opens, 1), Some(number));
}

#[test]
fn only_a_first_packet_gets_a_number() {
    let mut table = Table::new(8);
    for event in [Event::Data, Event::EndsStream, Event::Resets] {
        assert_eq!(table.outward(tuple(1), event, 0), None);
    }
    assert_eq!(table.inward(0, Event::Data, 0), None);
    assert_eq!(table.len(), 0);
}

#[test]
fn an_open_connection_outlives_days_of_silence_and_one_that_never_answered_does_not() {
    let mut table = Table::new(8);
    let open = table.outward(tuple(1), Event::Opens, 0).unwrap();
    table.inward(open, Event::Data, 0);
    table.outward(tuple(1), Event::Data, 0);
    let unanswered = table.outward(tuple(2), Event::Opens, 0).unwrap();
    table.expire(OPENING - 1);
    assert_eq!(table.tuple(unanswered), Some(tuple(2)));
    table.expire(OPENING);
    assert_eq!(table.tuple(unanswered), None);
    table.expire(OPEN - 1);
    assert_eq!(table.tuple(open), Some(tuple(1)));
    table.outward(tuple(1), Event::Data, OPEN - 1);
    table.expire(OPEN + 1);
    assert_eq!(table.tuple(open), Some(tuple(1)), "a packet starts the time anew");
    table.expire(2 * OPEN);
    assert_eq!(table.tuple(open), None);
}

#[test]
fn a_half_closed_connection_stays_open() {
    let mut table = Table::new(8);
    let number = table.outward(tuple(1), Event::Opens, 0).unwrap();
    table.outward(tuple(1), Event::EndsStream, 0);
    table.expire(OPEN - 1);
    assert_eq!(table.inward(number, Event::Data, OPEN - 1), Some(tuple(1)));
}

#[test]
fn a_number_rests_while_an_end_may_be_in_time_wait() {
    let mut table = Table::new(8);
    let number = closed(&mut table, tuple(1), 0);
    let reset = table.outward(tuple(2), Event::Opens, 0).unwrap();
    table.outward(tuple(2), Event::Resets, 0);
    for at in [0, CLOSED - 1] {
        let other = table.outward(tuple(10 + at as u16), Event::Opens, at).unwrap();
        assert!(other != number && other != reset);
    }
    assert_eq!(table.inward(number, Event::Data, CLOSED - 1), Some(tuple(1)), "a repeated FIN is still passed on");
    table.expire(CLOSED);
    assert_eq!(table.tuple(reset), None);
    assert_eq!(table.tuple(number), Some(tuple(1)), "and makes it rest longer");
    assert_eq!(table.outward(tuple(3), Event::Opens, CLOSED), Some(reset), "what rested longest is taken first");
}

#[test]
fn an_application_port_used_again_starts_over_with_the_same_number() {
    let mut table = Table::new(8);
    let number = closed(&mut table, tuple(1), 0);
    assert_eq!(table.outward(tuple(1), Event::Opens, 5), Some(number));
    table.outward(tuple(1), Event::Data, 5);
    table.outward(tuple(1), Event::EndsStream, 5);
    table.expire(5 + CLOSED);
    assert_eq!(table.tuple(number), Some(tuple(1)), "one side only has ended the new connection");
}

#[test]
fn a_tuple_used_again_is_not_the_ones_who_opened_it_before() {
    let owner = |uid| Some(RecordedOwner { uid, cgroup: None });
    let mut table = Table::new(8);
    table.opened_by(&tuple(1), owner(7));
    assert_eq!(table.owner(&tuple(1)), None, "of a connection nobody knows nothing is remembered");
    closed(&mut table, tuple(1), 0);
    table.opened_by(&tuple(1), owner(7));
    assert_eq!((table.owner(&tuple(1)), table.owner(&tuple(2))), (owner(7), None));
    table.outward(tuple(1), Event::Opens, 1);
    table.opened_by(&tuple(1), None);
    assert_eq!(table.owner(&tuple(1)), None);
    table.opened_by(&tuple(1), owner(8));
    table.expire(1 + OPENING);
    assert_eq!(table.owner(&tuple(1)), None, "forgotten with its connection");
    table.outward(tuple(2), Event::Opens, 2 + OPENING);
    assert_eq!(table.owner(&tuple(2)), None, "whoever has its number next starts from nothing");
}

#[test]
fn full_of_open_connections_refuses_another_one() {
    let mut table = Table::new(2);
    for client in [1, 2] {
        table.outward(tuple(client), Event::Opens, 0).unwrap();
        table.outward(tuple(client), Event::Data, 0);
    }
    assert_eq!(table.outward(tuple(3), Event::Opens, OPENING), None);
    assert_eq!(table.len(), 2);
    assert!(table.outward(tuple(1), Event::Data, OPENING).is_some(), "those under way go on");
}

#[test]
fn full_of_closed_connections_shortens_their_rest_but_not_below_what_workers_need() {
    let mut table = Table::new(2);
    let first = closed(&mut table, tuple(1), 0);
    closed(&mut table, tuple(2), 1);
    assert_eq!(table.outward(tuple(3), Event::Opens, CLOSED_UNDER_PRESSURE - 1), None);
    assert_eq!(table.outward(tuple(3), Event::Opens, CLOSED_UNDER_PRESSURE), Some(first));
    assert_eq!(table.outward(tuple(1), Event::Data, CLOSED_UNDER_PRESSURE), None, "the old one is forgotten");
}

#[test]
fn a_first_packet_said_again_is_counted_and_keeps_its_number() {
    let mut table = Table::new(8);
    let number = table.outward(tuple(1), Event::Opens, 0);
    assert_eq!(table.repeated(), 0);
    assert_eq!(table.outward(tuple(1), Event::Opens, 1), number);
    assert_eq!(table.repeated(), 1);
    table.outward(tuple(1), Event::Resets, 2);
    table.outward(tuple(1), Event::Opens, 3);
    assert_eq!(table.repeated(), 1, "the same port for another connection is not the same packet again");
}

#[test]
fn it_is_known_when_to_look_again() {
    let mut table = Table::new(8);
    assert_eq!(table.next_expiry(0), None);
    let number = table.outward(tuple(1), Event::Opens, 0).unwrap();
    assert_eq!(table.next_expiry(10), Some(OPENING - 10));
    table.outward(tuple(1), Event::Data, 10);
    assert_eq!(table.next_expiry(10), Some(OPEN));
    table.inward(number, Event::Resets, 20);
    assert_eq!(table.next_expiry(20), Some(CLOSED));
    table.expire(20 + CLOSED);
    assert_eq!(table.next_expiry(20 + CLOSED), None);
}

#[derive(Clone, Debug)]
enum Step {
    Outward(u16, Event),
    Inward(u32, Event),
    Wait(Seconds),
}

fn step() -> impl Strategy<Value = Step> {
    let event = || prop_oneof![Just(Event::Opens), Just(Event::Data), Just(Event::EndsStream), Just(Event::Resets)];
    prop_oneof![
        4 => (0..12_u16, event()).prop_map(|(client, event)| Step::Outward(client, event)),
        3 => (0..8_u32, event()).prop_map(|(number, event)| Step::Inward(number, event)),
        1 => prop_oneof![0..CLOSED, Just(OPEN)].prop_map(Step::Wait),
    ]
}

/// Every mapping is in exactly one queue, queues are in the order of last touch, and both ways to find it agree.
fn check(table: &Table<Ipv4Addr>, capacity: u32) {
    let mut queued = 0;
    for stage in [Stage::Opening, Stage::Open, Stage::Closed, Stage::Free] {
        let (mut at, mut previous, mut touched) = (table.queues[stage as usize].first, NONE, 0);
        while let Some(mapping) = table.mappings.get(at as usize) {
            assert!(mapping.stage == stage && mapping.previous == previous && mapping.touched >= touched);
            assert_eq!(stage != Stage::Free, table.numbers.get(&mapping.tuple) == Some(&at));
            queued += 1;
            (previous, touched, at) = (at, mapping.touched, mapping.next);
        }
        assert_eq!(table.queues[stage as usize].last, previous);
    }
    assert_eq!(queued, table.mappings.len());
    assert!(table.mappings.len() <= capacity as usize);
}

proptest! {
    #[test]
    fn a_number_stands_for_one_connection_until_it_rested(steps in proptest::collection::vec(step(), 1..300)) {
        const CAPACITY: u32 = 6;
        let mut table = Table::new(CAPACITY);
        let mut now = 0;
        // Who had which number, and when a packet of theirs passed last.
        let mut held: HashMap<u32, (Tuple<Ipv4Addr>, Seconds)> = HashMap::new();
        for step in steps {
            match step {
                Step::Wait(seconds) => now += seconds,
                Step::Inward(number, event) => {
                    if let Some(tuple) = table.inward(number, event, now) {
                        prop_assert_eq!(held[&number].0, tuple);
                        held.insert(number, (tuple, now));
                    }
                }
                Step::Outward(client, event) => {
                    if let Some(number) = table.outward(tuple(client), event, now) {
                        if let Some((other, last)) = held.get(&number) {
                            prop_assert!(*other == tuple(client) || now - last >= CLOSED_UNDER_PRESSURE);
                        }
                        held.insert(number, (tuple(client), now));
                    }
                }
            }
            check(&table, CAPACITY);
        }
        table.expire(now + OPEN);
        prop_assert_eq!(table.len(), 0);
    }
}
