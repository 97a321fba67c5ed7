//! The loop between sources and everybody who asks the directory.

use std::sync::Arc;
use std::time::Duration;

use meshd_identity::TrustDomain;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::backoff::Backoff;
use crate::belief::REPEATED_FOR;
use crate::config::Configured;
use crate::held::Touched;
use crate::interests::Presence;
use crate::lookups::{Import, Interested, Lookups, Order};
use crate::merge::{Layer, merge};
use crate::resources::{ResourceLayer, TouchedResources};
use crate::saved::{self, Keep, SAVE_EVERY};
use crate::watched::{SourceHealth, Watched, log_difference};
use crate::{Directory, Endpoint, ServiceName, Sink, Source, SourceEvent, Wanted};

/// Sources wait when the watcher is this many events behind.
const INBOX: usize = 64;
/// How often is looked which services nobody uses any more.
const FORGET_EVERY: Duration = Duration::from_secs(10);
/// Runs the sources, merges what they say and publishes it.
pub struct Watcher {
    trust_domain: TrustDomain,
    sources: Vec<Configured>,
    layers: Vec<Watched>,
    keep: Option<Arc<dyn Keep>>,
    losses: (mpsc::Sender<Acceptance>, mpsc::Receiver<Acceptance>),
    suspects: (mpsc::Sender<Suspect>, mpsc::Receiver<Suspect>),
    /// What is wanted in any case.
    declared: Wanted,
    /// Where names that are asked for are followed, too.
    interested: Option<Interested>,
    imports: watch::Sender<Arc<Vec<Import>>>,
    directory: watch::Sender<Arc<Directory>>,
    health: watch::Sender<Arc<Vec<SourceHealth>>>,
}

/// Where an operator says that what a source lost is gone indeed.
#[derive(Debug, Clone)]
pub struct Losses(mpsc::Sender<Acceptance>);

#[derive(Debug)]
struct Acceptance {
    source: String,
    answer: oneshot::Sender<Result<(), String>>,
}

