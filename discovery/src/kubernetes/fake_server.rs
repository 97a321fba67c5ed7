//! An API server in words, and a source that follows it, for tests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::error::Error;
use super::follow::run;
use super::leases::Leases;
use super::objects::{Event, Kind, Listed};
use super::read::Reader;
use super::remote::{Collection, Remote, Watch};
use super::samples::{self, object, pod, service, slice};
use crate::{Change, Epoch, Namespaces, Record, Scope, Sink, SourceEvent, Wanted, fake};

pub(super) type Told = mpsc::Sender<Result<Option<Event>, Error>>;

/// What it holds, how it fails, and what it was asked.
#[derive(Default)]
pub(super) struct Script {
    pub(super) store: &'static str,
    pub(super) position: u64,
    pub(super) objects: BTreeMap<Kind, Vec<Value>>,
    pub(super) down: bool,
    /// Too much to do for probes, or for lists.
    pub(super) busy: bool,
    pub(super) busy_lists: bool,
    /// Whose lists fail for another reason than the connection.
    pub(super) sick: Option<Scope>,
    /// How far the etcd of pods has come, if they have one of their own.
    pub(super) pods_position: Option<u64>,
    /// Which kind may not be read.
    pub(super) forbidden: Option<Kind>,
    /// Probes are not answered, and lists only when that is taken back: they tell what was there when they were asked.
    pub(super) stands_still: watch::Sender<bool>,
    /// How many watches from now on are refused because their history is gone.
    pub(super) expired: usize,
    pub(super) asked: Vec<String>,
    pub(super) watches: Vec<(Collection, Told)>,
}

fn busy() -> Error {
    Error::Busy { asked: "list".to_owned(), reason: "scripted".to_owned(), after: Some(Duration::from_secs(40)) }
}

#[derive(Clone)]
pub(super) struct Fake(Arc<Mutex<Script>>);

pub(super) struct FakeWatch(mpsc::Receiver<Result<Option<Event>, Error>>);

