//! Routes and policies of a cluster: a follower for each kind, beside that of services, which tells them how the server is.
//!
//! ```text
//!   server known ---> list, in pages ---> watch from there ---> events
//!        ^                 |                    |
//!        |                 |                    +--- its end (5 min), 410, something new wanted, asked to, another life
//!        |                 |                         of the store, or the connection of services was given up: list again
//!        |                 +--- 404: the cluster has no such kind; nothing until the next time all is read
//!        +--- any other error: told, back off
//! ```
//! A kind is read in all namespaces: who routes a service for its own clients does so in the namespace of the clients.

use std::sync::Arc;
use std::time::Duration;

use meshd_identity::TrustDomain;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::client::{Asked, Client, Lines};
use super::error::Error;
use super::remote::encode;
use crate::backoff::{Backoff, jittered};
use crate::resources::{self, Id, Kind, ResourceChange, ResourceNews, ResourceRecord, ResourceRefusal, Said};
use crate::resync::RESYNC_EVERY;
use crate::{Epoch, Provides, Refused, Sink, SourceEvent, Wanted};

/// Objects per page of a list.
const PAGE: usize = 500;
/// A program that scans for names must not have all of a cluster listed without a pause.
const AGAIN_FOR_NEW_NAMES: Duration = Duration::from_secs(1);
/// How often all is read again for those who ask.
const AGAIN_AT_MOST: Duration = Duration::from_secs(15);
/// A watch that ends sooner ends for another reason than its age.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);

/// What the follower of services knows of the server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) epoch: Epoch,
    /// Grows with each connection that was given up.
    pub(super) connection: u64,
}

impl Life {
    fn is_known(&self) -> bool {
        !self.epoch.store.is_empty()
    }

    /// Nothing says that a watch begun in the other one tells no more.
    fn goes_on(&self, before: &Life) -> bool {
        let same = self.connection == before.connection && self.epoch.store == before.epoch.store;
        same && self.epoch.position >= before.epoch.position
    }
}

/// What is asked of the server; scripted in tests.
pub(super) trait Server: Send + 'static {
    type Watch: Watch + Send;

    /// All objects of a kind, and as of where; `NotServed`: the cluster has no such kind.
    fn list(&mut self, kind: Kind) -> impl Future<Output = Result<(Vec<Value>, String), Error>> + Send;
    fn watch(&mut self, kind: Kind, from: &str) -> impl Future<Output = Result<Self::Watch, Error>> + Send;
    fn leave(&mut self);
}

pub(super) trait Watch {
    /// `None`: its end.
    fn next(&mut self) -> impl Future<Output = Result<Option<Value>, Error>> + Send;
}

pub(super) struct Followed {
    pub(super) kinds: Vec<Kind>,
    pub(super) provides: Provides,
    pub(super) trust_domain: TrustDomain,
    pub(super) wanted: watch::Receiver<Wanted>,
    pub(super) life: watch::Receiver<Life>,
    pub(super) sink: Sink,
}

/// Never returns, except by a defect of ours, which ends all of it.
pub(super) async fn run<S: Server>(server: impl Fn() -> S, followed: Followed) {
    let Followed { kinds, provides, trust_domain, wanted, life, sink } = followed;
    let mut tasks = JoinSet::new();
    for kind in kinds {
        let (provides, trust_domain) = (provides.clone(), trust_domain.clone());
        let (wanted, life, sink) = (wanted.clone(), life.clone(), sink.clone());
        tasks.spawn(Follower { kind, provides, trust_domain, wanted, life, sink, version: None }.run(server()));
    }
    if tasks.is_empty() {
        std::future::pending::<()>().await;
    }
    tasks.join_next().await;
}

pub(super) fn prefix(kind: Kind) -> Arc<str> {
    format!("{}/", kind.plural()).into()
}

struct Follower {
    kind: Kind,
    provides: Provides,
    trust_domain: TrustDomain,
    wanted: watch::Receiver<Wanted>,
    life: watch::Receiver<Life>,
    sink: Sink,
    /// As of where it is known.
    version: Option<String>,
}

impl Follower {
    async fn run<S: Server>(mut self, mut server: S) {
        let mut backoff = Backoff::default();
        // Nobody tells any more only when all of this ends.
        while self.life.wait_for(Life::is_known).await.is_ok() {
            let started = Instant::now();
            match self.follow(&mut server).await {
                Ok(()) => continue,
                Err(Error::NotServed) => {
                    // What was there is doubted: a store without the kind is not the one that had it.
                    self.tell_list(Epoch::default(), Vec::new()).await;
                    self.rest().await;
                    continue;
                }
                Err(error) => self.tell_trouble(&error).await,
            }
            server.leave();
            backoff.rest(started).await;
        }
    }

