use std::sync::Mutex;

use meshd_identity::TrustDomain;
use serde_json::json;
use tokio::sync::watch as channel;
use tokio::time::{sleep, timeout_at};

use super::super::probe::PROBE_EVERY;
use super::super::read::BASE;
use super::super::remote::{Answer, Content, Pair};
use super::super::watch::TURNS;
use super::*;
use crate::resync::{RESYNC_AT_MOST, RESYNC_EVERY};
use crate::{Scope, fake};

/// A Consul in words: what it holds, how it fails, and what it was asked.
struct Script {
    cluster: &'static str,
    down: bool,
    /// How often, and by what, the question which cluster it is fails yet; and how long each takes.
    slow: (usize, fn() -> Error),
    takes: Duration,
    /// Index and content.
    holds: BTreeMap<Query, (u64, Content)>,
    fails: BTreeMap<Query, &'static str>,
    asked: Vec<String>,
    /// Now, and the most there were.
    connections: usize,
    most_connections: usize,
    /// How often a snapshot was restored.
    restored: usize,
}

struct Fake {
    script: Arc<Mutex<Script>>,
    changed: channel::Sender<()>,
    /// Opened by the first question.
    connection: Option<Connection>,
}

/// Counts while it lives.
struct Connection(Arc<Mutex<Script>>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.lock().unwrap().connections -= 1;
    }
}

fn instances(name: &str) -> Query {
    Query::Instances(name.into())
}

fn documents() -> Query {
    Query::Documents(Some("shop".into()))
}

fn content(service: &str, ids: &[u8]) -> Content {
    let entry = |id: &u8| {
        let meta = json!({ "meshd-transport": "meshd" });
        json!({
            "Node": { "Node": format!("node-{id}"), "Address": format!("10.0.0.{id}") },
            "Service": { "ID": format!("{service}-{id}"), "Service": service, "Port": 80, "Meta": meta },
        })
    };
    Content::Instances(ids.iter().map(|id| entry(id).to_string().into()).collect())
}

impl Fake {
    fn new() -> Fake {
        let holds = BTreeMap::from([
            (Query::Documents(None), (5, Content::Documents(vec![]))),
            (documents(), (5, Content::Documents(vec![]))),
            (Query::Names, (12, Content::Names(vec!["a".into(), "b".into()]))),
            (instances("a"), (11, content("a", &[1]))),
            (instances("b"), (12, content("b", &[2]))),
        ]);
        let script = Script {
            cluster: "one",
            down: false,
            slow: (0, || Error::Scripted("slow")),
            takes: Duration::ZERO,
            holds,
            fails: BTreeMap::new(),
            asked: vec![],
            connections: 0,
            most_connections: 0,
            restored: 0,
        };
        Fake { script: Arc::new(Mutex::new(script)), changed: channel::Sender::new(()), connection: None }
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
        self.changed.send_replace(());
    }

    fn hold(&self, service: &str, index: u64, ids: &[u8]) {
        self.change(|script| drop(script.holds.insert(instances(service), (index, content(service, ids)))));
    }

    fn fail(&self, service: &str, error: Option<&'static str>) {
        self.change(|script| {
            script.fails.remove(&instances(service));
            script.fails.extend(error.map(|error| (instances(service), error)));
        });
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.script.lock().unwrap().asked)
    }

    fn restored(&self) -> usize {
        self.script.lock().unwrap().restored
    }

    fn open(&mut self) {
        self.connection.get_or_insert_with(|| {
            let mut script = self.script.lock().unwrap();
            script.connections += 1;
            script.most_connections = script.most_connections.max(script.connections);
            Connection(self.script.clone())
        });
    }

    /// An answer, if there is one for that index.
    fn answer(&self, query: &Query, index: u64, at_once: bool) -> Option<Result<Answer, Error>> {
        let script = self.script.lock().unwrap();
        if script.down {
            return Some(Err(Error::Scripted("down")));
        }
        if let Some(error) = script.fails.get(query) {
            return Some(Err(Error::Scripted(error)));
        }
        let empty = || (1, content("", &[]));
        let (now, content) = script.holds.get(query).cloned().unwrap_or_else(empty);
        (at_once || now > index || index == 0).then_some(Ok(Answer { index: now, content }))
    }
}

impl Remote for Fake {
    fn another(&self) -> Fake {
        Fake { script: self.script.clone(), changed: self.changed.clone(), connection: None }
    }