impl Fake {
    /// `payments`, with one pod behind it.
    pub(super) fn new() -> Fake {
        let objects = [
            (Kind::Service, vec![service("payments", &[])]),
            (Kind::Slice, vec![slice("payments-x", &["10.0.0.1"])]),
            (Kind::Pod, vec![pod("payments-0", "payer", true)]),
        ];
        Fake(Arc::new(Mutex::new(Script { store: "one", position: 10, objects: objects.into(), ..Script::default() })))
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    pub(super) fn asked(&self) -> Vec<String> {
        self.change(|script| std::mem::take(&mut script.asked))
    }

    /// Waits until it is asked so.
    pub(super) async fn asks(&self, call: &str) {
        while !self.change(|script| script.asked.iter().any(|asked| asked.starts_with(call))) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn up(&self, call: String) -> Result<(), Error> {
        self.change(|script| {
            script.asked.push(call);
            if script.down { Err(Error::Broken("scripted".to_owned())) } else { Ok(()) }
        })
    }

    fn answer(&self, what: &Collection) -> Result<Listed, Error> {
        self.change(|script| {
            if script.busy_lists {
                return Err(busy());
            }
            if script.sick.as_ref() == Some(&what.area) {
                return Err(Error::Refused { status: 500, asked: "list".to_owned(), reason: "scripted".to_owned() });
            }
            if script.forbidden == Some(what.kind) {
                let resource = format!("{:?}", what.kind);
                return Err(Error::Forbidden { verb: "list", resource, reason: "scripted".to_owned() });
            }
            let samples = script.objects.get(&what.kind).cloned().unwrap_or_default();
            let objects = samples::objects(what.kind, &samples);
            let own = script.pods_position.filter(|_| what.kind == Kind::Pod);
            Ok(Listed { objects, position: own.unwrap_or(script.position).to_string(), more: None })
        })
    }

    /// Once the server does.
    async fn moves(&self) {
        let mut stands = self.change(|script| script.stands_still.subscribe());
        // The script is there for as long as this.
        let _ = stands.wait_for(|stands| !stands).await;
    }

    /// By the latest watch of a kind.
    pub(super) async fn tell(&self, kind: Kind, event: Result<Option<Event>, Error>) {
        let latest =
            |script: &mut Script| script.watches.iter().rev().find(|(what, _)| what.kind == kind).unwrap().1.clone();
        let told = self.change(latest);
        told.send(event).await.unwrap();
    }

    pub(super) async fn set(&self, kind: Kind, sample: Value, position: &str) {
        self.tell(kind, Ok(Some(Event::Set(object(kind, sample), position.to_owned())))).await;
    }
}

impl Remote for Fake {
    type Watch = FakeWatch;

    async fn probe(&self) -> Result<Epoch, Error> {
        self.up("probe".to_owned())?;
        self.moves().await;
        if self.change(|script| script.busy) {
            return Err(busy());
        }
        Ok(self.change(|script| Epoch { store: script.store.into(), position: script.position }))
    }

    async fn list(&self, what: &Collection, known: Option<&str>) -> Result<Listed, Error> {
        if what.kind == Kind::Mesh && self.change(|script| !script.objects.contains_key(&Kind::Mesh)) {
            return Err(Error::NotServed);
        }
        self.up(format!("list {:?} [{}] known {known:?}", what.kind, what.labels))?;
        let answer = self.answer(what);
        self.moves().await;
        answer
    }

    async fn watch(&self, what: &Collection, from: &str) -> Result<FakeWatch, Error> {
        self.up(format!("watch {:?} [{}] from {from}", what.kind, what.labels))?;
        self.change(|script| {
            if script.expired > 0 {
                script.expired -= 1;
                return Err(Error::Expired);
            }
            let (send, told) = mpsc::channel(8);
            script.watches.push((what.clone(), send));
            Ok(FakeWatch(told))
        })
    }

    fn leave(&mut self) {
        self.change(|script| script.asked.push("leave".to_owned()));
    }
}

impl Watch for FakeWatch {
    async fn next(&mut self) -> Result<Option<Event>, Error> {
        self.0.recv().await.unwrap_or_else(|| Err(Error::Broken("dropped".to_owned())))
    }
}

pub(super) struct Running {
    started_with: Wanted,
    pub(super) server: Fake,
    pub(super) wanted: watch::Sender<Wanted>,
    events: mpsc::Receiver<(usize, SourceEvent)>,
    _task: JoinSet<()>,
}

pub(super) fn payments() -> Wanted {
    Wanted { services: ["payments.shop".parse().unwrap()].into(), ..Wanted::default() }
}

pub(super) fn start(wanted: Wanted, server: Fake) -> Running {
    let started_with = wanted.clone();
    let wanted = watch::Sender::new(wanted);
    let (send, events) = mpsc::channel(64);
    let mut task = JoinSet::new();
    let reader =
        Reader { trust_domain: fake::trust_domain(), authority: Namespaces::everything(), dead: BTreeSet::new() };
    task.spawn(run(
        server.clone(),
        reader,
        Leases::new("meshd-system".to_owned()),
        wanted.subscribe(),
        Sink::new(0, send),
        watch::Sender::default(),
    ));
    Running { started_with, server, wanted, events, _task: task }
}

/// Listed once, and watched.
pub(super) async fn running() -> Running {
    let mut running = start(payments(), Fake::new());
    assert_eq!(running.listed().await, (10, vec!["10.0.0.1".to_owned()]));
    running.watched().await;
    running.server.asked();
    running
}

pub(super) fn addresses<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<String> {
    records.into_iter().flat_map(|record| &record.places).map(|place| place.address.to_string()).collect()
}

impl Running {
    /// The next event that is more than a sign of life.
    pub(super) async fn next(&mut self) -> SourceEvent {
        loop {
            match self.events.recv().await.unwrap().1 {
                SourceEvent::InSync => {}
                SourceEvent::Narrowed(to) if to == self.started_with => {}
                event => return event,
            }
        }
    }

    pub(super) async fn listed(&mut self) -> (u64, Vec<String>) {
        match self.next().await {
            SourceEvent::Listed(listing) => (listing.epoch.position, addresses(&listing.records)),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn changed(&mut self) -> Vec<String> {
        match self.next().await {
            SourceEvent::Changed { changes, .. } => addresses(changes.iter().filter_map(|change| match change {
                Change::Set(record) => Some(record),
                _ => None,
            })),
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn unavailable(&mut self) -> String {
        match self.next().await {
            SourceEvent::Unavailable { error } => error,
            other => panic!("{other:?}"),
        }
    }

    /// Once all is caught up with.
    pub(super) async fn watched(&mut self) {
        assert_eq!(self.events.recv().await.unwrap().1, SourceEvent::InSync);
    }

    /// What was asked until the server was probed for so many times.
    pub(super) async fn asked_until_probed(&mut self, times: usize) -> Vec<String> {
        let mut probed = 0;
        while probed < times {
            probed += usize::from(self.events.recv().await.unwrap().1 == SourceEvent::InSync);
        }
        self.server.asked()
    }
}
