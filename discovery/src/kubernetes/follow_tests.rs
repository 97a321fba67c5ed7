use super::super::catch_up::PUT_OFF;
use super::super::fake_server::{Fake, Running, Script, addresses, payments, running, start};
use super::super::objects::{Event, Kind};
use super::super::samples::{mesh, object, pod, service, slice};
use super::*;
use crate::Change;
use crate::resync::RESYNC_EVERY;

#[tokio::test(start_paused = true)]
async fn a_service_its_slices_and_its_pods_are_listed_and_watched_from_there() {
    let mut running = start(payments(), Fake::new());
    running.listed().await;
    running.watched().await;
    let expected = [
        "probe",
        "list Service [] known None",
        "list Slice [] known None",
        "list Pod [app=payments] known None",
        "watch Service [] from 10",
        "watch Slice [] from 10",
        "watch Pod [app=payments] from 10",
    ];
    assert_eq!(running.server.asked(), expected);
}

#[tokio::test(start_paused = true)]
async fn an_event_is_told_at_once_and_a_pod_that_is_not_known_yet_is_waited_for() {
    let mut running = running().await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.1", "10.0.0.2"]), "11").await;
    assert_eq!(running.changed().await, ["10.0.0.1"]);
    running.server.set(Kind::Pod, pod("payments-1", "payer", true), "12").await;
    assert_eq!(running.changed().await, ["10.0.0.1", "10.0.0.2"]);
}

#[tokio::test(start_paused = true)]
async fn a_slice_that_goes_is_removed_by_its_key_and_nothing_else() {
    let mut running = running().await;
    let gone = object(Kind::Slice, slice("payments-x", &["10.0.0.1"]));
    running.server.tell(Kind::Slice, Ok(Some(Event::Gone(gone, "11".to_owned())))).await;
    let SourceEvent::Changed { changes, .. } = running.next().await else { panic!("no change") };
    assert!(changes.contains(&Change::Removed("slice/shop/payments-x".into())), "{changes:?}");
    assert!(changes.iter().any(|change| matches!(change, Change::Set(record) if record.definition.is_some())));
}