    /// Until all is to be read again.
    async fn follow<S: Server>(&mut self, server: &mut S) -> Result<(), Error> {
        let life = self.life.borrow_and_update().clone();
        let wanted = self.wanted.borrow_and_update().clone();
        let (objects, version) = server.list(self.kind).await?;
        let mut epoch = self.life.borrow().epoch.clone();
        // As of when it was read, which may be before the store was put back that the probe has seen, or after.
        epoch.position = version.parse().unwrap_or(epoch.position);
        self.version = Some(version);
        self.tell_list(epoch, objects).await;
        let started = Instant::now();
        let mut watch = server.watch(self.kind, self.version.as_deref().unwrap_or_default()).await?;
        let mut again_at = started + jittered(RESYNC_EVERY, fastrand::f64());
        loop {
            tokio::select! {
                event = watch.next() => match event? {
                    Some(event) => {
                        if !self.take(&event).await? {
                            // Too old from its list on: it would be so again.
                            return if started.elapsed() < SHORTEST_WATCH { Err(Error::Expired) } else { Ok(()) };
                        }
                    }
                    None if started.elapsed() < SHORTEST_WATCH => {
                        return Err(Error::Broken("a watch ended as soon as it began".to_owned()));
                    }
                    None => return Ok(()),
                },
                changed = self.life.changed() => {
                    let now = self.life.borrow_and_update().clone();
                    if now.connection != life.connection {
                        // Probes go by the one that services follow.
                        server.leave();
                    }
                    if changed.is_err() || !now.goes_on(&life) {
                        return Ok(());
                    }
                }
                Ok(()) = self.wanted.changed() => {
                    let now = self.wanted.borrow_and_update().clone();
                    if !now.is_same_as(&wanted) {
                        again_at = again_at.min(started + AGAIN_FOR_NEW_NAMES);
                    }
                    // Somebody wants to know it anew, of what are objects of the whole cluster.
                    if now.resync != wanted.resync {
                        again_at = again_at.min(started + AGAIN_AT_MOST);
                    }
                }
                () = sleep_until(again_at) => return Ok(()),
            }
        }
    }

    /// Until all is read again, or somebody asks for it.
    async fn rest(&mut self) {
        tokio::select! {
            Ok(()) = self.wanted.changed() => {}
            () = sleep(jittered(RESYNC_EVERY, fastrand::f64())) => {}
        }
    }

    fn prefix(&self) -> Arc<str> {
        prefix(self.kind)
    }

    /// False where the history that the watch needs is gone.
    async fn take(&mut self, event: &Value) -> Result<bool, Error> {
        let object = &event["object"];
        let change = match event["type"].as_str() {
            Some("ADDED" | "MODIFIED") => self.read(object),
            Some("DELETED") => ResourceChange::Removed(self.key(object)),
            Some("ERROR") if object["code"] == 410 => return Ok(false),
            Some("ERROR") => return Err(Error::Broken(format!("a watch failed: {}", object["message"]))),
            // A bookmark.
            _ => return Ok(true),
        };
        // Of the same count as that of lists; kinds may lie in different stores.
        let position = object["metadata"]["resourceVersion"].as_str().and_then(|version| version.parse().ok());
        let position = position.unwrap_or_default();
        self.tell(ResourceNews::Changed { prefix: self.prefix(), position, changes: vec![change] }).await;
        Ok(true)
    }

    async fn tell_list(&self, epoch: Epoch, objects: Vec<Value>) {
        let read = objects.iter().map(|object| self.read(object));
        self.tell(ResourceNews::listed(self.prefix(), epoch, read)).await;
    }

    async fn tell_trouble(&self, error: &Error) {
        let problems = vec![format!("{}: {error} (what was said last stays in force)", self.kind)];
        let refused = Refused { key: format!("{}access", self.prefix()).into(), problems };
        let changes = vec![ResourceChange::Refused(refused.into())];
        self.tell(ResourceNews::Changed { prefix: self.prefix(), position: 0, changes }).await;
    }

    async fn tell(&self, news: ResourceNews) {
        let news = news.wanted(&self.wanted.borrow());
        self.sink.send(SourceEvent::Resources(news)).await;
    }

    fn key(&self, object: &Value) -> Arc<str> {
        let text = |name: &str| object["metadata"][name].as_str().unwrap_or_default();
        format!("{}{}/{}", self.prefix(), text("namespace"), text("name")).into()
    }

    /// Most routes of a cluster are of Gateways, and no concern of ours; nor is what others may say.
    fn read(&self, object: &Value) -> ResourceChange {
        let key = self.key(object);
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        if !self.provides.covers(self.kind, namespace) {
            return ResourceChange::Removed(key);
        }
        let is_route = matches!(self.kind, Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute);
        if is_route && !resources::is_between_services(object) {
            return ResourceChange::Removed(key);
        }
        let origin: Arc<str> = format!("{} {}", self.kind, &key[self.prefix().len()..]).into();
        let document = resources::read_json(object, &self.trust_domain);
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let id = Id { kind: self.kind, namespace: namespace.into(), name: name.into() };
        let meanwhile = document.meanwhile(&id);
        match document.outcome {
            Ok(Said::Resources(resources)) => ResourceChange::Set(ResourceRecord { key, origin, resources }),
            // A kind that is not asked for.
            Ok(Said::Service(_)) => ResourceChange::Removed(key),
            Err(problems) => {
                let problems = problems.iter().map(|problem| format!("{}: {}", problem.field, problem.reason));
                let refused = crate::stored::refused(&key, &origin, &problems.collect::<Vec<_>>());
                let meanwhile = meanwhile.map(|resource| ResourceRecord { key, origin, resources: vec![resource] });
                ResourceChange::Refused(ResourceRefusal { meanwhile, ..refused.into() })
            }
        }
    }
}

