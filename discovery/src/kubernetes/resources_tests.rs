use std::sync::Mutex;

use serde_json::json;
use tokio::sync::mpsc;

use super::*;
use crate::Namespaces;
use crate::fake::trust_domain;

#[derive(Default)]
struct Script {
    objects: Vec<Value>,
    fails: Option<fn() -> Error>,
    lists: usize,
    watches: Vec<mpsc::Sender<Value>>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

struct FakeWatch(mpsc::Receiver<Value>);

impl Server for Fake {
    type Watch = FakeWatch;

    async fn list(&mut self, _: Kind) -> Result<(Vec<Value>, String), Error> {
        let mut script = self.0.lock().unwrap();
        script.lists += 1;
        script.fails.map_or_else(|| Ok((script.objects.clone(), "7".to_owned())), |error| Err(error()))
    }

    async fn watch(&mut self, _: Kind, from: &str) -> Result<FakeWatch, Error> {
        assert_eq!(from, "7");
        let (send, events) = mpsc::channel(8);
        self.0.lock().unwrap().watches.push(send);
        Ok(FakeWatch(events))
    }

    fn leave(&mut self) {}
}

impl Watch for FakeWatch {
    async fn next(&mut self) -> Result<Option<Value>, Error> {
        Ok(self.0.recv().await)
    }
}

struct Bed {
    server: Fake,
    life: watch::Sender<Life>,
    wanted: watch::Sender<Wanted>,
    events: mpsc::Receiver<(usize, SourceEvent)>,
    _task: JoinSet<()>,
}

impl Bed {
    fn start(objects: Vec<Value>) -> Bed {
        let server = Fake::default();
        server.0.lock().unwrap().objects = objects;
        let known = Life { epoch: Epoch { store: "one".into(), position: 5 }, connection: 0 };
        let (life, wanted) =
            (watch::Sender::new(known), watch::Sender::new(Wanted { everything: true, ..Wanted::default() }));
        let (send, events) = mpsc::channel(64);
        let provides = Provides { routes: Namespaces::new(["shop"]).unwrap(), ..Provides::default() };
        let followed = Followed {
            kinds: vec![Kind::HTTPRoute],
            provides,
            trust_domain: trust_domain(),
            wanted: wanted.subscribe(),
            life: life.subscribe(),
            sink: Sink::new(0, send),
        };
        let mut task = JoinSet::new();
        let each = server.clone();
        task.spawn(run(move || each.clone(), followed));
        Bed { server, life, wanted, events, _task: task }
    }

    async fn next(&mut self) -> ResourceNews {
        match self.events.recv().await.unwrap().1 {
            SourceEvent::Resources(news) => news,
            other => panic!("{other:?}"),
        }
    }

    async fn listed(&mut self) -> (Vec<String>, u64) {
        match self.next().await {
            ResourceNews::Listed { records, epoch, .. } => {
                (records.iter().map(|record| record.key.to_string()).collect(), epoch.position)
            }
            other => panic!("{other:?}"),
        }
    }

    async fn changed(&mut self) -> ResourceChange {
        match self.next().await {
            ResourceNews::Changed { mut changes, .. } => changes.remove(0),
            other => panic!("{other:?}"),
        }
    }

    async fn tell(&self, event: Value) {
        let watch = self.server.0.lock().unwrap().watches.last().unwrap().clone();
        watch.send(event).await.unwrap();
    }

    fn fail(&self, error: Option<fn() -> Error>) {
        self.server.0.lock().unwrap().fails = error;
    }
}

fn route(name: &str, parent: &str) -> Value {
    let parent = json!({ "group": if parent == "Gateway" { "gateway.networking.k8s.io" } else { "" }, "kind": parent, "name": "payments" });
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": { "name": name, "namespace": "shop", "uid": "x", "resourceVersion": "3", "generation": 1 },
        "spec": { "parentRefs": [parent], "rules": [{ "matches": [{ "path": { "type": "PathPrefix", "value": "/" } }] }] },
        "status": { "parents": [] },
    })
}