    async fn cluster(&mut self) -> Result<Option<Arc<str>>, Error> {
        self.open();
        let takes = self.script.lock().unwrap().takes;
        sleep(takes).await;
        let mut script = self.script.lock().unwrap();
        script.asked.push("cluster".to_owned());
        let (left, error) = script.slow;
        script.slow.0 = left.saturating_sub(1);
        match (script.down, left) {
            (true, _) => Err(Error::Scripted("down")),
            (_, 0) => Ok(Some(script.cluster.into())),
            _ => Err(error()),
        }
    }

    async fn ask(&mut self, query: &Query, index: u64, wait: Duration) -> Result<Answer, Error> {
        self.open();
        self.script.lock().unwrap().asked.push(format!("{query} from {index}"));
        let (until, mut changed) = (Instant::now() + wait, self.changed.subscribe());
        let (before, restored) = (self.answer(query, index, true), self.restored());
        loop {
            if self.restored() != restored {
                // Of the state that was left.
                return before.expect("an answer");
            }
            if let Some(answer) = self.answer(query, index, Instant::now() >= until) {
                return answer;
            }
            // Late is as good as changed.
            let _ = timeout_at(until, changed.changed()).await;
        }
    }
}

struct Running {
    started_with: Wanted,
    consul: Fake,
    wanted: channel::Sender<Wanted>,
    events: mpsc::Receiver<(usize, SourceEvent)>,
    _task: JoinSet<()>,
}

fn wanting(services: &[&str]) -> Wanted {
    Wanted { services: services.iter().map(|name| name.parse().unwrap()).collect(), ..Wanted::default() }
}

fn everything() -> Wanted {
    Wanted { everything: true, ..Wanted::default() }
}

fn start(wanted: Wanted) -> Running {
    start_with(Fake::new(), wanted)
}

fn start_with(consul: Fake, wanted: Wanted) -> Running {
    let started_with = wanted.clone();
    let wanted = channel::Sender::new(wanted);
    let (send, events) = mpsc::channel(64);
    let trust_domain: TrustDomain = fake::trust_domain();
    let reading = Reading { trust_domain, namespace: "shop".into(), base: BASE.into(), resources: None };
    let mut task = JoinSet::new();
    task.spawn(run(consul.another(), reading, wanted.subscribe(), Sink::new(0, send)));
    Running { started_with, consul, wanted, events, _task: task }
}

impl Running {
    /// The next event that is more than a sign of life.
    async fn next(&mut self) -> SourceEvent {
        loop {
            match self.events.recv().await.unwrap().1 {
                SourceEvent::InSync => {}
                SourceEvent::Narrowed(to) if to == self.started_with => {}
                event => return event,
            }
        }
    }

    async fn in_sync(&mut self) {
        while self.events.recv().await.unwrap().1 != SourceEvent::InSync {}
    }