impl Server for Client {
    type Watch = Lines;

    async fn list(&mut self, kind: Kind) -> Result<(Vec<Value>, String), Error> {
        for version in kind.versions() {
            match list_version(self, kind, version).await {
                Err(Error::Refused { status: 404, .. }) => {}
                listed => return listed,
            }
        }
        Err(Error::NotServed)
    }

    async fn watch(&mut self, kind: Kind, from: &str) -> Result<Lines, Error> {
        // The version is that of the list, if there is only one that answered; else the newest that does.
        let seconds = jittered(RESYNC_EVERY, fastrand::f64()).as_secs();
        let options = format!("watch=1&timeoutSeconds={seconds}&resourceVersion={}", encode(from));
        let mut refused = Error::NotServed;
        for version in kind.versions() {
            match self.lines(&path(kind, version, &options), &asked("watch", kind)).await {
                Err(error @ Error::Refused { status: 404, .. }) => refused = error,
                answer => return answer,
            }
        }
        Err(refused)
    }

    fn leave(&mut self) {
        Client::leave(self);
    }
}

impl Watch for Lines {
    async fn next(&mut self) -> Result<Option<Value>, Error> {
        let line = Lines::next(self).await?;
        line.map(|line| serde_json::from_slice(&line).map_err(|error| Error::Garbled(error.to_string()))).transpose()
    }
}

fn asked(verb: &'static str, kind: Kind) -> Asked {
    Asked { verb, resource: format!("{} in all namespaces", kind.plural()) }
}

fn path(kind: Kind, version: &str, options: &str) -> String {
    format!("/apis/{}/{version}/{}?{options}", kind.group(), kind.plural())
}

async fn list_version(client: &mut Client, kind: Kind, version: &str) -> Result<(Vec<Value>, String), Error> {
    let (mut objects, mut next) = (Vec::new(), String::new());
    loop {
        let page = client.get(&path(kind, version, &format!("limit={PAGE}{next}")), &asked("list", kind)).await;
        let page = match page {
            // Who may not read what is not there has no trouble.
            Err(Error::Forbidden { verb, resource, reason }) if is_absent(client, kind, version).await => {
                tracing::debug!(verb, resource, reason, "a kind that the cluster does not have");
                return Err(Error::Refused { status: 404, asked: asked("list", kind).to_string(), reason });
            }
            page => read_page(&page?)?,
        };
        objects.extend(page.objects);
        match page.token {
            token if token.is_empty() => return Ok((objects, page.version)),
            token => next = format!("&continue={}", encode(&token)),
        }
    }
}

struct Page {
    objects: Vec<Value>,
    version: String,
    /// Of the next one; empty at the last.
    token: String,
}

/// Anything else than a list, also where it is JSON, must not pass for one of nothing.
fn read_page(answer: &[u8]) -> Result<Page, Error> {
    let mut page: Value = serde_json::from_slice(answer).map_err(|error| Error::Garbled(error.to_string()))?;
    let text = |name: &str| page["metadata"][name].as_str().unwrap_or_default().to_owned();
    let (version, token) = (text("resourceVersion"), text("continue"));
    match page.get_mut("items").map(Value::take) {
        Some(Value::Array(objects)) if !version.is_empty() => Ok(Page { objects, version, token }),
        _ => Err(Error::Garbled("it is no list: `items` or `metadata.resourceVersion` is missing".to_owned())),
    }
}

/// True only where the server says so. Everybody who is known may ask which kinds there are.
async fn is_absent(client: &mut Client, kind: Kind, version: &str) -> bool {
    let what = Asked { verb: "get", resource: kind.group().to_owned() };
    match client.get(&format!("/apis/{}/{version}", kind.group()), &what).await {
        Ok(answer) => lacks(&answer, kind),
        Err(error) => matches!(error, Error::Refused { status: 404, .. }),
    }
}

fn lacks(answer: &[u8], kind: Kind) -> bool {
    let served: Value = serde_json::from_slice(answer).unwrap_or_default();
    let is_other = |resource: &Value| resource["name"] != kind.plural();
    served["resources"].as_array().is_some_and(|resources| resources.iter().all(is_other))
}

#[cfg(test)]
#[path = "resources_tests.rs"]
mod tests;
