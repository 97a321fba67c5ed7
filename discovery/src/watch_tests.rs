use std::collections::HashMap;
use std::time::UNIX_EPOCH;

use tokio::time::sleep;

use super::*;
use crate::resources::ResourceNews;
use crate::suspicion::MOST_SERVICES;
use crate::{Belief, Change, Epoch, Listing, Looked, Namespaces, Scope, Why, fake};

struct Running {
    directory: watch::Receiver<Arc<Directory>>,
    health: watch::Receiver<Arc<Vec<SourceHealth>>>,
    _task: JoinSet<()>,
}

fn start(sources: Vec<Configured>) -> Running {
    started(Watcher::new(sources, fake::trust_domain()))
}

fn start_keeping(sources: Vec<Configured>, keep: Arc<dyn Keep>) -> Running {
    started(Watcher::new(sources, fake::trust_domain()).keeping(keep))
}

fn started(watcher: Watcher) -> Running {
    let (directory, health) = (watcher.directory(), watcher.health());
    let mut task = JoinSet::new();
    task.spawn(watcher.run());
    Running { directory, health, _task: task }
}

impl Running {
    async fn directory_with(&mut self, wanted: impl FnMut(&Arc<Directory>) -> bool) -> Arc<Directory> {
        self.directory.wait_for(wanted).await.unwrap().clone()
    }

