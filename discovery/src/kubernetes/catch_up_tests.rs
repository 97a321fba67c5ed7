use std::time::Duration;

use tokio::time::Instant;

use super::super::fake_server::{Fake, addresses, payments, running, start};
use super::super::objects::Kind;
use super::super::samples::{object, pod, service, slice};
use super::*;
use crate::{Change, ServiceName, Wanted};

#[tokio::test(start_paused = true)]
async fn an_event_is_told_while_a_probe_and_a_list_are_not_answered() {
    let mut running = running().await;
    running.server.change(|script| script.stands_still.send_replace(true));
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    running.server.asks("list Service").await;
    running.server.asks("probe").await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.9"]), "11").await;
    assert_eq!(running.changed().await, ["10.0.0.9"]);
}

#[tokio::test(start_paused = true)]
async fn a_list_takes_nothing_back_that_a_watch_told_while_it_was_awaited() {
    let mut running = running().await;
    running.server.change(|script| script.stands_still.send_replace(true));
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    running.server.asks("list Service").await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.9"]), "11").await;
    running.changed().await;
    // As of 10, all of it.
    running.server.change(|script| script.stands_still.send_replace(false));
    assert_eq!(running.listed().await.1, ["10.0.0.9"]);
    // And what a watch says of before the list is old.
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.1"]), "9").await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.8"]), "12").await;
    assert_eq!(running.changed().await, ["10.0.0.8"]);
}