    /// Scope, store, position and how many records. What is there of a wide scope is told before.
    async fn listed(&mut self) -> (Scope, String, u64, usize) {
        loop {
            match self.next().await {
                SourceEvent::Listed(listing) => {
                    let (store, position) = (listing.epoch.store.to_string(), listing.epoch.position);
                    return (listing.scope, store, position, listing.records.len());
                }
                SourceEvent::Changed { position: 0, .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn changed(&mut self) -> (Scope, u64, usize) {
        match self.next().await {
            SourceEvent::Changed { scope, position, changes } => (scope, position, changes.len()),
            other => panic!("{other:?}"),
        }
    }

    async fn trouble(&mut self) -> String {
        match self.next().await {
            SourceEvent::Unavailable { error } | SourceEvent::Troubled { error } => error,
            other => panic!("{other:?}"),
        }
    }
}

fn shop(name: &str) -> Scope {
    Scope::Service(format!("{name}.shop").parse().unwrap())
}

#[tokio::test(start_paused = true)]
async fn each_service_wanted_is_listed_and_its_changes_are_told_at_once() {
    let mut running = start(wanting(&["a.shop"]));
    assert_eq!(running.listed().await, (shop("a"), "one".into(), 11, 1));
    let changed_at = Instant::now();
    running.consul.hold("a", 13, &[1, 3]);
    assert_eq!(running.changed().await, (shop("a"), 13, 1));
    assert!(changed_at.elapsed() <= Duration::from_millis(100), "{:?}", changed_at.elapsed());
    let asked = running.consul.asked();
    for question in [
        "cluster",
        "service `a` from 0",
        "the documents of namespace `shop` in its store from 0",
        "service `a` from 11",
    ] {
        assert!(asked.iter().any(|asked| asked == question), "{question}: {asked:?}");
    }
    assert!(!asked.iter().any(|asked| asked.contains("`b`") || asked.contains("names of")), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn with_everything_wanted_names_that_come_are_followed_too() {
    let mut running = start(everything());
    assert_eq!(running.listed().await, (Scope::Everything, "one".into(), 12, 2));
    running.consul.change(|script| {
        script.holds.insert(Query::Names, (14, Content::Names(vec!["a".into(), "b".into(), "c".into()])));
        script.holds.insert(instances("c"), (14, content("c", &[3])));
    });
    assert_eq!(running.changed().await, (Scope::Everything, 14, 1));
}

#[tokio::test(start_paused = true)]
async fn a_catalog_whose_index_went_back_is_read_whole_before_it_is_told_as_another_position() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.consul.change(|script| {
        script.holds.insert(instances("a"), (3, content("a", &[])));
        script.holds.insert(documents(), (1, Content::Documents(vec![])));
    });
    // A blocking query from beyond the index waits for its time.
    assert_eq!(running.listed().await, (shop("a"), "one".into(), 0, 0));
    assert_eq!(running.changed().await, (shop("a"), 3, 0));
    running.consul.hold("a", 4, &[1]);
    assert_eq!(running.changed().await, (shop("a"), 4, 1));
}

#[tokio::test(start_paused = true)]
async fn another_cluster_is_noticed_by_the_next_probe_and_told_as_another_store() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    let began = Instant::now();
    running.consul.change(|script| script.cluster = "two");
    assert_eq!(running.listed().await, (shop("a"), "two".into(), 11, 1));
    assert!(began.elapsed() <= PROBE_EVERY + Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn while_consul_is_down_one_question_is_asked_ever_less_often_and_it_is_found_again() {
    let mut running = start(wanting(&["a.shop", "b.shop"]));
    running.listed().await;
    running.listed().await;
    running.consul.change(|script| script.down = true);
    assert_eq!(running.trouble().await, "down");
    // The probe ends the watches.
    assert_eq!(running.trouble().await, "down");
    running.consul.asked();
    let down_at = Instant::now();
    while down_at.elapsed() < Duration::from_secs(60) {
        assert_eq!(running.trouble().await, "down");
    }
    let asked = running.consul.asked();
    assert!((12..=40).contains(&asked.len()) && asked.iter().all(|asked| asked == "cluster"), "{asked:?}");
    running.consul.change(|script| {
        script.down = false;
        script.holds.insert(instances("a"), (20, content("a", &[7])));
    });
    running.in_sync().await;
    assert_eq!(running.changed().await, (shop("a"), 20, 2));
}

#[tokio::test(start_paused = true)]
async fn a_query_that_fails_is_named_while_the_others_go_on_and_its_end_is_told() {
    let mut running = start(wanting(&["a.shop", "b.shop"]));
    running.listed().await;
    running.listed().await;
    running.consul.fail("a", Some("forbidden"));
    assert_eq!(running.trouble().await, "forbidden");
    running.consul.hold("b", 15, &[2, 3]);
    assert_eq!(running.changed().await, (shop("b"), 15, 1));
    assert_eq!(running.trouble().await, "forbidden", "news of one service do not make the other one well");
    let well_at = Instant::now();
    running.consul.fail("a", None);
    running.in_sync().await;
    assert!(well_at.elapsed() <= Duration::from_secs(6), "{:?}", well_at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_at_the_start_is_no_list_without_it_and_what_can_be_is_told() {
    let consul = Fake::new();
    consul.fail("b", Some("hidden"));
    let mut running = start_with(consul, everything());
    let mut told = 0;
    while told == 0 {
        match running.next().await {
            SourceEvent::Changed { position: 0, changes, .. } => told += changes.len(),
            SourceEvent::Troubled { error } => assert_eq!(error, "hidden"),
            other => panic!("{other:?}"),
        }
    }
    running.consul.hold("a", 20, &[1, 2, 3]);
    loop {
        match running.next().await {
            SourceEvent::Changed { position: 0, changes, .. } if changes.len() >= 2 => break,
            SourceEvent::Changed { .. } | SourceEvent::Troubled { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    running.consul.fail("b", None);
    loop {
        match running.next().await {
            SourceEvent::Listed(listing) => {
                assert!(listing.records.len() == 4 && listing.epoch.position == 20, "{listing:?}");
                return;
            }
            SourceEvent::Changed { position: 0, .. } | SourceEvent::Troubled { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_index_that_changes_in_a_storm_is_followed_ten_times_a_second() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.consul.asked();
    let began = Instant::now();
    let mut index = 100;
    while began.elapsed() < Duration::from_secs(3) {
        index += 1;
        running.consul.hold("a", index, &[1, (index % 100) as u8 + 2]);
        tokio::time::advance(Duration::from_millis(5)).await;
        while running.events.try_recv().is_ok() {}
    }
    let asked = running.consul.asked().iter().filter(|asked| asked.starts_with("service `a`")).count();
    assert!((25..=32).contains(&asked), "{asked} in three seconds");
}

#[tokio::test(start_paused = true)]
async fn all_is_asked_once_more_every_few_minutes_and_when_somebody_asks() {
    let mut running = start(wanting(&["a.shop", "b.shop"]));
    running.listed().await;
    running.listed().await;
    let listed_at = Instant::now();
    running.listed().await;
    running.listed().await;
    assert!(listed_at.elapsed() >= RESYNC_EVERY.mul_f64(0.8) && listed_at.elapsed() <= RESYNC_EVERY.mul_f64(1.2));
    tokio::time::advance(RESYNC_AT_MOST).await;
    let asked_at = Instant::now();
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    running.listed().await;
    running.listed().await;
    assert!(asked_at.elapsed() <= RESYNC_AT_MOST, "{:?}", asked_at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_suspect_is_asked_for_once_more_by_itself_and_beside_its_watch() {
    for wanted in [everything(), wanting(&["a.shop", "b.shop"])] {
        let mut running = start(wanted);
        running.listed().await;
        running.in_sync().await;
        running.consul.asked();
        running.wanted.send_modify(|wanted| wanted.reread = [("b.shop".parse().unwrap(), 1)].into());
        running.in_sync().await;
        let asked: Vec<_> = running.consul.asked().into_iter().filter(|asked| asked != "cluster").collect();
        assert_eq!(asked, ["service `b` from 0"]);
        // Its watch goes on.
        running.consul.hold("b", 15, &[2, 3]);
        assert_eq!(running.changed().await.1, 15);
    }
}

#[tokio::test(start_paused = true)]
async fn who_asks_for_resyncs_without_end_gets_one_a_second() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    let began = Instant::now();
    let mut lists = 0;
    while began.elapsed() < Duration::from_secs(5) {
        running.wanted.send_modify(|wanted| wanted.resync += 1);
        tokio::time::advance(Duration::from_millis(50)).await;
        while let Ok((_, event)) = running.events.try_recv() {
            lists += usize::from(matches!(event, SourceEvent::Listed(_)));
        }
    }
    assert!((3..=6).contains(&lists), "{lists} in five seconds");
}

#[tokio::test(start_paused = true)]
async fn what_is_no_longer_wanted_is_neither_asked_nor_kept() {
    let mut running = start(wanting(&["a.shop", "b.shop"]));
    running.listed().await;
    running.listed().await;
    tokio::time::advance(Duration::from_millis(1)).await;
    running.wanted.send_replace(wanting(&["b.shop", "c.shop"]));
    assert!(matches!(running.next().await, SourceEvent::Narrowed(to) if to == wanting(&["b.shop", "c.shop"])));
    let (scope, _, _, records) = running.listed().await;
    assert_eq!((scope, records), (shop("c"), 0));
    running.consul.asked();
    running.consul.hold("a", 30, &[9]);
    running.consul.hold("b", 31, &[9]);
    assert_eq!(running.changed().await.0, shop("b"));
    assert!(!running.consul.asked().iter().any(|asked| asked.contains("`a`")));
}

#[tokio::test(start_paused = true)]
async fn more_services_than_connections_allowed_take_turns_and_all_are_followed() {
    let names: Vec<String> = (0..3 * TURNS).map(|n| format!("s{n}")).collect();
    let consul = Fake::new();
    consul.change(|script| {
        let all = names.iter().map(|name| name.as_str().into()).collect();
        script.holds.insert(Query::Names, (12, Content::Names(all)));
    });
    let mut running = start_with(consul, everything());
    assert_eq!(running.listed().await.3, 0);
    for (n, name) in names.iter().enumerate().step_by(97) {
        let changed_at = Instant::now();
        running.consul.hold(name, 100 + n as u64, &[1]);
        assert_eq!(running.changed().await.2, 1);
        // Three turns of 5 s.
        assert!(changed_at.elapsed() <= Duration::from_secs(15), "{:?}", changed_at.elapsed());
    }
    // Documents, names and the probe besides.
    let most = running.consul.script.lock().unwrap().most_connections;
    assert!((TURNS..=TURNS + 3).contains(&most), "{most}");
}

#[tokio::test(start_paused = true)]
async fn a_host_that_wants_nothing_asks_for_nothing_but_a_sign_of_life() {
    let mut running = start(Wanted::default());
    assert_eq!(running.events.recv().await.unwrap().1, SourceEvent::Narrowed(Wanted::default()));
    assert_eq!(running.events.recv().await.unwrap().1, SourceEvent::InSync);
    assert_eq!(running.events.recv().await.unwrap().1, SourceEvent::InSync);
    assert!(running.consul.asked().iter().all(|asked| asked == "cluster"));
}

#[tokio::test(start_paused = true)]
async fn a_restored_snapshot_is_another_life_though_every_index_went_on() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    // Past the first questions from the index that was read.
    sleep(Duration::from_secs(1)).await;
    let restored_at = Instant::now();
    running.consul.change(|script| {
        script.restored += 1;
        script.holds.insert(instances("a"), (30, content("a", &[])));
    });
    assert_eq!(running.listed().await, (shop("a"), "one".into(), 0, 0));
    assert!(restored_at.elapsed() < Duration::from_secs(2), "{:?}", restored_at.elapsed());
    assert_eq!(running.changed().await, (shop("a"), 30, 0));
}

#[tokio::test(start_paused = true)]
async fn one_index_that_went_back_is_another_life_though_others_went_on() {
    let mut running = start(everything());
    running.listed().await;
    running.consul.change(|script| {
        script.holds.insert(instances("a"), (3, content("a", &[])));
        script.holds.insert(Query::Names, (40, Content::Names(vec!["a".into(), "b".into()])));
    });
    assert_eq!(running.listed().await, (Scope::Everything, "one".into(), 0, 1));
    assert_eq!(running.changed().await, (Scope::Everything, 40, 0));
}

#[tokio::test(start_paused = true)]
async fn an_index_of_the_documents_that_falls_is_no_other_life_and_they_are_followed_on() {
    let document = |modified| Pair { key: format!("{BASE}/shop/a/service"), modified, value: b"kind: [".to_vec() };
    let consul = Fake::new();
    consul.change(|script| drop(script.holds.insert(documents(), (50, Content::Documents(vec![])))));
    let mut running = start_with(consul, wanting(&["a.shop"]));
    assert_eq!(running.listed().await, (shop("a"), "one".into(), 11, 1));
    running.consul.change(|script| drop(script.holds.insert(documents(), (20, Content::Documents(vec![])))));
    sleep(Duration::from_secs(120)).await;
    assert_eq!(running.consul.asked().iter().filter(|asked| *asked == "service `a` from 0").count(), 1);
    running
        .consul
        .change(|script| drop(script.holds.insert(documents(), (30, Content::Documents(vec![document(30)])))));
    assert_eq!(running.changed().await, (shop("a"), 11, 1));
}

/// The questions that all is read anew by.
fn from_zero(asked: &[String]) -> usize {
    asked.iter().filter(|asked| asked.ends_with("from 0")).count()
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_takes_long_holds_up_no_news_and_one_that_fails_takes_no_watch_down() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.consul.asked();
    running.consul.change(|script| (script.takes, script.slow.0) = (Duration::from_secs(5), 1));
    sleep(PROBE_EVERY).await;
    let changed_at = Instant::now();
    running.consul.hold("a", 13, &[1, 3]);
    assert_eq!(running.changed().await, (shop("a"), 13, 1));
    assert!(changed_at.elapsed() <= Duration::from_millis(200), "{:?}", changed_at.elapsed());
    assert_eq!(running.trouble().await, "slow");
    running.in_sync().await;
    let asked = running.consul.asked();
    assert_eq!(from_zero(&asked), 0, "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn of_two_probes_that_fail_the_second_has_all_begun_anew_unless_consul_is_busy() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.consul.asked();
    running.consul.change(|script| script.slow = (5, || Error::TooMany("later".to_owned())));
    assert!(running.trouble().await.contains("takes no more requests"));
    running.in_sync().await;
    let asked = running.consul.asked();
    assert!(asked.iter().filter(|asked| *asked == "cluster").count() >= 5 && from_zero(&asked) == 0, "{asked:?}");
    running.consul.change(|script| script.slow = (2, || Error::Scripted("slow")));
    assert_eq!(running.trouble().await, "slow");
    assert_eq!(running.trouble().await, "slow");
    running.in_sync().await;
    running.consul.hold("a", 13, &[1, 3]);
    assert_eq!(running.changed().await.0, shop("a"));
    assert!(from_zero(&running.consul.asked()) >= 2);
}