    async fn health_with(&mut self, mut wanted: impl FnMut(&[SourceHealth]) -> bool) -> Vec<SourceHealth> {
        self.health.wait_for(|health| wanted(health)).await.unwrap().to_vec()
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_source_publishes_is_in_the_directory_until_it_publishes_something_else() {
    let (script, source) = fake::source("one");
    let mut running = start(vec![source]);
    script.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    running.directory_with(|directory| directory.find("a.shop").is_some()).await;
    script.publish([fake::record("b.shop", &[])]).await;
    let directory = running.directory_with(|directory| directory.find("b.shop").is_some()).await;
    assert!(directory.find("a.shop").is_none());
    script.publish([]).await;
    running.directory_with(|directory| directory.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn an_unavailable_source_keeps_its_services_and_says_why_until_it_is_back() {
    let (script, source) = fake::source("one");
    let mut running = start(vec![source]);
    script.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    script.fail("connection refused").await;
    let health = running.health_with(|health| !health[0].errors.is_empty()).await;
    assert_eq!(health[0].errors, ["connection refused"]);
    assert_eq!(health[0].services, 1);
    assert!(running.directory.borrow().find("a.shop").is_some());
    script.send(SourceEvent::InSync).await;
    let health = running.health_with(|health| health[0].errors.is_empty()).await;
    assert!(health[0].last_ok >= health[0].last_change && health[0].last_change.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_ends_or_panics_leaves_its_services_and_does_not_touch_the_others() {
    struct Panics;
    impl Source for Panics {
        fn name(&self) -> &str {
            "panics"
        }
        fn kind(&self) -> &'static str {
            "fake"
        }
        fn watch(&self, _: watch::Receiver<Wanted>, _: Sink) -> crate::SourceFuture {
            Box::pin(async { panic!("expected by this test") })
        }
    }
    let (ending, first) = fake::source("ending");
    let (living, third) = fake::source("living");
    let second = Configured { source: Box::new(Panics), ..fake::source("panics").1 };
    let mut running = start(vec![first, second, third]);
    ending.publish([fake::record("a.shop", &[])]).await;
    drop(ending);
    let health = running.health_with(|health| health[..2].iter().all(|source| !source.errors.is_empty())).await;
    assert!(health[0].errors[0].contains("ended by itself"), "{health:?}");
    assert!(health[1].errors[0].contains("expected by this test"), "{health:?}");
    living.publish([fake::record("b.shop", &[])]).await;
    let directory = running.directory_with(|directory| directory.find("b.shop").is_some()).await;
    assert!(directory.find("a.shop").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_panicked_is_started_again() {
    struct PanicsOnce(std::sync::atomic::AtomicBool);
    impl Source for PanicsOnce {
        fn name(&self) -> &str {
            "once"
        }
        fn kind(&self) -> &'static str {
            "fake"
        }
        fn watch(&self, _: watch::Receiver<Wanted>, sink: Sink) -> crate::SourceFuture {
            let first = !self.0.swap(true, std::sync::atomic::Ordering::Relaxed);
            Box::pin(async move {
                assert!(!first, "expected by this test");
                sink.send(SourceEvent::InSync).await;
                std::future::pending::<()>().await;
            })
        }
    }
    let source = Configured { source: Box::new(PanicsOnce(false.into())), ..fake::source("once").1 };
    let mut running = start(vec![source]);
    running.health_with(|health| health[0].errors.iter().any(|error| error.contains("it is started again"))).await;
    running.health_with(|health| health[0].errors.is_empty() && health[0].last_ok.is_some()).await;
}

#[tokio::test(start_paused = true)]
async fn a_service_outside_the_authority_of_its_source_is_an_error_in_its_health() {
    let (script, mut source) = fake::source("one");
    source.authority = Namespaces::new(["billing"]).unwrap();
    let mut running = start(vec![source]);
    script.publish([fake::record("a.shop", &[]), fake::record("b.billing", &[])]).await;
    let health = running.health_with(|health| health[0].services == 1).await;
    assert!(health[0].errors[0].contains("no authority for namespace `shop`"), "{health:?}");
    assert!(running.directory.borrow().find("a.shop").is_none());
}

#[tokio::test(start_paused = true)]
async fn the_next_source_takes_over_a_service_the_first_no_longer_defines() {
    let (one, first) = fake::source("one");
    let (two, second) = fake::source("two");
    let mut running = start(vec![first, second]);
    one.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    two.publish([fake::record("a.shop", &["10.0.0.2"])]).await;
    let health = running.health_with(|health| !health[1].shadowed.is_empty()).await;
    assert_eq!((health[0].services, health[1].services), (1, 0));
    assert_eq!(&*running.directory.borrow().find("a.shop").unwrap().source, "one");
    one.publish([]).await;
    running.directory_with(|directory| directory.find("a.shop").is_some_and(|service| &*service.source == "two")).await;
}

#[tokio::test(start_paused = true)]
async fn publishing_the_same_again_wakes_nobody_and_keeps_every_allocation() {
    let (script, source) = fake::source("one");
    let mut running = start(vec![source]);
    let services = || ["a.shop", "b.shop"].map(|name| fake::record(name, &["10.0.0.1"]));
    script.publish(services()).await;
    let before = running.directory_with(|directory| directory.len() == 2).await;
    running.directory.mark_unchanged();
    script.publish(services()).await;
    script.fail("seen after the second publish").await;
    running.health_with(|health| !health[0].errors.is_empty()).await;
    assert!(!running.directory.has_changed().unwrap());

    let [a, _] = services();
    script.publish([a, fake::record("b.shop", &["10.0.0.9"])]).await;
    running.directory.changed().await.unwrap();
    let after = running.directory.borrow().clone();
    assert!(Arc::ptr_eq(before.find("a.shop").unwrap(), after.find("a.shop").unwrap()));
    assert!(!Arc::ptr_eq(before.find("b.shop").unwrap(), after.find("b.shop").unwrap()));
}

#[tokio::test(start_paused = true)]
async fn settled_waits_for_every_source_to_speak_be_it_bad_news() {
    let (one, first) = fake::source("one");
    let (two, second) = fake::source("two");
    let mut running = start(vec![first, second]);
    one.publish([]).await;
    running.health_with(|health| health[0].last_ok.is_some()).await;
    let waiting = tokio::time::timeout(Duration::from_secs(3600), settled(&mut running.health));
    assert!(waiting.await.is_err());
    two.fail("no route to host").await;
    settled(&mut running.health).await;
}

#[tokio::test(start_paused = true)]
async fn settled_waits_for_each_kind_of_routes_and_policies_also_where_services_are_known() {
    let (script, source) = fake::source_of_resources("cluster", &["httproutes/", "authorizationpolicies/"]);
    let mut running = start(vec![source]);
    let prefix = |text: &str| Arc::<str>::from(text);
    let listed = ResourceNews::listed(prefix("authorizationpolicies/"), Epoch::default(), std::iter::empty());
    let (problems, key) = (vec!["HTTPRoute: forbidden".to_owned()], "httproutes/access".into());
    let refused = crate::resources::ResourceChange::Refused(crate::Refused { key, problems }.into());
    let trouble = ResourceNews::Changed { prefix: prefix("httproutes/"), position: 0, changes: vec![refused] };
    let none = SourceEvent::Listed(Listing::empty(Scope::Everything, Epoch::default()));
    for event in [SourceEvent::Resources(listed), none, SourceEvent::Resources(trouble)] {
        let waiting = tokio::time::timeout(Duration::from_secs(3600), settled(&mut running.health));
        assert!(waiting.await.is_err(), "before {event:?}");
        script.send(event).await;
    }
    settled(&mut running.health).await;
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_settled_waits_only_for_kinds_that_were_never_heard_of() {
    let keep = Arc::new(Memory::default());
    let remote = |prefixes: &[&str]| {
        let (script, source) = fake::source_of_resources("etcd", prefixes);
        (script, Configured { belief: Belief::Guarded, ..source })
    };
    let (script, source) = remote(&["a/"]);
    let mut running = start_keeping(vec![source], keep.clone());
    let epoch = Epoch { store: "one".into(), position: 1 };
    script.send(SourceEvent::Resources(ResourceNews::listed("a/".into(), epoch, std::iter::empty()))).await;
    script.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    running.directory_with(|directory| directory.find("a.shop").is_some()).await;
    sleep(SAVE_EVERY * 2).await;
    drop((running, script));
    let (_away, source) = remote(&["a/"]);
    settled(&mut start_keeping(vec![source], keep.clone()).health).await;
    let (_away, source) = remote(&["a/", "b/"]);
    let mut running = start_keeping(vec![source], keep);
    let waiting = tokio::time::timeout(Duration::from_secs(3600), settled(&mut running.health));
    assert!(waiting.await.is_err());
}

#[test]
fn health_is_shown_with_times_in_unix_seconds() {
    let health = SourceHealth {
        resources: 0,
        refused_resources: 0,
        name: "files".into(),
        kind: "files",
        services: 1,
        endpoints: 4,
        stale: 2,
        from_disk: false,
        shadowed: vec!["a.shop".parse().unwrap()],
        last_change: Some(UNIX_EPOCH + Duration::from_millis(12_345)),
        last_ok: None,
        last_listed: None,
        suspected: 3,
        errors: vec!["x".into()],
        has_answered: true,
    };
    let expected = r#"{"name":"files","kind":"files","services":1,"endpoints":4,"resources":0,"refused_resources":0,"stale":2,"from_disk":false,"shadowed":["a.shop"],"last_change":12,"last_ok":null,"last_listed":null,"suspected":3,"errors":["x"]}"#;
    assert_eq!(serde_json::to_string(&health).unwrap(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_lost_everything_is_asked_again_and_believed_after_a_minute() {
    let (script, mut source) = fake::source("one");
    source.belief = Belief::Guarded;
    let mut running = start(vec![source]);
    script.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    running.directory_with(|directory| directory.find("a.shop").is_some()).await;
    let mut wanted = script.wanted().await;
    wanted.mark_unchanged();
    script.publish([]).await;
    let health = running.health_with(|health| health[0].stale == 2).await;
    assert_eq!(health[0].endpoints, 1);
    let directory = running.directory_with(|directory| directory.find("a.shop").unwrap().endpoints[0].stale).await;
    assert_eq!(directory.find("a.shop").unwrap().endpoints.len(), 1);
    let start = Instant::now();
    while running.directory.borrow().find("a.shop").is_some() {
        // Each time another list is asked for, it says the same.
        wanted.changed().await.unwrap();
        script.publish([]).await;
        script.send(SourceEvent::InSync).await;
        tokio::task::yield_now().await;
    }
    assert!(start.elapsed() >= REPEATED_FOR && start.elapsed() <= REPEATED_FOR * 2, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn endpoints_of_several_sources_serve_one_service_in_the_order_of_the_sources() {
    let (one, first) = fake::source("one");
    let (two, second) = fake::source("two");
    let mut running = start(vec![first, second]);
    two.publish([fake::record("a.shop", &["10.0.0.2", "10.0.0.1"])]).await;
    one.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    let directory =
        running.directory_with(|directory| directory.find("a.shop").is_some_and(|s| &*s.source == "one")).await;
    let shown: Vec<_> = directory
        .find("a.shop")
        .unwrap()
        .endpoints
        .iter()
        .map(|endpoint| (endpoint.dial.ip().to_string(), &*endpoint.source, endpoint.rank))
        .collect();
    assert_eq!(shown, [("10.0.0.1".to_owned(), "one", 0), ("10.0.0.2".to_owned(), "two", 1)]);
}

#[derive(Default)]
struct Memory(std::sync::Mutex<HashMap<String, String>>);

impl Keep for Memory {
    fn load(&self, source: &str) -> std::io::Result<Option<String>> {
        Ok(self.0.lock().unwrap().get(source).cloned())
    }
    fn save(&self, source: &str, text: &str) -> std::io::Result<()> {
        self.0.lock().unwrap().insert(source.to_owned(), text.to_owned());
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_host_that_starts_while_its_sources_are_away_knows_what_it_knew() {
    let memory = Arc::new(Memory::default());
    let run = |source| {
        let watcher = Watcher::new(vec![source], fake::trust_domain()).keeping(memory.clone());
        let (directory, health) = (watcher.directory(), watcher.health());
        let mut task = JoinSet::new();
        task.spawn(watcher.run());
        Running { directory, health, _task: task }
    };
    let (script, source) = fake::source("one");
    let first = run(source);
    script.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    sleep(SAVE_EVERY).await;
    while memory.load("one").unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    let before = first.directory.borrow().clone();
    drop(first);

    let (script, source) = fake::source("one");
    let mut second = run(source);
    assert_eq!(*second.directory.borrow(), before);
    assert!(second.health.borrow()[0].from_disk);
    settled(&mut second.health).await;
    script.fail("no route to host").await;
    second.health_with(|health| !health[0].errors.is_empty()).await;
    assert_eq!(*second.directory.borrow(), before);
    script.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    second.health_with(|health| !health[0].from_disk).await;
}

#[tokio::test(start_paused = true)]
async fn a_last_good_state_that_cannot_be_read_stops_nothing() {
    let memory = Arc::new(Memory::default());
    let record = serde_json::to_string(&fake::record("a.shop", &["10.0.0.1"])).unwrap();
    let saved = |schema| format!(r#"{{"schema":{schema},"kind":"fake","epochs":[],"records":[{record}]}}"#);
    for (text, known) in [("{".to_owned(), 0), (saved(99), 0), (saved(1), 1)] {
        memory.save("one", &text).unwrap();
        let (_script, source) = fake::source("one");
        let watcher = Watcher::new(vec![source], fake::trust_domain()).keeping(memory.clone());
        assert_eq!(watcher.directory().borrow().len(), known);
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_who_accepts_a_loss_does_not_wait_for_it_to_be_repeated() {
    let (script, mut source) = fake::source("one");
    source.belief = Belief::Guarded;
    let watcher = Watcher::new(vec![source], fake::trust_domain());
    let (directory, health, losses) = (watcher.directory(), watcher.health(), watcher.losses());
    let mut task = JoinSet::new();
    task.spawn(watcher.run());
    let mut running = Running { directory, health, _task: task };
    script.publish([fake::record("a.shop", &["10.0.0.1"])]).await;
    script.publish([]).await;
    running.health_with(|health| health[0].stale == 2).await;
    assert!(losses.accept("tow".into()).await.unwrap_err().contains("there are: one"));
    losses.accept("one".into()).await.unwrap();
    running.directory_with(|directory| directory.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_service_that_waited_for_a_source_appears_when_that_does_not_define_it() {
    let (one, first) = fake::source("one");
    let (two, mut second) = fake::source("two");
    second.authority = Namespaces::default();
    let mut running = start(vec![first, second]);
    let place = crate::Place { ports: vec![crate::PortTarget { port: 80, target: 80 }], ..fake::place("10.0.0.1") };
    let record = crate::Record { definition: None, places: vec![Arc::new(place)], ..fake::record("a.shop", &[]) };
    two.publish([record]).await;
    running.health_with(|health| health[1].last_ok.is_some()).await;
    assert!(running.directory.borrow().is_empty());
    one.publish([]).await;
    running.directory_with(|directory| directory.find("a.shop").is_some()).await;
}

fn endpoint(service: &str, source: &str) -> Arc<Endpoint> {
    fake::service(service, source, &["10.0.0.1"]).endpoints[0].clone()
}

#[tokio::test(start_paused = true)]
async fn of_an_endpoint_that_cannot_be_reached_its_service_is_read_again_at_its_source_and_nothing_else() {
    let ((one, first), (two, second)) = (fake::source("one"), fake::source("two"));
    let watcher = Watcher::new(vec![first, second], fake::trust_domain());
    let (suspects, health) = (watcher.suspects(), watcher.health());
    let mut task = JoinSet::new();
    task.spawn(watcher.run());
    let (mut asked, untouched) = (one.wanted().await, two.wanted().await);
    asked.mark_unchanged();
    let began = Instant::now();
    for _ in 0..1000 {
        suspects.tell(&endpoint("a.shop", "one"));
    }
    asked.changed().await.unwrap();
    let reread = asked.borrow_and_update().reread.clone();
    assert_eq!(reread.into_iter().collect::<Vec<_>>(), [("a.shop".parse().unwrap(), 1)]);
    assert!(began.elapsed().as_secs() <= 5 && health.borrow()[0].suspected == 1);
    suspects.tell(&endpoint("a.shop", "one"));
    asked.changed().await.unwrap();
    assert_eq!(asked.borrow_and_update().reread.get("a.shop"), Some(&2));
    assert!((5..=15).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    assert!(asked.borrow().resync == 0 && *untouched.borrow() == Wanted::default());
}

#[tokio::test(start_paused = true)]
async fn of_endpoints_of_many_services_all_of_the_source_is_read_again_once() {
    let (one, source) = fake::source("one");
    let watcher = Watcher::new(vec![source], fake::trust_domain());
    let suspects = watcher.suspects();
    let mut task = JoinSet::new();
    task.spawn(watcher.run());
    let mut asked = one.wanted().await;
    let mut most = 0;
    for n in 0..40 {
        suspects.tell(&endpoint(&format!("s{n}.shop"), "one"));
    }
    while asked.borrow_and_update().resync == 0 {
        asked.changed().await.unwrap();
        most = most.max(asked.borrow().reread.len());
    }
    assert!(most <= MOST_SERVICES, "{most}");
    tokio::time::advance(Duration::from_secs(4)).await;
    assert_eq!(asked.borrow().resync, 1);
}

#[tokio::test(start_paused = true)]
async fn what_the_source_tells_anew_of_a_service_after_the_failure_spares_the_question() {
    let (one, source) = fake::source("one");
    let watcher = Watcher::new(vec![source], fake::trust_domain());
    let suspects = watcher.suspects();
    let mut running = started(watcher);
    one.publish([fake::record("a.shop", &["10.0.0.1"]), fake::record("b.shop", &["10.0.0.2"])]).await;
    running.directory_with(|directory| directory.len() == 2).await;
    let mut asked = one.wanted().await;
    asked.mark_unchanged();
    for name in ["a.shop", "b.shop"] {
        suspects.tell(&endpoint(name, "one"));
    }
    let moved = Change::Set(fake::record("a.shop", &["10.0.0.9"]));
    one.send(SourceEvent::Changed { scope: Scope::Everything, position: 1, changes: vec![moved] }).await;
    asked.changed().await.unwrap();
    sleep(Duration::from_secs(10)).await;
    assert_eq!(asked.borrow().reread.keys().map(ServiceName::as_str).collect::<Vec<_>>(), ["b.shop"]);
}

#[tokio::test(start_paused = true)]
async fn the_oldest_complete_list_of_a_source_is_told() {
    let (script, source) = fake::source("one");
    let mut running = start(vec![Configured { belief: Belief::Guarded, ..source }]);
    assert_eq!(running.health.borrow()[0].last_listed, None);
    let list =
        |name: &str| SourceEvent::Listed(Listing::empty(Scope::Service(name.parse().unwrap()), Epoch::default()));
    script.send(list("a.shop")).await;
    let first = running.health_with(|health| health[0].last_listed.is_some()).await[0].last_listed;
    script.send(list("b.shop")).await;
    script.send(SourceEvent::InSync).await;
    let health = running.health_with(|health| health[0].last_ok > first).await;
    assert_eq!(health[0].last_listed, first, "that of a.shop is still in force");
    let services = ["b.shop".parse().unwrap()].into();
    script.send(SourceEvent::Narrowed(Wanted { services, ..Wanted::default() })).await;
    running.health_with(|health| health[0].last_listed > first).await;
}

/// Two remote sources of a host that has declared nothing.
struct Asking {
    one: fake::Script,
    two: fake::Script,
    lookups: Lookups,
    running: Running,
    imports: watch::Receiver<Arc<Vec<Import>>>,
}

fn asking(disk: &Arc<Memory>) -> Asking {
    let ((one, first), (two, second)) = (fake::source("one"), fake::source("two"));
    let guarded = |source| Configured { belief: Belief::Guarded, ..source };
    let watcher = Watcher::new(vec![guarded(first), guarded(second)], fake::trust_domain()).looking_up(disk.clone());
    let (directory, health) = (watcher.directory(), watcher.health());
    let (lookups, imports) = (watcher.lookups(), watcher.imports());
    let mut task = JoinSet::new();
    task.spawn(watcher.run());
    Asking { one, two, lookups, running: Running { directory, health, _task: task }, imports }
}

fn said(name: &str, addresses: &[&str]) -> SourceEvent {
    let service: ServiceName = name.parse().unwrap();
    let records = if addresses.is_empty() { vec![] } else { vec![fake::record(name, addresses)] };
    SourceEvent::Listed(Listing { records, ..Listing::empty(Scope::Service(service), Epoch::default()) })
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_asked_for_is_followed_and_answered_when_every_source_has_said_what_it_knows() {
    let mut asking = asking(&Arc::default());
    let (lookups, name): (_, ServiceName) = (asking.lookups.clone(), "a.shop".parse().unwrap());
    let mut wanted = asking.one.wanted().await;
    let found = tokio::spawn(async move { lookups.look_up(&name).await });
    let asked = wanted.wait_for(|wanted| !wanted.looked_up.is_empty()).await.unwrap().clone();
    assert_eq!(asked.scopes(), [Scope::Service("a.shop".parse().unwrap())]);
    asking.one.send(said("a.shop", &["10.0.0.1"])).await;
    asking.running.directory_with(|directory| directory.find("a.shop").is_some()).await;
    assert!(!found.is_finished(), "the other source may define it");
    asking.two.send(said("a.shop", &[])).await;
    assert_eq!(found.await.unwrap(), Looked::Found);
    let imports = asking.imports.wait_for(|imports| imports.iter().any(|import| import.known)).await.unwrap().clone();
    assert_eq!((&*imports[0].name, imports[0].why), ("a.shop", Why::LookedUp));
}

#[tokio::test(start_paused = true)]
async fn a_name_nobody_knows_is_nowhere_and_is_forgotten_after_a_minute() {
    let asking = asking(&Arc::default());
    let (lookups, name): (_, ServiceName) = (asking.lookups.clone(), "x.shop".parse().unwrap());
    let mut wanted = asking.one.wanted().await;
    let looked = tokio::spawn(async move { (lookups.look_up(&name).await, Instant::now()) });
    wanted.wait_for(|wanted| !wanted.looked_up.is_empty()).await.unwrap();
    asking.one.send(said("x.shop", &[])).await;
    asking.two.send(said("x.shop", &[])).await;
    let (looked, at) = looked.await.unwrap();
    assert_eq!(looked, Looked::Nowhere);
    wanted.wait_for(|wanted| wanted.looked_up.is_empty()).await.unwrap();
    assert!((60..=71).contains(&at.elapsed().as_secs()), "{:?}", at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_source_that_does_not_answer_is_waited_for_a_second_and_one_that_is_down_not_at_all() {
    let mut asking = asking(&Arc::default());
    let name: ServiceName = "a.shop".parse().unwrap();
    asking.two.send(said("a.shop", &[])).await;
    asking.running.health_with(|health| health[1].last_listed.is_some()).await;
    let began = Instant::now();
    assert_eq!(asking.lookups.look_up(&name).await, Looked::Unsure);
    assert_eq!(began.elapsed().as_millis(), 1000);
    asking.one.fail("connection refused").await;
    asking.running.health_with(|health| !health[0].errors.is_empty()).await;
    let began = Instant::now();
    assert_eq!(asking.lookups.look_up(&name).await, Looked::Unsure);
    assert_eq!(began.elapsed().as_millis(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_was_used_before_a_restart_is_followed_after_it_and_a_name_nobody_knew_is_not() {
    let disk = Arc::new(Memory::default());
    let mut asking_before = asking(&disk);
    for name in ["a.shop", "x.shop"] {
        assert_eq!(asking_before.lookups.look_up(&name.parse().unwrap()).await, Looked::Unsure);
    }
    asking_before.one.send(said("a.shop", &["10.0.0.1"])).await;
    for script in [&asking_before.one, &asking_before.two] {
        script.send(said("x.shop", &[])).await;
    }
    asking_before.two.send(said("a.shop", &[])).await;
    asking_before.imports.wait_for(|imports| imports.iter().any(|import| import.known)).await.unwrap();
    tokio::time::timeout(Duration::from_secs(60), async {
        while !disk.0.lock().unwrap().get("interests").is_some_and(|text| text.contains("a.shop")) {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .unwrap();
    drop(asking_before);
    let asking = asking(&disk);
    let wanted = asking.one.wanted().await.borrow().clone();
    assert_eq!(wanted.looked_up, ["a.shop".parse().unwrap()].into());
}

#[tokio::test(start_paused = true)]
async fn where_files_say_everything_and_where_it_is_declared_nothing_is_looked_up() {
    let (_, files) = fake::source("files");
    let watcher = Watcher::new(vec![files], fake::trust_domain()).looking_up(Arc::<Memory>::default());
    assert!(!watcher.lookups().are_on());
    assert_eq!(watcher.lookups().look_up(&"a.shop".parse().unwrap()).await, Looked::Nowhere);
    let (_, source) = fake::source("one");
    let remote = Configured { belief: Belief::Guarded, ..source };
    let services = ["a.shop".parse().unwrap()].into();
    let watcher = Watcher::new(vec![remote], fake::trust_domain()).wanting(Wanted { services, ..Wanted::default() });
    assert!(!watcher.lookups().are_on());
    assert_eq!((&*watcher.imports().borrow()[0].name, watcher.imports().borrow()[0].why), ("a.shop", Why::Declared));
}

#[tokio::test(start_paused = true)]
async fn policies_reach_the_directory_and_are_there_after_a_restart_with_every_source_away() {
    let keep = Arc::new(Memory::default());
    let service = "payments.shop".parse().unwrap();
    let policies = |directory: &Directory| directory.resources().authorization(&service).count();
    let (script, source) = fake::source("etcd");
    let mut running = start_keeping(vec![Configured { belief: Belief::Guarded, ..source }], keep.clone());
    let records = vec![fake::resources("a", &fake::allowing("payments.shop", "web"))];
    let epoch = Epoch { store: "one".into(), position: 1 };
    let listed = |records, epoch| {
        SourceEvent::Resources(ResourceNews::Listed { prefix: "".into(), epoch, records, refused: vec![] })
    };
    script.send(listed(records, epoch.clone())).await;
    running.directory.wait_for(|directory| policies(directory) == 1).await.unwrap();
    running.health.wait_for(|health| health[0].resources == 1).await.unwrap();
    // An empty answer of the store takes nothing away.
    script.send(listed(vec![], Epoch { position: 2, ..epoch })).await;
    running.health.wait_for(|health| health[0].stale == 1).await.unwrap();
    assert_eq!(policies(&running.directory.borrow()), 1);
    sleep(SAVE_EVERY * 2).await;
    drop((running, script));
    let (_away, source) = fake::source("etcd");
    let running = start_keeping(vec![Configured { belief: Belief::Guarded, ..source }], keep);
    assert_eq!(policies(&running.directory.borrow()), 1);
}

#[tokio::test(start_paused = true)]
async fn who_uses_a_service_uses_what_its_routes_lead_to() {
    let (script, source) = fake::source("etcd");
    let imports = Wanted { services: ["payments.shop".parse().unwrap()].into(), ..Wanted::default() };
    let _running = started(Watcher::new(vec![source], fake::trust_domain()).wanting(imports));
    let mut wanted = script.wanted().await;
    let route = |parent: &str, backend: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{ name: {parent}, namespace: shop }}\nspec: {{ \
             parentRefs: [ {{ group: \"\", kind: Service, name: {parent} }} ], rules: [ {{ backendRefs: [ {{ name: {backend} \
             }} ] }} ] }}\n"
        )
    };
    let records =
        [("payments", "next"), ("other", "elsewhere")].map(|(one, other)| fake::resources(one, &route(one, other)));
    let (prefix, epoch) = ("".into(), Epoch::default());
    let news = ResourceNews::Listed { prefix, epoch, records: records.to_vec(), refused: vec![] };
    script.send(SourceEvent::Resources(news)).await;
    let now = wanted.wait_for(|wanted| wanted.covers(&"next.shop".parse().unwrap())).await.unwrap();
    assert!(!now.covers(&"elsewhere.shop".parse().unwrap()));
}

#[tokio::test(start_paused = true)]
async fn trouble_with_one_kind_says_nothing_of_how_the_source_is() {
    let (script, source) = fake::source("kubernetes");
    let mut running = start(vec![source]);
    script.fail("cannot be reached").await;
    let problems = vec!["HTTPRoute: cannot be reached".to_owned()];
    let refused =
        crate::resources::ResourceChange::Refused(crate::Refused { key: "httproutes/access".into(), problems }.into());
    let (prefix, changes) = ("httproutes/".into(), vec![refused]);
    script.send(SourceEvent::Resources(ResourceNews::Changed { prefix, position: 0, changes })).await;
    let health = running.health_with(|health| health[0].refused_resources == 1).await;
    assert_eq!((health[0].errors.len(), health[0].last_ok), (2, None));
}