#[tokio::test(start_paused = true)]
async fn watches_go_on_over_a_list() {
    let mut running = running().await;
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    running.listed().await;
    let asked = running.asked_until_probed(1).await;
    assert!(asked.iter().all(|call| !call.starts_with("watch")), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_says_nothing_not_even_how_far_it_is_begins_anew_where_it_was() {
    let mut running = running().await;
    let begun = Instant::now();
    let mut asked = Vec::new();
    while begun.elapsed() < Duration::from_secs(170) {
        running.server.tell(Kind::Service, Ok(Some(Event::Bookmark("10".to_owned())))).await;
        running.server.tell(Kind::Pod, Ok(Some(Event::Bookmark("10".to_owned())))).await;
        asked.extend(running.asked_until_probed(1).await);
    }
    let watches: Vec<_> = asked.iter().filter(|call| call.starts_with("watch")).collect();
    assert_eq!(watches, ["watch Slice [] from 10"], "{asked:?}");
}

/// More of a namespace than are followed each by itself.
fn nine() -> Wanted {
    let others = (1..9).map(|n| format!("s{n}.shop").parse().unwrap());
    let services = others.chain(["payments.shop".parse::<ServiceName>().unwrap()]);
    Wanted { services: services.collect(), ..Wanted::default() }
}

#[tokio::test(start_paused = true)]
async fn of_many_services_of_a_namespace_the_server_tells_no_other_ones() {
    let server = Fake::new();
    server.change(|script| {
        let others = [service("s1", &[]), service("strange", &[])];
        script.objects.get_mut(&Kind::Service).unwrap().extend(others);
        // A server may tell more than it was asked for.
        script.objects.get_mut(&Kind::Slice).unwrap().push(slice("strange-x", &["10.0.0.66"]));
        script.objects.get_mut(&Kind::Pod).unwrap().push(pod("strange-0", "thief", true));
    });
    let mut running = start(nine(), server);
    let mut told = Vec::new();
    for _ in 0..9 {
        told.extend(running.listed().await.1);
    }
    assert_eq!(told, ["10.0.0.1"]);
    running.watched().await;
    let asked = running.server.asked();
    let names = "kubernetes.io/service-name in (payments,s1,s2,s3,s4,s5,s6,s7,s8)";
    assert!(asked.contains(&format!("watch Slice [{names}] from 10")), "{asked:?}");
    assert!(asked.contains(&"watch Pod [app in (payments,s1)] from 10".to_owned()), "{asked:?}");

    running.server.set(Kind::Slice, slice("strange-x", &["10.0.0.67"]), "11").await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.7"]), "12").await;
    assert_eq!(running.changed().await, ["10.0.0.7"]);
}

#[tokio::test(start_paused = true)]
async fn one_more_service_of_a_namespace_is_asked_for_and_the_others_go_on() {
    let mut running = start(nine(), Fake::new());
    for _ in 0..9 {
        running.listed().await;
    }
    running.watched().await;
    running.server.asked();
    running.wanted.send_modify(|wanted| wanted.services.extend(["s9.shop".parse().unwrap()]));
    for _ in 0..10 {
        running.listed().await;
    }
    let asked = running.asked_until_probed(1).await;
    assert!(asked.iter().any(|call| call.starts_with("watch Slice") && call.contains(",s9)")), "{asked:?}");
    assert!(!asked.iter().any(|call| call.starts_with("watch Service")), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_dropped_and_wanted_again_is_told_again() {
    let mut running = start(nine(), Fake::new());
    for _ in 0..9 {
        running.listed().await;
    }
    running.watched().await;
    let last: ServiceName = "s8.shop".parse().unwrap();
    running.wanted.send_modify(|wanted| assert!(wanted.services.remove(&last)));
    while !matches!(running.next().await, SourceEvent::Narrowed(_)) {}
    running.wanted.send_modify(|wanted| assert!(wanted.services.insert(last.clone())));
    let is_told =
        |event: SourceEvent| matches!(event, SourceEvent::Listed(told) if told.scope == Scope::Service(last.clone()));
    // Paused clocks: a minute long, before all is read again by itself.
    let within_a_minute = Instant::now() + Duration::from_secs(60);
    while !is_told(running.next().await) {
        assert!(Instant::now() < within_a_minute);
    }
}

#[tokio::test(start_paused = true)]
async fn one_more_service_that_is_wanted_while_a_list_is_awaited_is_told_by_the_next() {
    let mut running = start(nine(), Fake::new());
    for _ in 0..9 {
        running.listed().await;
    }
    running.watched().await;
    running.server.asked();
    running.server.change(|script| script.stands_still.send_replace(true));
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    running.server.asks("list Service").await;
    let mut told = Vec::new();
    running.wanted.send_modify(|wanted| wanted.services.extend(["s9.shop".parse().unwrap()]));
    running.server.asks("probe").await;
    running.server.change(|script| script.stands_still.send_replace(false));
    for _ in 0..19 {
        let SourceEvent::Listed(listing) = running.next().await else { panic!("no list") };
        told.push(listing.scope);
    }
    let new = Scope::Service("s9.shop".parse().unwrap());
    assert!(!told[..9].contains(&new) && told[9..].contains(&new), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_told_of_a_service_of_many_before_the_pods_of_its_new_selector_are_known() {
    let mut running = start(nine(), Fake::new());
    for _ in 0..9 {
        running.listed().await;
    }
    running.watched().await;
    let mut other = service("payments", &[]);
    other["spec"]["selector"]["app"] = "billing".into();
    running.server.change(|script| {
        let mut pod = pod("payments-0", "payer", true);
        pod["metadata"]["labels"]["app"] = "billing".into();
        script.objects.insert(Kind::Service, vec![other.clone()]);
        script.objects.insert(Kind::Pod, vec![pod]);
    });
    running.server.set(Kind::Service, other, "11").await;
    let mut told = Vec::new();
    for _ in 0..9 {
        let SourceEvent::Listed(listing) = running.next().await else { panic!("told before it was listed") };
        told.extend(addresses(&listing.records));
    }
    assert_eq!(told, ["10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_deleted_is_told_at_once_and_found_again_when_it_is_back() {
    let mut running = running().await;
    let gone = Event::Gone(object(Kind::Service, service("payments", &[])), "11".to_owned());
    let objects = running.server.change(|script| std::mem::take(&mut script.objects));
    running.server.tell(Kind::Service, Ok(Some(gone))).await;
    assert_eq!(running.changed().await, Vec::<String>::new());
    assert_eq!(running.listed().await.1, Vec::<String>::new());
    running.asked_until_probed(1).await;
    running.server.change(|script| script.objects = objects);
    running.server.set(Kind::Service, service("payments", &[]), "12").await;
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn what_may_no_longer_be_read_keeps_what_it_said() {
    let mut running = start(payments(), Fake::new());
    running.listed().await;
    running.watched().await;
    running.server.change(|script| script.forbidden = Some(Kind::Slice));
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    let SourceEvent::Changed { changes, .. } = running.next().await else { panic!("no trouble") };
    assert!(matches!(&changes[..], [Change::Refused(_)]), "{changes:?}");
    running.server.change(|script| script.forbidden = None);
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
    let asked = running.asked_until_probed(1).await;
    assert!(asked.contains(&"watch Slice [] from 10".to_owned()), "{asked:?}");
}
