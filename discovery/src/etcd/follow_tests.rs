use std::sync::Mutex;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::*;
use crate::resync::RESYNC_EVERY;
use crate::{Record, fake};

/// An etcd in words: what it holds, how it fails, and what it was asked.
#[derive(Default)]
struct Script {
    store: &'static str,
    revision: u64,
    records: Vec<Record>,
    down: bool,
    with_resources: bool,
    forbidden: bool,
    documents: Vec<ResourceChange>,
    /// How long lists take.
    slow: Duration,
    /// How many of them come to nothing from now on.
    failing_lists: usize,
    asked: Vec<String>,
    watches: Vec<mpsc::Sender<Result<News, Error>>>,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<Script>>);

struct FakeWatches {
    news: mpsc::Receiver<Result<News, Error>>,
    script: Arc<Mutex<Script>>,
}

impl Fake {
    fn new() -> Fake {
        let records = vec![fake::record("a.shop", &["10.0.0.1"]), fake::record("b.shop", &["10.0.0.2"])];
        Fake(Arc::new(Mutex::new(Script { store: "one", revision: 10, records, ..Script::default() })))
    }

    fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.0.lock().unwrap());
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().asked)
    }

    fn up(&self, call: String) -> Result<(), Error> {
        let mut script = self.0.lock().unwrap();
        script.asked.push(call);
        if script.down { Err(Error::gone("scripted")) } else { Ok(()) }
    }

    fn listed(&self, part: &Part) -> Result<Listed, Error> {
        let mut script = self.0.lock().unwrap();
        if script.failing_lists > 0 {
            script.failing_lists -= 1;
            return Err(Error::gone("scripted"));
        }
        let epoch = Epoch { store: script.store.into(), position: script.revision };
        let Part::Services(scope) = part else {
            let told = script.documents.iter().cloned().map(Told::Resource).collect();
            return if script.forbidden { Err(Error::forbidden("scripted")) } else { Ok(Listed { epoch, told }) };
        };
        let records = script.records.iter().filter(|record| scope.holds(&record.service)).cloned();
        Ok(Listed { epoch, told: records.map(|record| Told::Service(Change::Set(record))).collect() })
    }

    async fn tell(&self, news: News) {
        let watch = self.0.lock().unwrap().watches.last().unwrap().clone();
        watch.send(Ok(news)).await.unwrap();
    }

    /// What the present watches are broken by.
    async fn break_off(&self) {
        let watch = self.0.lock().unwrap().watches.last().unwrap().clone();
        watch.send(Err(Error::gone("cut"))).await.unwrap();
    }
}

impl Remote for Fake {
    type Watches = FakeWatches;

    fn another(&self) -> Fake {
        self.clone()
    }

    async fn list(&mut self, part: &Part) -> Result<Listed, Error> {
        self.up(format!("list {part:?}"))?;
        let listed = self.listed(part);
        let slow = self.0.lock().unwrap().slow;
        sleep(slow).await;
        listed
    }

    /// Keys are names of services here.
    fn service_of(&self, key: &str) -> Option<ServiceName> {
        key.parse().ok()
    }

    async fn probe(&mut self) -> Result<Epoch, Error> {
        self.up("probe".to_owned())?;
        let script = self.0.lock().unwrap();
        Ok(Epoch { store: script.store.into(), position: script.revision })
    }

    fn resources(&self) -> Option<Arc<str>> {
        self.0.lock().unwrap().with_resources.then(|| "resources".into())
    }

    async fn watch(&mut self, id: i64, part: &Part, from: u64) -> Result<FakeWatches, Error> {
        self.up(format!("watch {id} {part:?} from {from}"))?;
        let (send, news) = mpsc::channel(8);
        self.0.lock().unwrap().watches.push(send);
        Ok(FakeWatches { news, script: self.0.clone() })
    }

    async fn add(&mut self, _: &mut FakeWatches, id: i64, part: &Part, from: u64) -> Result<(), Error> {
        self.up(format!("add {id} {part:?} from {from}"))
    }

    fn leave_member(&mut self) {
        self.0.lock().unwrap().asked.push("leave".to_owned());
    }
}