#[tokio::test(start_paused = true)]
async fn routes_of_services_are_told_and_those_of_gateways_are_passed_over() {
    let mut bed = Bed::start(vec![route("ours", "Service"), route("ingress", "Gateway")]);
    // As of the list, not of the probe before it.
    assert_eq!(bed.listed().await, (vec!["httproutes/shop/ours".to_owned()], 7));
    bed.tell(json!({ "type": "BOOKMARK", "object": {} })).await;
    bed.tell(json!({ "type": "ADDED", "object": route("more", "Service") })).await;
    assert!(matches!(bed.changed().await, ResourceChange::Set(record) if &*record.origin == "HTTPRoute shop/more"));
    bed.tell(json!({ "type": "DELETED", "object": route("more", "Service") })).await;
    assert!(matches!(bed.changed().await, ResourceChange::Removed(key) if &*key == "httproutes/shop/more"));
    let mut bad = route("ours", "Service");
    bad["spec"]["hostnames"] = json!(["a.example"]);
    bed.tell(json!({ "type": "MODIFIED", "object": bad })).await;
    let ResourceChange::Refused(refused) = bed.changed().await else { panic!("taken") };
    assert!(refused.problems[0].contains("HTTPRoute shop/ours: spec.hostnames: is not supported"), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn all_is_read_again_when_history_is_gone_the_connection_was_given_up_or_somebody_asks() {
    let mut bed = Bed::start(vec![route("ours", "Service")]);
    bed.listed().await;
    sleep(SHORTEST_WATCH).await;
    bed.tell(json!({ "type": "ERROR", "object": { "code": 410 } })).await;
    bed.listed().await;
    bed.life.send_modify(|life| life.connection += 1);
    bed.listed().await;
    bed.life.send_modify(|life| life.epoch.store = "two".into());
    bed.listed().await;
    let asked = Instant::now();
    bed.wanted.send_modify(|wanted| wanted.resync += 1);
    bed.listed().await;
    assert_eq!(asked.elapsed(), AGAIN_AT_MOST);
    bed.wanted.send_modify(|wanted| wanted.namespaces = [String::from("shop")].into());
    bed.listed().await;
    assert_eq!(asked.elapsed(), AGAIN_AT_MOST + AGAIN_FOR_NEW_NAMES);
    // And by itself.
    bed.listed().await;
    // That the store goes on changes nothing.
    let lists = bed.server.0.lock().unwrap().lists;
    bed.life.send_modify(|life| life.epoch.position += 1);
    tokio::task::yield_now().await;
    assert_eq!(bed.server.0.lock().unwrap().lists, lists);
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_the_cluster_does_not_have_is_no_trouble_and_looked_for_again() {
    let mut bed = Bed::start(vec![route("ours", "Service")]);
    bed.fail(Some(|| Error::NotServed));
    match bed.next().await {
        ResourceNews::Listed { records, epoch, .. } => assert_eq!((records, epoch), (vec![], Epoch::default())),
        other => panic!("{other:?}"),
    }
    bed.fail(None);
    let started = Instant::now();
    assert_eq!(bed.listed().await.0.len(), 1);
    assert!(started.elapsed() > RESYNC_EVERY / 2);
}

#[tokio::test(start_paused = true)]
async fn what_may_not_be_read_is_told_until_it_may() {
    let mut bed = Bed::start(vec![route("ours", "Service")]);
    bed.fail(Some(|| Error::Forbidden { verb: "list", resource: "httproutes".to_owned(), reason: "no".to_owned() }));
    let ResourceChange::Refused(refused) = bed.changed().await else { panic!("silent") };
    assert!(refused.problems[0].starts_with("HTTPRoute: list of httproutes is forbidden"), "{refused:?}");
    bed.fail(None);
    while !matches!(bed.next().await, ResourceNews::Listed { .. }) {}
}

#[tokio::test(start_paused = true)]
async fn what_is_not_granted_is_passed_over_also_where_it_cannot_be_understood() {
    let other = |mut object: Value| {
        object["metadata"]["namespace"] = json!("other");
        object
    };
    let mut bad = other(route("bad", "Service"));
    bad["spec"]["hostnames"] = json!(["a.example"]);
    let mut bed = Bed::start(vec![route("ours", "Service"), other(route("theirs", "Service")), bad]);
    let ResourceNews::Listed { records, refused, .. } = bed.next().await else { panic!("no list") };
    assert_eq!((records.len(), &*records[0].key, refused), (1, "httproutes/shop/ours", vec![]));
}

#[test]
fn json_that_is_no_list_is_no_list_of_nothing() {
    let list = json!({ "metadata": { "resourceVersion": "9", "continue": "x" }, "items": [{}] });
    let page = read_page(list.to_string().as_bytes()).unwrap();
    assert_eq!((page.objects.len(), &*page.version, &*page.token), (1, "9", "x"));
    let (no_items, no_version) = (json!({ "metadata": { "resourceVersion": "9" } }), json!({ "items": [] }));
    for other in [json!({}), json!([]), json!({ "kind": "Status", "status": "Failure" }), no_items, no_version] {
        assert!(matches!(read_page(other.to_string().as_bytes()), Err(Error::Garbled(_))), "{other}");
    }
}

#[test]
fn a_kind_is_absent_only_where_the_server_names_its_kinds_without_it() {
    let served = |names: &[&str]| {
        let resources: Vec<Value> = names.iter().map(|name| json!({ "name": name })).collect();
        json!({ "resources": resources }).to_string()
    };
    assert!(lacks(served(&["gateways", "httproutes/status"]).as_bytes(), Kind::HTTPRoute));
    assert!(!lacks(served(&["gateways", "httproutes"]).as_bytes(), Kind::HTTPRoute));
    assert!(!lacks(b"{}", Kind::HTTPRoute) && !lacks(b"<html>", Kind::HTTPRoute));
}
