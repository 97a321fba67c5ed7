use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::super::packets::{ACK, FIN, RST, SYN, Sample, Written, check};
use super::super::rewrite::{Parsed, parse};
use super::*;

fn end<A>(address: A, port: u16) -> End<A> {
    End { address, port }
}

fn family() -> Family<Ipv4Addr> {
    Family {
        listener: end([198, 18, 0, 1].into(), 15001),
        virtual_ips: ([240, 240, 0, 0].into(), [240, 240, 255, 255].into()),
    }
}

fn family6() -> Family<Ipv6Addr> {
    Family {
        listener: end("fd6d:6573:6864:1::1".parse().unwrap(), 15001),
        virtual_ips: ("fd6d:6573:6864::".parse().unwrap(), "fd6d:6573:6864::ffff:ffff:ffff:ffff".parse().unwrap()),
    }
}

/// Where the packet went, as its addresses say.
fn pass(written: &Written<Ipv4Addr>, table: &mut Table<Ipv4Addr>) -> (Verdict, End<Ipv4Addr>, End<Ipv4Addr>) {
    let mut frame = written.frame();
    let Ok(Parsed::V4(segment)) = parse(&mut frame) else { panic!("{written:?}") };
    let verdict = family().translate(segment, table, 0);
    let length = match verdict {
        Verdict::Forward(length) | Verdict::Refuse(_, length) => length,
        Verdict::Drop(_) => frame.len(),
    };
    let Ok(Parsed::V4(segment)) = parse(&mut frame[..length]) else { panic!("{written:?}") };
    let ends = (segment.source(), segment.destination());
    check(&frame[..length], ends.0, ends.1);
    (verdict, ends.0, ends.1)
}

const APP: End<Ipv4Addr> = End { address: Ipv4Addr::new(10, 0, 0, 9), port: 40_000 };
const SERVICE: End<Ipv4Addr> = End { address: Ipv4Addr::new(240, 240, 3, 7), port: 443 };

#[test]
fn a_connection_reaches_our_listener_and_its_answers_the_application() {
    let mut table = Table::new(CAPACITY);
    let (verdict, phantom, to) = pass(&Written::new(APP, SERVICE, SYN), &mut table);
    assert!(matches!(verdict, Verdict::Forward(_)));
    assert_eq!(to, family().listener);
    assert_eq!(phantom.address, Ipv4Addr::new(198, 18, 0, 2));
    let (_, from, to) = pass(&Written::new(family().listener, phantom, SYN | ACK), &mut table);
    assert_eq!((from, to), (SERVICE, APP));
    assert_eq!(family().tuple_of(phantom, &table), Some(Tuple { client: APP, original: SERVICE }));
    assert_eq!(family().tuple_of(APP, &table), None, "a peer that is no phantom was not captured");
}

#[test]
fn what_is_not_known_is_never_put_back() {
    let mut table = Table::new(CAPACITY);
    let phantom = end([198, 18, 0, 2].into(), 5000);
    for (source, destination) in [
        (APP, phantom),                                         // an application calls a phantom
        (APP, end([10, 0, 0, 1].into(), 80)),                   // to nowhere of ours
        (family().listener, end([198, 18, 0, 6].into(), 5000)), // no phantom
        (family().listener, end([198, 18, 0, 0].into(), 5000)),
        (family().listener, end([198, 18, 0, 2].into(), 80)), // no port of a phantom
        (end(family().listener.address, 15002), phantom),     // not our listener
    ] {
        let (verdict, ..) = pass(&Written::new(source, destination, SYN), &mut table);
        assert_eq!(verdict, Verdict::Drop(Dropped::Stray), "{source:?} -> {destination:?}");
    }
    assert_eq!(table.len(), 0);
}

#[test]
fn packets_of_connections_from_before_our_time_are_reset() {
    let mut table = Table::new(CAPACITY);
    for flags in [ACK, FIN | ACK, SYN | ACK] {
        let (verdict, from, to) = pass(&Written::new(APP, SERVICE, flags), &mut table);
        assert!(matches!(verdict, Verdict::Refuse(Refused::Unknown, _)));
        assert_eq!((from, to), (SERVICE, APP), "the application is told");
    }
    let phantom = end([198, 18, 0, 2].into(), 5000);
    let (verdict, from, to) = pass(&Written::new(family().listener, phantom, ACK), &mut table);
    assert!(matches!(verdict, Verdict::Refuse(Refused::Unknown, _)));
    assert_eq!((from, to), (phantom, family().listener), "so is our own socket");
    let (verdict, ..) = pass(&Written::new(APP, SERVICE, RST), &mut table);
    assert_eq!(verdict, Verdict::Drop(Dropped::Forgotten), "resets are never answered");
}

#[test]
fn one_connection_too_many_is_refused_at_once() {
    let mut table = Table::new(1);
    pass(&Written::new(APP, SERVICE, SYN), &mut table);
    let other = end(APP.address, APP.port + 1);
    let (verdict, from, to) = pass(&Written::new(other, SERVICE, SYN), &mut table);
    assert!(matches!(verdict, Verdict::Refuse(Refused::Full, _)));
    assert_eq!((from, to), (SERVICE, other));
}

#[test]
fn a_reset_makes_the_number_rest_and_the_reset_itself_is_passed_on() {
    let mut table = Table::new(CAPACITY);
    let (_, phantom, _) = pass(&Written::new(APP, SERVICE, SYN), &mut table);
    let (verdict, from, to) = pass(&Written::new(family().listener, phantom, RST | ACK), &mut table);
    assert!(matches!(verdict, Verdict::Forward(_)));
    assert_eq!((from, to), (SERVICE, APP));
    table.expire(70);
    assert_eq!(table.len(), 0);
}

fn stands_for_one_port<A: Sample>(family: &Family<A>, number: u32) {
    let phantom = family.phantom(number);
    assert_eq!(family.number(phantom), Some(number));
    assert!(phantom.port >= FIRST_PORT && phantom.address != family.listener.address);
}

proptest! {
    #[test]
    fn every_number_is_a_port_of_a_phantom(number in 0..CAPACITY) {
        stands_for_one_port(&family(), number);
        stands_for_one_port(&family6(), number);
    }
}