impl Stream for FakeWatches {
    async fn next(&mut self) -> Result<News, Error> {
        self.news.recv().await.unwrap_or_else(|| Err(Error::gone("dropped")))
    }

    async fn cancel(&mut self, id: i64) -> Result<(), Error> {
        self.script.lock().unwrap().asked.push(format!("cancel {id}"));
        Ok(())
    }
}

struct Running {
    started_with: Wanted,
    etcd: Fake,
    wanted: watch::Sender<Wanted>,
    events: mpsc::Receiver<(usize, SourceEvent)>,
    _task: JoinSet<()>,
}

fn wanting(services: &[&str]) -> Wanted {
    Wanted { services: services.iter().map(|name| name.parse().unwrap()).collect(), ..Wanted::default() }
}

fn start(wanted: Wanted) -> Running {
    start_with(Fake::new(), wanted)
}

fn start_with(etcd: Fake, wanted: Wanted) -> Running {
    let started_with = wanted.clone();
    let wanted = watch::Sender::new(wanted);
    let (send, events) = mpsc::channel(64);
    let mut task = JoinSet::new();
    task.spawn(run(etcd.clone(), wanted.subscribe(), Sink::new(0, send)));
    Running { started_with, etcd, wanted, events, _task: task }
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

    async fn listed(&mut self) -> (Scope, u64, usize) {
        match self.next().await {
            SourceEvent::Listed(listing) => (listing.scope, listing.epoch.position, listing.records.len()),
            other => panic!("{other:?}"),
        }
    }
}

fn shop(name: &str) -> Scope {
    Scope::Service(format!("{name}.shop").parse().unwrap())
}

fn news(id: i64, revisions: &[u64]) -> News {
    let change = |revision: &u64| (*revision, Told::Service(Change::Set(fake::record("a.shop", &["10.0.0.9"]))));
    News { id, changes: revisions.iter().map(change).collect(), ..News::default() }
}