#[tokio::test(start_paused = true)]
async fn what_happens_to_a_pod_besides_is_not_told() {
    let mut running = running().await;
    let mut busy = pod("payments-0", "payer", true);
    busy["status"]["phase"] = "Running".into();
    running.server.set(Kind::Pod, busy, "11").await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.7"]), "12").await;
    assert_eq!(running.changed().await, ["10.0.0.7"]);
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_came_to_its_end_begins_anew_where_it_was_without_a_list() {
    let mut running = running().await;
    running.server.tell(Kind::Slice, Ok(Some(Event::Bookmark("40".to_owned())))).await;
    running.asked_until_probed(3).await;
    running.server.tell(Kind::Slice, Ok(None)).await;
    let asked = running.asked_until_probed(1).await;
    let watches: Vec<_> = asked.iter().filter(|call| call.starts_with("watch")).collect();
    assert_eq!(watches, ["watch Slice [] from 40"], "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn after_a_broken_connection_it_goes_on_where_it_was_without_a_list() {
    let mut running = running().await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.3"]), "14").await;
    running.changed().await;
    running.server.change(|script| script.position = 14);
    running.server.asked();
    running.server.tell(Kind::Pod, Err(Error::Broken("cut".to_owned()))).await;
    assert!(running.unavailable().await.contains("cut"));
    let asked = running.asked_until_probed(1).await;
    let expected =
        ["leave", "probe", "watch Service [] from 10", "watch Slice [] from 14", "watch Pod [app=payments] from 10"];
    assert_eq!(asked, expected);
}

#[tokio::test(start_paused = true)]
async fn what_was_said_just_before_a_connection_broke_is_told() {
    let mut running = running().await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.5"]), "14").await;
    running.server.tell(Kind::Slice, Err(Error::Broken("cut".to_owned()))).await;
    assert_eq!(running.changed().await, ["10.0.0.5"]);
    assert!(running.unavailable().await.contains("cut"));
}

#[tokio::test(start_paused = true)]
async fn what_the_server_no_longer_keeps_is_listed_anew_and_no_older_than_known() {
    let mut running = running().await;
    running.asked_until_probed(1).await;
    running.server.change(|script| script.position = 90);
    running.server.tell(Kind::Slice, Ok(Some(Event::Expired))).await;
    running.server.tell(Kind::Slice, Ok(None)).await;
    running.listed().await;
    let asked = running.asked_until_probed(1).await;
    assert!(asked.contains(&"list Slice [] known Some(\"10\")".to_owned()), "{asked:?}");
    assert!(asked.contains(&"watch Slice [] from 90".to_owned()), "{asked:?}");
}

/// What an API server that was started anew says to every watch.
#[tokio::test(start_paused = true)]
async fn watches_that_end_for_their_age_are_listed_anew_without_leaving_the_connection() {
    let two: Vec<_> = ["payments.shop", "ledger.shop"].iter().map(|name| name.parse().unwrap()).collect();
    let mut running = start(Wanted { services: two.into_iter().collect(), ..Wanted::default() }, Fake::new());
    running.listed().await;
    running.listed().await;
    running.watched().await;
    running.asked_until_probed(1).await;
    running.server.change(|script| script.position = 90);
    let old = running.server.change(|script| script.watches.iter().map(|(_, told)| told.clone()).collect::<Vec<_>>());
    assert_eq!(old.len(), 5, "of a service that is not there no pods are watched");
    for told in &old {
        told.try_send(Ok(Some(Event::Expired))).unwrap();
        told.try_send(Ok(None)).unwrap();
    }
    running.listed().await;
    running.listed().await;
    let asked = running.asked_until_probed(1).await;
    assert_eq!(asked.iter().filter(|call| call.starts_with("list")).count(), 5, "{asked:?}");
    assert_eq!(asked.iter().filter(|call| call.starts_with("watch")).count(), 5, "{asked:?}");
    assert!(!asked.contains(&"leave".to_owned()), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn watches_that_are_too_old_from_every_list_on_do_not_spin() {
    let server = Fake::new();
    server.change(|script| script.expired = 6);
    let mut running = start(payments(), server);
    running.listed().await;
    running.listed().await;
    let begun = Instant::now();
    running.listed().await;
    assert!(begun.elapsed() >= PUT_OFF, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_watch_refused_for_its_age_is_listed_anew_at_once() {
    let server = Fake::new();
    server.change(|script| script.expired = 1);
    let mut running = start(payments(), server);
    running.listed().await;
    running.listed().await;
    running.watched().await;
    let asked = running.server.asked();
    assert_eq!(asked.iter().filter(|call| call.starts_with("list Service")).count(), 2, "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn another_cluster_or_one_put_back_is_listed_as_if_never_read() {
    let lives: [fn(&mut Script); 2] = [|script| script.position = 5, |script| script.store = "two"];
    for life in lives {
        let mut running = running().await;
        running.server.change(life);
        let position = running.server.change(|script| script.position);
        assert_eq!(running.listed().await.0, position);
        let asked = running.server.asked();
        assert!(asked.contains(&"list Slice [] known None".to_owned()), "{asked:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_kind_whose_own_etcd_was_put_back_is_told_as_of_before_everything() {
    let mut running = running().await;
    running.server.change(|script| script.pods_position = Some(4));
    for position in [0, 10] {
        running.wanted.send_modify(|wanted| wanted.resync += 1);
        assert_eq!(running.listed().await.0, position);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_answers_nothing_is_trouble_and_tried_again_ever_less_often() {
    let mut running = running().await;
    running.server.change(|script| script.down = true);
    let (mut last, mut pauses) = (Instant::now(), Vec::new());
    for _ in 0..10 {
        assert!(running.unavailable().await.contains("scripted"));
        pauses.push(last.elapsed());
        last = Instant::now();
    }
    assert!(pauses[9] > pauses[2] && pauses[9] <= Duration::from_secs(5), "{pauses:?}");
    running.server.change(|script| script.down = false);
    running.watched().await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.4"]), "11").await;
    assert_eq!(running.changed().await, ["10.0.0.4"]);
}

#[tokio::test(start_paused = true)]
async fn what_may_not_be_read_is_named_keeps_what_it_said_and_is_tried_again() {
    let server = Fake::new();
    server.change(|script| script.forbidden = Some(Kind::Pod));
    let mut running = start(payments(), server);
    let SourceEvent::Changed { changes, .. } = running.next().await else { panic!("no trouble") };
    let [Change::Refused(refused)] = changes.as_slice() else { panic!("{changes:?}") };
    assert!(refused.problems[0].contains("list of Pod is forbidden"), "{refused:?}");
    assert!(refused.problems[0].contains("deploy/kubernetes/reader.yaml"), "{refused:?}");
    running.server.change(|script| script.forbidden = None);
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn a_list_that_cannot_succeed_is_named_and_stands_in_nobodys_way() {
    let server = Fake::new();
    let sick: ServiceName = "ledger.shop".parse().unwrap();
    server.change(|script| script.sick = Some(Scope::Service(sick.clone())));
    let mut wanted = payments();
    wanted.services.insert(sick);
    let mut running = start(wanted, server);
    let SourceEvent::Changed { changes, .. } = running.next().await else { panic!("no trouble") };
    let [Change::Refused(refused)] = changes.as_slice() else { panic!("{changes:?}") };
    assert!(refused.problems[0].contains("status 500"), "{refused:?}");
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
    running.watched().await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.6"]), "11").await;
    assert_eq!(running.changed().await, ["10.0.0.6"]);
    assert!(!running.server.asked().contains(&"leave".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_comes_later_brings_its_pods_along() {
    let server = Fake::new();
    let objects = server.change(|script| std::mem::take(&mut script.objects));
    let mut running = start(payments(), server);
    assert_eq!(running.listed().await.1, Vec::<String>::new());
    running.watched().await;
    running.server.change(|script| script.objects = objects);
    running.server.set(Kind::Service, service("payments", &[]), "11").await;
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
    let asked = running.asked_until_probed(1).await;
    assert!(asked.contains(&"watch Pod [app=payments] from 10".to_owned()), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn pods_of_another_selector_are_other_pods() {
    let mut running = running().await;
    let mut other = service("payments", &[]);
    other["spec"]["selector"]["version"] = "2".into();
    running.server.change(|script| script.objects.insert(Kind::Service, vec![other.clone()]));
    running.server.set(Kind::Service, other, "11").await;
    running.listed().await;
    let asked = running.asked_until_probed(1).await;
    assert!(asked.contains(&"watch Pod [app=payments,version=2] from 10".to_owned()), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_wanted_anew_is_read_and_what_is_not_wanted_is_left() {
    let mut running = running().await;
    let both = Wanted { namespaces: ["shop".to_owned()].into(), ..Wanted::default() };
    running.wanted.send_replace(both.clone());
    assert_eq!(running.next().await, SourceEvent::Narrowed(both));
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
    let old = running.server.change(|script| script.watches[0].1.clone());
    running.asked_until_probed(1).await;
    assert!(old.is_closed(), "the watch of the service goes on");
}

#[tokio::test(start_paused = true)]
async fn all_is_read_again_when_asked_and_every_few_minutes() {
    let mut running = running().await;
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    running.listed().await;
    let listed_at = Instant::now();
    running.listed().await;
    assert!(listed_at.elapsed() >= RESYNC_EVERY.mul_f64(0.8) && listed_at.elapsed() <= RESYNC_EVERY.mul_f64(1.2));
}

#[tokio::test(start_paused = true)]
async fn a_server_with_too_much_to_do_keeps_its_watches() {
    let mut running = running().await;
    running.server.change(|script| script.busy = true);
    for _ in 0..2 {
        assert!(running.unavailable().await.contains("too much to do"));
    }
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.6"]), "11").await;
    assert_eq!(running.changed().await, ["10.0.0.6"]);
    assert!(running.server.asked().iter().all(|call| call == "probe"));
    running.server.change(|script| (script.busy, script.busy_lists) = (false, true));
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    assert!(running.unavailable().await.contains("too much to do"));
    running.server.change(|script| script.busy_lists = false);
    let refused = Instant::now();
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
    assert!(refused.elapsed() >= Duration::from_secs(40), "sooner than it asked for: {:?}", refused.elapsed());
    assert!(!running.server.asked().contains(&"leave".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_as_it_begins_does_not_spin() {
    let mut running = running().await;
    running.server.tell(Kind::Service, Ok(None)).await;
    assert!(running.unavailable().await.contains("as soon as it began"));
}

#[tokio::test(start_paused = true)]
async fn a_host_that_wants_nothing_asks_for_nothing_but_a_sign_of_life() {
    let mut running = start(Wanted::default(), Fake::new());
    assert!(running.asked_until_probed(3).await.iter().all(|call| call == "probe"));
}

#[tokio::test(start_paused = true)]
async fn documents_are_followed_once_the_cluster_knows_them() {
    let mut running = running().await;
    running.server.change(|script| script.objects.insert(Kind::Mesh, vec![mesh("payments", 80)]));
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    let SourceEvent::Listed(listing) = running.next().await else { panic!("no list") };
    let keys: Vec<&str> = listing.records.iter().map(|record| &*record.key).collect();
    assert!(keys.contains(&"meshservice/shop/payments") && keys.contains(&"service/shop/payments"), "{keys:?}");
    running.watched().await;
    let mut changed = mesh("payments", 80);
    changed["spec"]["endpoints"][0]["address"] = "10.0.1.2".into();
    running.server.set(Kind::Mesh, changed.clone(), "11").await;
    assert!(running.changed().await.contains(&"10.0.1.2".to_owned()));
    let gone = Event::Gone(object(Kind::Mesh, changed), "12".to_owned());
    running.server.tell(Kind::Mesh, Ok(Some(gone))).await;
    let SourceEvent::Changed { changes, .. } = running.next().await else { panic!("no change") };
    assert!(changes.contains(&Change::Removed("meshservice/shop/payments".into())), "{changes:?}");
}

#[tokio::test(start_paused = true)]
async fn documents_that_may_not_be_read_are_named_and_services_go_on() {
    let server = Fake::new();
    server.change(|script| {
        script.objects.insert(Kind::Mesh, vec![mesh("payments", 80)]);
        script.forbidden = Some(Kind::Mesh);
    });
    let mut running = start(payments(), server);
    let SourceEvent::Listed(listing) = running.next().await else { panic!("no list") };
    assert_eq!(addresses(&listing.records), ["10.0.0.1"]);
    assert!(listing.refused[0].problems[0].contains("list of Mesh is forbidden"), "{:?}", listing.refused);
    running.watched().await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.6"]), "11").await;
    assert_eq!(running.changed().await, ["10.0.0.6"]);
}

/// Two services of a namespace, followed as a whole.
async fn following_a_namespace() -> Running {
    let server = Fake::new();
    server.change(|script| {
        script.objects.get_mut(&Kind::Service).unwrap().push(service("ledger", &[]));
        script.objects.get_mut(&Kind::Slice).unwrap().push(slice("ledger-x", &["10.0.0.5"]));
        script.objects.get_mut(&Kind::Pod).unwrap().push(pod("ledger-0", "ledger", true));
    });
    let mut running = start(Wanted { namespaces: ["shop".to_owned()].into(), ..Wanted::default() }, server);
    assert_eq!(running.listed().await.1.len(), 2);
    running.watched().await;
    running.server.asked();
    running
}

fn suspect(running: &Running, service: &str) {
    running.wanted.send_modify(|wanted| wanted.reread = [(service.parse().unwrap(), 1)].into());
}

#[tokio::test(start_paused = true)]
async fn a_suspect_of_a_namespace_is_read_again_without_the_rest_of_it_and_beside_the_watches() {
    let mut running = following_a_namespace().await;
    // The watch of slices is deaf to that: one has moved, and one has gone.
    running.server.change(|script| {
        script.position = 20;
        let slices = vec![slice("payments-y", &["10.0.0.9"]), slice("ledger-x", &["10.0.0.6"])];
        script.objects.insert(Kind::Slice, slices);
    });
    suspect(&running, "payments.shop");
    let SourceEvent::Changed { changes, .. } = running.next().await else { panic!("no change") };
    let told = |change: &Change| matches!(change, Change::Set(record) if addresses([record]) == ["10.0.0.9"]);
    assert!(
        changes.iter().any(told) && changes.contains(&Change::Removed("slice/shop/payments-x".into())),
        "{changes:?}"
    );
    let asked = running.asked_until_probed(1).await;
    let expected = [
        "list Service [] known Some(\"10\")",
        "list Slice [] known Some(\"10\")",
        "list Pod [app=payments] known Some(\"10\")",
        "probe",
    ];
    assert_eq!(asked, expected);
    running.server.set(Kind::Slice, slice("ledger-x", &["10.0.0.7"]), "21").await;
    assert_eq!(running.changed().await, ["10.0.0.7"]);
}

#[tokio::test(start_paused = true)]
async fn what_a_watch_tells_while_a_service_is_read_again_is_told_first_and_holds() {
    let mut running = following_a_namespace().await;
    running.server.change(|script| script.stands_still.send_replace(true));
    suspect(&running, "payments.shop");
    running.server.asks("list Service").await;
    running.server.set(Kind::Slice, slice("payments-x", &["10.0.0.8"]), "11").await;
    assert_eq!(running.changed().await, ["10.0.0.8"]);
    running.server.change(|script| script.stands_still.send_replace(false));
    running.asked_until_probed(2).await;
    running.server.set(Kind::Slice, slice("ledger-x", &["10.0.0.7"]), "21").await;
    assert_eq!(running.changed().await, ["10.0.0.7"], "the older list of the first took nothing back");
}

#[tokio::test(start_paused = true)]
async fn a_suspect_that_is_followed_by_itself_is_listed_again() {
    let mut running = running().await;
    suspect(&running, "payments.shop");
    assert_eq!(running.listed().await.1, ["10.0.0.1"]);
    let asked = running.asked_until_probed(1).await;
    assert_eq!(asked.iter().filter(|call| call.starts_with("list")).count(), 3, "{asked:?}");
}