impl Losses {
    /// Returns when what the source no longer says is out of the directory.
    pub async fn accept(&self, source: String) -> Result<(), String> {
        let gone = || "meshd is stopping".to_owned();
        let (answer, answered) = oneshot::channel();
        self.0.send(Acceptance { source, answer }).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

/// Where is told that an endpoint of a source cannot be reached. Never waits.
#[derive(Debug, Clone)]
pub struct Suspects(mpsc::Sender<Suspect>);

#[derive(Debug)]
struct Suspect {
    source: Arc<str>,
    service: ServiceName,
}

impl Suspects {
    /// Nobody listens.
    pub fn ignored() -> Suspects {
        Suspects(mpsc::channel(1).0)
    }

    pub fn tell(&self, endpoint: &Endpoint) {
        // With so many waiting, all of the source is about to be read.
        let _ = self.0.try_send(Suspect { source: endpoint.source.clone(), service: endpoint.service.clone() });
    }
}

impl Watcher {
    /// `sources` in order of precedence, first wins.
    pub fn new(sources: Vec<Configured>, trust_domain: TrustDomain) -> Watcher {
        let layers: Vec<Watched> = sources.iter().map(Watched::of).collect();
        let health = watch::Sender::new(Arc::new(layers.iter().map(Watched::health).collect()));
        Watcher {
            trust_domain,
            sources,
            layers,
            keep: None,
            losses: mpsc::channel(1),
            suspects: mpsc::channel(INBOX),
            declared: Wanted::default(),
            interested: None,
            imports: watch::Sender::default(),
            directory: watch::Sender::default(),
            health,
        }
    }

    /// What sources on other machines are asked for. Nothing, unless told.
    pub fn wanting(mut self, declared: Wanted) -> Watcher {
        self.declared = declared;
        self.want();
        self
    }

    /// Has them asked for what is looked up here as well, now and in earlier lives, where any may know more than is known
    /// here anyway.
    pub fn looking_up(mut self, keep: Arc<dyn Keep>) -> Watcher {
        if self.layers.iter().any(|layer| !layer.says_everything()) {
            self.interested = Some(Interested::open(keep, self.directory.subscribe()));
            self.want();
        }
        self
    }

    pub fn lookups(&self) -> Lookups {
        self.interested.as_ref().map_or_else(Lookups::off, Interested::lookups)
    }

    /// What is asked for, and why.
    pub fn imports(&self) -> watch::Receiver<Arc<Vec<Import>>> {
        self.imports.subscribe()
    }

    /// Begins with what an earlier life knew, and saves what this one learns.
    pub fn keeping(mut self, keep: Arc<dyn Keep>) -> Watcher {
        let mut touched = Touched::new();
        for layer in &mut self.layers {
            match saved::restore(&*keep, &layer.name, layer.kind, &mut layer.held, &mut layer.resources) {
                Ok((known, resources)) => {
                    layer.from_disk = !(known.is_empty() && resources.is_empty());
                    layer.was_known = layer.from_disk;
                    touched.extend(known);
                    layer.changed.extend(resources);
                }
                Err(problem) => tracing::warn!("{problem}"),
            }
        }
        self.keep = Some(keep);
        self.publish(&touched);
        self
    }

    pub fn directory(&self) -> watch::Receiver<Arc<Directory>> {
        self.directory.subscribe()
    }

    pub fn health(&self) -> watch::Receiver<Arc<Vec<SourceHealth>>> {
        self.health.subscribe()
    }

    pub fn losses(&self) -> Losses {
        Losses(self.losses.0.clone())
    }

    pub fn suspects(&self) -> Suspects {
        Suspects(self.suspects.0.clone())
    }

    /// Never returns. Dropping the future ends the sources.
    pub async fn run(mut self) {
        let (events, mut inbox) = mpsc::channel(INBOX);
        let mut tasks = JoinSet::new();
        for (index, configured) in std::mem::take(&mut self.sources).into_iter().enumerate() {
            let wanted = self.layers[index].wanted.subscribe();
            tasks.spawn(keep_watching(configured.source, wanted, Sink::new(index, events.clone())));
        }
        let mut saving = JoinSet::new();
        let mut saves = interval(SAVE_EVERY);
        saves.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut doubts = interval(REPEATED_FOR / 4);
        doubts.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut forgets = interval(FORGET_EVERY);
        forgets.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let (mut touched, mut accepted) = (Touched::new(), None);
            let suspicion = self.layers.iter().filter_map(|layer| layer.suspicion.due()).min();
            tokio::select! {
                // `events` stays open above, so the inbox never ends.
                Some((index, event)) = inbox.recv() => {
                    touched.extend(self.note(index, event));
                    // One merge for everything that is already waiting.
                    for _ in 0..INBOX {
                        let Ok((index, event)) = inbox.try_recv() else { break };
                        touched.extend(self.note(index, event));
                    }
                }
                // We hold a sender, so these never end either.
                Some(Acceptance { source, answer }) = self.losses.1.recv() => {
                    let (gone, result) = self.accept(&source);
                    (touched, accepted) = (gone, Some((answer, result)));
                }
                // What is doubted is settled by another list, so one is asked for.
                _ = doubts.tick(), if self.layers.iter().any(Watched::may_settle_a_doubt) => {
                    self.layers.iter().filter(|layer| layer.may_settle_a_doubt()).for_each(Watched::ask_again);
                    continue;
                }
                Some(Suspect { source, service }) = self.suspects.1.recv() => {
                    if let Some(layer) = self.layers.iter_mut().find(|layer| layer.name == source) {
                        layer.suspicion.raise(service, Instant::now(), fastrand::f64());
                    }
                    continue;
                }
                () = sleep_until(suspicion.unwrap_or_else(Instant::now)), if suspicion.is_some() => {
                    self.layers.iter_mut().for_each(Watched::ask_if_suspected);
                }
                Some(order) = asked_for(&mut self.interested) => self.look_up(order),
                _ = forgets.tick(), if self.interested.is_some() => self.forget(),
                _ = saves.tick(), if saving.is_empty() && self.has_news() => {
                    self.save(&mut saving);
                    continue;
                }
                Some(failed) = saving.join_next(), if !saving.is_empty() => {
                    // A panic in there is ours and was logged; the next change is saved again.
                    for index in failed.unwrap_or_default() {
                        self.layers[index].unsaved = true;
                    }
                    continue;
                }
            }
            self.publish(&touched);
            self.answer_lookups();
            if let Some((answer, result)) = accepted {
                // Who asked may have left.
                let _ = answer.send(result);
            }
        }
    }

    fn note(&mut self, index: usize, event: SourceEvent) -> Touched {
        // Until a source was read, what others say of its services may wait for it.
        let first = match &event {
            SourceEvent::Listed(listing) => Some(listing.scope.clone()),
            _ => None,
        };
        let first = first.filter(|scope| !self.layers[index].held.has_listed(scope));
        let mut touched = self.layers[index].note(event);
        if let Some(scope) = &first {
            touched.extend(self.layers.iter().flat_map(|layer| layer.held.services_in(scope)).cloned());
        }
        touched
    }

    fn accept(&mut self, source: &str) -> (Touched, Result<(), String>) {
        let Some(layer) = self.layers.iter_mut().find(|layer| &*layer.name == source) else {
            let names: Vec<&str> = self.layers.iter().map(|layer| &*layer.name).collect();
            return (Touched::new(), Err(format!("there is no source `{source}`; there are: {}", names.join(", "))));
        };
        layer.unsaved = true;
        let resources = layer.resources.accept_losses();
        layer.changed.extend(resources);
        (layer.held.accept_losses(), Ok(()))
    }

    /// Has the sources asked for what is wanted now.
    fn want(&self) {
        let mut looked_up = self.interested.as_ref().map(Interested::names).unwrap_or_default();
        let asked = Wanted { looked_up: looked_up.clone(), ..self.declared.clone() };
        // Who uses a service uses what its routes lead to.
        let routed = self.layers.iter().flat_map(|layer| layer.resource_layer().backends(&asked));
        looked_up.extend(routed);
        for layer in &self.layers {
            layer.wanted.send_if_modified(|wanted| {
                let now = Wanted { looked_up: looked_up.clone(), ..self.declared.clone() };
                let changed = !wanted.is_same_as(&now);
                *wanted = Wanted { resync: wanted.resync, reread: std::mem::take(&mut wanted.reread), ..now };
                changed
            });
        }
        self.tell_imports();
    }

    fn tell_imports(&self) {
        let directory = self.directory.borrow();
        let declared = Import::declared(&self.declared, |service| directory.get(service).is_some());
        let now: Vec<Import> = declared.chain(self.interested.iter().flat_map(Interested::imports)).collect();
        self.imports.send_if_modified(|current| {
            let changed = **current != now;
            *current = Arc::new(now);
            changed
        });
    }

    fn look_up(&mut self, order: Order) {
        let Some(interested) = &mut self.interested else { return };
        if !interested.take(order) {
            tracing::warn!("this host uses more services than can be learned; declare `imports` in meshd.toml");
        }
        self.want();
    }

    fn answer_lookups(&mut self) {
        let Some(mut interested) = self.interested.take() else { return };
        interested.answer(|service| self.presence(service));
        self.interested = Some(interested);
    }

    fn forget(&mut self) {
        let Some(mut interested) = self.interested.take() else { return };
        interested.settle(|service| self.presence(service));
        self.interested = Some(interested);
        self.want();
    }

    /// What all sources that may know a service say of it.
    fn presence(&self, service: &ServiceName) -> Presence {
        let mut unsure = false;
        for layer in self.layers.iter().filter(|layer| layer.may_know(service)) {
            match (&layer.unavailable, layer.has_listed(service)) {
                (Some(_), _) => unsure = true,
                (None, false) => return Presence::Awaited,
                (None, true) => {}
            }
        }
        match self.directory.borrow().get(service) {
            Some(_) => Presence::Known,
            None if unsure => Presence::Unsure,
            None => Presence::Nowhere,
        }
    }

    /// Of which the disk knows nothing.
    fn has_news(&self) -> bool {
        self.layers.iter().any(|layer| layer.unsaved) || self.interested.as_ref().is_some_and(Interested::is_new)
    }

    /// Off the event loop: a disk may take its time. Tells which layers are still to be saved.
    fn save(&mut self, saving: &mut JoinSet<Vec<usize>>) {
        if let Some(write) = self.interested.as_mut().and_then(Interested::unsaved) {
            saving.spawn_blocking(move || {
                write();
                Vec::new()
            });
        }
        let Some(keep) = self.keep.clone().filter(|_| self.layers.iter().any(|layer| layer.unsaved)) else { return };
        let due = self.layers.iter_mut().enumerate().filter_map(|(index, layer)| {
            let due = std::mem::take(&mut layer.unsaved);
            due.then(|| (index, layer.name.clone(), saved::take(layer.kind, &layer.held, &layer.resources)))
        });
        let due: Vec<_> = due.collect();
        saving.spawn_blocking(move || {
            let failed = due.iter().filter(|(_, name, saved)| !saved::save(&*keep, name, saved));
            failed.map(|(index, ..)| *index).collect()
        });
    }

    fn publish(&mut self, touched: &Touched) {
        let mut directory = (**self.directory.borrow()).clone();
        let mut changed = false;
        for name in touched {
            changed |= self.merge_one(name, &mut directory);
        }
        let rerouted = self.attach(&mut directory);
        if rerouted {
            self.want();
        }
        changed |= rerouted;
        if changed {
            tracing::debug!(services = directory.len(), "directory changed");
            self.directory.send_replace(Arc::new(directory));
        }
        self.tell_health();
    }

    /// Puts together anew what resources that changed are attached to. True when any did.
    fn attach(&mut self, directory: &mut Directory) -> bool {
        let mut changed = TouchedResources::default();
        for layer in self.layers.iter_mut().filter(|layer| !layer.changed.is_empty()) {
            changed.extend(std::mem::take(&mut layer.changed));
            layer.resource_errors = layer.wrong_resources();
        }
        // Of sources of lower precedence another one of that name may come to the fore.
        let others = self.layers.iter().flat_map(|layer| changed.ids.iter().filter_map(|id| layer.resources.get(id)));
        let others: Vec<_> = others.flat_map(|(resource, _)| resource.targets()).collect();
        changed.targets.extend(others);
        let layers: Vec<ResourceLayer<'_>> = self.layers.iter().map(Watched::resource_layer).collect();
        let before = directory.resources().clone();
        let after = changed.targets.iter().fold(before, |resources, target| resources.with(target, &layers));
        if !changed.is_empty() {
            *directory = directory.with_resources(after);
        }
        !changed.is_empty()
    }

    /// True when the service is another one now.
    fn merge_one(&mut self, name: &ServiceName, directory: &mut Directory) -> bool {
        let previous = directory.get(name).cloned();
        let layers: Vec<Layer<'_>> = self.layers.iter().map(Watched::layer).collect();
        let merged = merge(name, &self.trust_domain, previous.as_ref(), &layers);
        for (layer, part) in self.layers.iter_mut().zip(merged.parts) {
            layer.take_part(name, part);
        }
        let same = match (&previous, &merged.service) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if !same {
            *directory = directory.with(name, merged.service);
        }
        !same
    }

    fn tell_health(&self) {
        let now: Vec<SourceHealth> = self.layers.iter().map(Watched::health).collect();
        self.health.send_if_modified(|current| {
            let changed = **current != now;
            for (old, new) in current.iter().zip(&now).filter(|_| changed) {
                log_difference(old, new);
            }
            *current = Arc::new(now);
            changed
        });
    }
}

/// Never, where nothing is looked up.
async fn asked_for(interested: &mut Option<Interested>) -> Option<Order> {
    match interested {
        Some(interested) => interested.next().await,
        None => std::future::pending().await,
    }
}

/// A source that ends or panics does so by a defect of ours. What it said stays, and it is started again.
async fn keep_watching(source: Box<dyn Source>, wanted: watch::Receiver<Wanted>, sink: Sink) {
    let mut backoff = Backoff::default();
    loop {
        let started = Instant::now();
        let mut task = JoinSet::new();
        task.spawn(source.watch(wanted.clone(), sink.clone()));
        let reason = match task.join_next().await {
            Some(Err(error)) => format!("the source failed inside ({error})"),
            Some(Ok(())) | None => "the source ended by itself".to_owned(),
        };
        let error = format!("{reason}; what it said last stays in force, and it is started again; report this");
        sink.send(SourceEvent::Unavailable { error }).await;
        backoff.rest(started).await;
    }
}

/// Waits until every source has answered, good or bad, also of each kind of routes and policies, or is known from before:
/// until then an empty directory means nothing.
pub async fn settled(health: &mut watch::Receiver<Arc<Vec<SourceHealth>>>) {
    // An error means the watcher is gone, and nothing will be said any more.
    let _ = health.wait_for(|sources| sources.iter().all(|source| source.has_answered)).await;
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