#[tokio::test(start_paused = true)]
async fn each_service_wanted_is_listed_and_watched_from_there() {
    let mut running = start(wanting(&["a.shop", "b.shop"]));
    assert_eq!(running.listed().await, (shop("a"), 10, 1));
    assert_eq!(running.listed().await, (shop("b"), 10, 1));
    running.etcd.tell(news(1, &[11, 12])).await;
    let SourceEvent::Changed { scope, position, changes } = running.next().await else { panic!("no change") };
    assert_eq!((scope, position, changes.len()), (shop("a"), 12, 2));
    let asked = running.etcd.asked();
    assert!(asked.iter().any(|call| call.starts_with("watch 1 Service") && call.ends_with("from 11")), "{asked:?}");
    assert!(asked.iter().any(|call| call.starts_with("add 2 Service") && call.ends_with("from 11")), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn after_a_broken_watch_it_goes_on_where_it_was_on_another_member_without_a_list() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.etcd.tell(news(1, &[14])).await;
    running.next().await;
    running.etcd.change(|script| script.revision = 14);
    running.etcd.asked();
    running.etcd.break_off().await;
    assert!(matches!(running.next().await, SourceEvent::Unavailable { error } if error.contains("cut")));
    while running.events.recv().await.unwrap().1 != SourceEvent::InSync {}
    let asked = running.etcd.asked();
    assert_eq!(asked[..2], ["leave", "probe"]);
    assert!(asked[2].starts_with("watch 2") && asked[2].ends_with("from 15"), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn within_a_minute_after_a_break_all_is_read_again_for_the_sake_of_what_no_watch_tells() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    // Put back, and further on than it was.
    running.etcd.change(|script| (script.revision, script.records) = (20, vec![]));
    running.etcd.break_off().await;
    let broken_at = Instant::now();
    assert!(matches!(running.next().await, SourceEvent::Unavailable { .. }));
    assert_eq!(running.listed().await, (shop("a"), 20, 0));
    assert!(broken_at.elapsed() < Duration::from_secs(62), "{:?}", broken_at.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_was_compacted_is_listed_again_and_nobody_is_told_of_trouble() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.etcd.change(|script| script.revision = 99);
    running.etcd.tell(News { id: 1, compacted: true, ..News::default() }).await;
    assert_eq!(running.listed().await, (shop("a"), 99, 1));
}

#[tokio::test(start_paused = true)]
async fn another_cluster_or_one_put_back_is_read_anew_at_the_next_probe() {
    for (store, revision) in [("two", 50), ("one", 3)] {
        let mut running = start(wanting(&["a.shop"]));
        running.listed().await;
        running.etcd.change(|script| (script.store, script.revision) = (store, revision));
        let SourceEvent::Listed(listing) = running.next().await else { panic!("no list") };
        assert_eq!((&*listing.epoch.store, listing.epoch.position), (store, revision));
    }
}

#[tokio::test(start_paused = true)]
async fn old_news_after_a_list_is_passed_over() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.etcd.change(|script| script.revision = 20);
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    assert_eq!(running.listed().await, (shop("a"), 20, 1));
    running.etcd.tell(news(1, &[15, 20, 21])).await;
    let SourceEvent::Changed { position, changes, .. } = running.next().await else { panic!("no change") };
    assert_eq!((position, changes.len()), (21, 1));
}

fn everything() -> Wanted {
    Wanted { everything: true, ..Wanted::default() }
}

impl Running {
    fn suspect(&self, service: &str) {
        self.wanted.send_modify(|wanted| {
            let number = wanted.reread.values().max().map_or(1, |last| last + 1);
            wanted.reread.insert(service.parse().unwrap(), number);
        });
    }

    /// What was asked for beside probes since the last time, until the next sign of life but one.
    async fn asked(&mut self) -> Vec<String> {
        for _ in 0..2 {
            while self.events.recv().await.unwrap().1 != SourceEvent::InSync {}
        }
        self.etcd.asked().into_iter().filter(|call| call != "probe").collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_suspect_is_read_again_by_itself_and_nothing_else() {
    let mut running = start(wanting(&["a.shop", "b.shop"]));
    running.listed().await;
    running.listed().await;
    running.asked().await;
    running.suspect("b.shop");
    assert_eq!(running.listed().await, (shop("b"), 10, 1));
    // Nobody follows that one any more.
    running.suspect("c.shop");
    assert_eq!(running.asked().await, [format!("list {:?}", shop("b"))]);
}

#[tokio::test(start_paused = true)]
async fn a_suspect_of_a_pattern_is_read_again_without_the_rest_of_it() {
    let mut running = start(everything());
    assert_eq!(running.listed().await, (Scope::Everything, 10, 2));
    running.asked().await;
    running.etcd.change(|script| script.revision = 20);
    running.suspect("a.shop");
    let SourceEvent::Reread { within, listing } = running.next().await else { panic!("not read again") };
    assert_eq!((within, listing.scope, listing.epoch.position), (Scope::Everything, shop("a"), 20));
    assert_eq!(listing.records.len(), 1);
    assert_eq!(running.asked().await, [format!("list {:?}", shop("a"))]);
    // Of this service that is old news, and of no other.
    let change = |revision, name| (revision, Told::Service(Change::Set(fake::record(name, &["10.0.0.9"]))));
    let changes = vec![change(15, "a.shop"), change(16, "b.shop"), change(21, "a.shop")];
    running.etcd.tell(News { id: 1, changes, ..News::default() }).await;
    let SourceEvent::Changed { position, changes, .. } = running.next().await else { panic!("no change") };
    assert_eq!((position, changes.len()), (21, 2));
}

#[tokio::test(start_paused = true)]
async fn what_happens_during_a_list_is_told_first_and_holds() {
    for (wanted, again) in
        [(everything(), None), (everything(), Some("a.shop")), (wanting(&["a.shop"]), Some("a.shop"))]
    {
        let mut running = start(wanted);
        running.listed().await;
        running.asked().await;
        running.etcd.change(|script| script.slow = Duration::from_millis(500));
        match again {
            Some(service) => running.suspect(service),
            None => running.wanted.send_modify(|wanted| wanted.resync += 1),
        }
        sleep(Duration::from_millis(100)).await;
        let began = Instant::now();
        running.etcd.tell(news(1, &[11])).await;
        assert!(matches!(running.next().await, SourceEvent::Changed { position: 11, .. }));
        assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
        let (SourceEvent::Listed(listing) | SourceEvent::Reread { listing, .. }) = running.next().await else {
            panic!("no list")
        };
        let moved = listing.records.iter().find(|record| record.service.as_str() == "a.shop").unwrap();
        assert_eq!((listing.epoch.position, &moved.places), (11, &fake::record("a.shop", &["10.0.0.9"]).places));
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_that_comes_to_nothing_costs_no_watch_and_is_made_again() {
    for wanted in [everything(), wanting(&["a.shop"])] {
        let mut running = start(wanted);
        running.listed().await;
        running.asked().await;
        running.etcd.change(|script| script.failing_lists = 2);
        running.suspect("a.shop");
        assert!(matches!(running.next().await, SourceEvent::Listed(_) | SourceEvent::Reread { .. }));
        let asked = running.asked().await;
        assert!(asked.len() == 3 && asked.iter().all(|call| *call == format!("list {:?}", shop("a"))), "{asked:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_of_another_store_than_that_of_the_watches_begins_all_anew() {
    let mut running = start(everything());
    running.listed().await;
    running.etcd.change(|script| (script.store, script.slow) = ("two", Duration::ZERO));
    running.suspect("a.shop");
    assert_eq!(running.listed().await, (Scope::Everything, 10, 2));
}

#[tokio::test(start_paused = true)]
async fn a_resync_asked_for_while_it_is_away_is_done_when_it_is_back() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.etcd.change(|script| script.down = true);
    running.etcd.break_off().await;
    assert!(matches!(running.next().await, SourceEvent::Unavailable { .. }));
    assert!(matches!(running.next().await, SourceEvent::Unavailable { .. }));
    running.wanted.send_modify(|wanted| wanted.resync += 1);
    running.etcd.change(|script| script.down = false);
    let back = Instant::now();
    running.listed().await;
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_is_no_longer_wanted_is_neither_watched_nor_kept() {
    let mut running = start(wanting(&["a.shop", "b.shop"]));
    running.listed().await;
    running.listed().await;
    running.wanted.send_replace(wanting(&["b.shop", "c.shop"]));
    assert!(matches!(running.next().await, SourceEvent::Narrowed(to) if to == wanting(&["b.shop", "c.shop"])));
    assert_eq!(running.listed().await, (shop("c"), 10, 0));
    tokio::task::yield_now().await;
    let asked = running.etcd.asked();
    assert!(asked.contains(&"cancel 1".to_owned()), "{asked:?}");
    // What was on its way of the watch that is over changes nothing.
    running.etcd.tell(news(1, &[30])).await;
    running.etcd.tell(News { id: 1, ended: Some("cancelled".into()), ..News::default() }).await;
    running.etcd.tell(news(2, &[31])).await;
    assert!(matches!(running.next().await, SourceEvent::Changed { scope, .. } if scope == shop("b")));
}

#[tokio::test(start_paused = true)]
async fn while_etcd_is_down_it_is_asked_ever_less_often_and_found_again() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.etcd.change(|script| script.down = true);
    running.etcd.asked();
    let down_at = Instant::now();
    while down_at.elapsed() < Duration::from_secs(60) {
        assert!(matches!(running.next().await, SourceEvent::Unavailable { error } if error.contains("scripted")));
    }
    let probes = running.etcd.asked().iter().filter(|call| *call == "probe").count();
    assert!((12..=40).contains(&probes), "{probes} in a minute");
    running.etcd.change(|script| script.down = false);
    while running.events.recv().await.unwrap().1 != SourceEvent::InSync {}
}

#[tokio::test(start_paused = true)]
async fn everything_is_read_again_every_few_minutes() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    let listed_at = Instant::now();
    running.listed().await;
    assert!(listed_at.elapsed() >= RESYNC_EVERY.mul_f64(0.8) && listed_at.elapsed() <= RESYNC_EVERY.mul_f64(1.2));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_etcd_refuses_is_named_as_trouble() {
    let mut running = start(wanting(&["a.shop"]));
    running.listed().await;
    running.etcd.tell(News { id: -1, ended: Some("etcdserver: permission denied".into()), ..News::default() }).await;
    assert!(matches!(running.next().await, SourceEvent::Unavailable { error } if error.contains("permission denied")));
}

#[tokio::test(start_paused = true)]
async fn a_host_that_wants_nothing_asks_for_nothing_but_a_sign_of_life() {
    let mut running = start(Wanted::default());
    assert_eq!(running.events.recv().await.unwrap().1, SourceEvent::Narrowed(Wanted::default()));
    assert_eq!(running.events.recv().await.unwrap().1, SourceEvent::InSync);
    assert_eq!(running.events.recv().await.unwrap().1, SourceEvent::InSync);
    assert!(running.etcd.asked().iter().all(|call| call == "probe"));
}

const ROUTE: &str = "apiVersion: gateway.networking.k8s.io/v1alpha2\nkind: TCPRoute\nmetadata: { name: split, namespace: \
                     shop }\nspec: { parentRefs: [ { group: \"\", kind: Service, name: c } ], rules: [ { backendRefs: [ { \
                     name: d } ] } ] }\n";

/// A route of c.shop.
fn with_a_route() -> Fake {
    let etcd = Fake::new();
    let key = "resources/shop/tcproute/split";
    let stored = crate::resources::StoredKey::read("resources", key).unwrap();
    let route = stored.document(key, ROUTE.as_bytes(), &fake::trust_domain());
    etcd.change(|script| (script.with_resources, script.documents) = (true, vec![route]));
    etcd
}

fn records(event: SourceEvent) -> usize {
    match event {
        SourceEvent::Resources(ResourceNews::Listed { records, .. }) => records.len(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn routes_are_read_before_services_and_again_when_a_service_is_new() {
    let mut running = start_with(with_a_route(), wanting(&["a.shop"]));
    assert_eq!(records(running.next().await), 0, "of a service nobody wants");
    assert_eq!(running.listed().await, (shop("a"), 10, 1));
    let asked = running.etcd.asked();
    assert!(asked.contains(&"watch 1 Resources from 11".to_owned()), "{asked:?}");
    running.wanted.send_replace(wanting(&["a.shop", "c.shop"]));
    assert_eq!(records(running.next().await), 1);
    assert_eq!(running.listed().await, (shop("c"), 10, 0));
    tokio::task::yield_now().await;
    assert!(running.etcd.asked().contains(&"cancel 1".to_owned()));
    let id = 3;
    let removed = Told::Resource(ResourceChange::Removed("resources/shop/tcproute/split".into()));
    running.etcd.tell(News { id, changes: vec![(12, removed)], ..News::default() }).await;
    let SourceEvent::Resources(ResourceNews::Changed { position, changes, .. }) = running.next().await else {
        panic!("no change")
    };
    assert_eq!((position, changes.len()), (12, 1));
}

#[tokio::test(start_paused = true)]
async fn several_new_services_are_listed_before_they_are_watched() {
    let mut running = start_with(with_a_route(), wanting(&["a.shop"]));
    assert_eq!(records(running.next().await), 0);
    assert_eq!(running.listed().await, (shop("a"), 10, 1));
    running.wanted.send_replace(wanting(&["a.shop", "c.shop", "d.shop", "e.shop"]));
    assert_eq!(records(running.next().await), 1);
    for name in ["c", "d", "e"] {
        assert_eq!(running.listed().await, (shop(name), 10, 0));
    }
    tokio::task::yield_now().await;
    let asked = running.etcd.asked();
    assert!(!asked.iter().any(|call| call.ends_with("from 1")), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn routes_that_may_not_be_read_are_told_and_cost_no_service() {
    let etcd = with_a_route();
    etcd.change(|script| script.forbidden = true);
    let mut running = start_with(etcd, wanting(&["a.shop"]));
    let SourceEvent::Resources(ResourceNews::Changed { changes, .. }) = running.next().await else { panic!("silent") };
    assert!(
        matches!(&changes[..], [ResourceChange::Refused(refused)] if refused.problems[0].contains("grant the user"))
    );
    assert_eq!(running.listed().await, (shop("a"), 10, 1));
    running.etcd.change(|script| script.forbidden = false);
    assert_eq!(records(running.next().await), 0, "at the next time all is read");
}
