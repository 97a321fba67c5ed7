//! One source as the watcher sees it: what it said, what came of that, and how it is doing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::Configured;
use crate::held::{Held, Touched};
use crate::merge::{Layer, Part};
use crate::resources::{HeldResources, ResourceLayer, TouchedResources};
use crate::suspicion::{Again, MOST_SERVICES, Suspicion};
use crate::{Belief, FilesSource, Namespaces, Scope, ServiceName, SourceEvent, Wanted, unix_time};

/// More messages than this tell an operator nothing; the rest is counted.
const MOST_ERRORS: usize = 50;

/// How one source is doing, for `meshd status` and `meshd check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SourceHealth {
    pub name: String,
    pub kind: &'static str,
    /// Services in the directory that this source defines.
    pub services: usize,
    /// Endpoints in the directory that come from it.
    pub endpoints: usize,
    /// Routes and policies of this host's concern that it has, also those it is not granted.
    pub resources: usize,
    /// Documents of them that cannot be understood now; the last good version stays in force.
    pub refused_resources: usize,
    /// Endpoints and documents it no longer names, which is not believed yet.
    pub stale: usize,
    /// It was not read since meshd started: what is known of it was on disk.
    pub from_disk: bool,
    /// Services another source of higher precedence defines as well.
    pub shadowed: Vec<ServiceName>,
    /// When what it offers changed.
    #[serde(serialize_with = "unix_time::serialize")]
    pub last_change: Option<SystemTime>,
    /// When it was last known to be current.
    #[serde(serialize_with = "unix_time::serialize")]
    pub last_ok: Option<SystemTime>,
    /// When the oldest of the complete lists was read that hold now; changes were told since.
    #[serde(serialize_with = "unix_time::serialize")]
    pub last_listed: Option<SystemTime>,
    /// How often a service of it, or all of it, was to be read again because endpoints could not be reached.
    pub suspected: u64,
    /// All that is wrong now; empty when healthy. Each says where and what to do.
    pub errors: Vec<String>,
    /// It said something, good or bad, of services and of each kind of routes and policies that it is asked for, now or in
    /// an earlier life: what it lacks, it does not know.
    #[serde(skip)]
    pub has_answered: bool,
}

/// One source, as the watcher sees it.
pub(crate) struct Watched {
    pub(crate) name: Arc<str>,
    pub(crate) kind: &'static str,
    pub(crate) belief: Belief,
    /// What it is asked for.
    pub(crate) wanted: watch::Sender<Wanted>,
    pub(crate) suspicion: Suspicion,
    pub(crate) suspected: u64,
    /// When each complete list was read.
    pub(crate) lists: HashMap<Scope, SystemTime>,
    pub(crate) authority: Namespaces,
    pub(crate) endpoints: Namespaces,
    pub(crate) held: Held,
    pub(crate) routes: Namespaces,
    pub(crate) policies: Namespaces,
    pub(crate) resources: HeldResources,
    /// Resources that changed and are not published yet.
    pub(crate) changed: TouchedResources,
    /// What is wrong with its resources.
    pub(crate) resource_errors: Vec<String>,
    /// What became of its say on each service, where there is something to tell.
    pub(crate) parts: BTreeMap<ServiceName, Part>,
    pub(crate) unavailable: Option<String>,
    /// All that is known of it is what an earlier life knew.
    pub(crate) from_disk: bool,
    /// An earlier life knew something of it.
    pub(crate) was_known: bool,
    /// It was reached in this one.
    pub(crate) is_heard: bool,
    /// Below which it says resources.
    pub(crate) prefixes: Vec<Arc<str>>,
    /// It changed since it was saved.
    pub(crate) unsaved: bool,
    pub(crate) last_change: Option<SystemTime>,
    pub(crate) last_ok: Option<SystemTime>,
}

impl Watched {
    pub(crate) fn of(configured: &Configured) -> Watched {
        Watched {
            name: configured.source.name().into(),
            kind: configured.source.kind(),
            belief: configured.belief,
            wanted: watch::Sender::default(),
            suspicion: Suspicion::default(),
            suspected: 0,
            lists: HashMap::new(),
            authority: configured.authority.clone(),
            endpoints: configured.provides.endpoints.clone(),
            held: Held::new(configured.belief),
            routes: configured.provides.routes.clone(),
            policies: configured.provides.policies.clone(),
            resources: HeldResources::new(configured.belief),
            changed: TouchedResources::default(),
            resource_errors: Vec::new(),
            parts: BTreeMap::new(),
            unavailable: None,
            from_disk: false,
            was_known: false,
            is_heard: false,
            prefixes: configured.source.resource_prefixes(),
            unsaved: false,
            last_change: None,
            last_ok: None,
        }
    }

    pub(crate) fn layer(&self) -> Layer<'_> {
        Layer { source: &self.name, authority: &self.authority, endpoints: &self.endpoints, held: &self.held }
    }

    pub(crate) fn resource_layer(&self) -> ResourceLayer<'_> {
        ResourceLayer { source: &self.name, routes: &self.routes, policies: &self.policies, held: &self.resources }
    }

    pub(crate) fn wrong_resources(&self) -> Vec<String> {
        let not_granted = self.resource_layer().not_granted().take(MOST_ERRORS).collect::<Vec<_>>();
        let closed = self.resource_layer().closed().collect::<Vec<_>>();
        self.resources.refused().cloned().chain(closed).chain(self.resources.duplicates()).chain(not_granted).collect()
    }

    fn note_resources(&mut self, event: &mut SourceEvent) {
        let touched = match event {
            SourceEvent::Resources(news) => self.resources.apply(std::mem::take(news), Instant::now()),
            SourceEvent::Narrowed(wanted) => self.resources.narrow(wanted),
            SourceEvent::Unavailable { .. } => return self.resources.is_away(Instant::now()),
            _ => return,
        };
        if touched.is_empty() {
            // What is refused is to be told also where nothing changed; else it is put together when that is published.
            self.resource_errors = self.wrong_resources();
        } else {
            (self.last_change, self.unsaved) = (Some(SystemTime::now()), true);
        }
        self.changed.extend(touched);
    }

    pub(crate) fn note(&mut self, mut event: SourceEvent) -> Touched {
        let is_trouble = matches!(&event, SourceEvent::Resources(news) if news.is_trouble());
        self.note_resources(&mut event);
        match &event {
            _ if is_trouble => {}
            SourceEvent::Unavailable { error } | SourceEvent::Troubled { error } => {
                self.unavailable = Some(error.clone());
            }
            // Said without having asked.
            SourceEvent::Narrowed(_) => {}
            _ => (self.last_ok, self.unavailable) = (Some(SystemTime::now()), None),
        }
        self.is_heard |= matches!(&event, SourceEvent::Listed(_) | SourceEvent::Changed { .. } | SourceEvent::InSync);
        self.note_lists(&event);
        let listed = matches!(event, SourceEvent::Listed(_));
        self.from_disk &= !listed;
        if let SourceEvent::Listed(listing) | SourceEvent::Reread { listing, .. } = &event {
            self.suspicion.read(&listing.scope);
        }
        let touched = self.held.apply(event, Instant::now());
        touched.iter().for_each(|service| self.suspicion.told(service));
        if !touched.is_empty() || (listed && self.last_change.is_none()) {
            (self.last_change, self.unsaved) = (Some(SystemTime::now()), true);
        }
        touched
    }

    fn note_lists(&mut self, event: &SourceEvent) {
        match event {
            SourceEvent::Listed(listing) => _ = self.lists.insert(listing.scope.clone(), SystemTime::now()),
            SourceEvent::Narrowed(wanted) => {
                let scopes = wanted.scopes();
                self.lists.retain(|scope, _| scopes.contains(scope));
            }
            // The operator's files are looked at whole each time.
            SourceEvent::InSync if self.says_everything() => {
                self.lists.values_mut().for_each(|at| *at = SystemTime::now());
            }
            _ => {}
        }
    }

    /// Whatever is asked of it.
    pub(crate) fn says_everything(&self) -> bool {
        self.belief == Belief::Always
    }

    pub(crate) fn may_know(&self, service: &ServiceName) -> bool {
        self.authority.covers(service.namespace()) || self.endpoints.covers(service.namespace())
    }

    /// In this life of the daemon.
    pub(crate) fn has_listed(&self, service: &ServiceName) -> bool {
        self.lists.keys().any(|scope| scope.holds(service))
    }

    pub(crate) fn ask_again(&self) {
        self.wanted.send_modify(|wanted| wanted.resync += 1);
    }

    pub(crate) fn ask_if_suspected(&mut self) {
        match self.suspicion.take(Instant::now()) {
            None => {}
            Some(Again::Everything) => {
                self.suspected += 1;
                self.ask_again();
            }
            Some(Again::Services(services)) => self.ask_again_for(services),
        }
    }

    /// What was asked for longest ago makes room: suspicion sees to it that that was long ago.
    fn ask_again_for(&mut self, services: BTreeSet<ServiceName>) {
        self.suspected += services.len() as u64;
        let number = self.suspected;
        self.wanted.send_modify(|Wanted { reread, .. }| {
            reread.extend(services.into_iter().map(|service| (service, number)));
            while reread.len() > MOST_SERVICES {
                let oldest = reread.iter().min_by_key(|(_, number)| **number).map(|(service, _)| service.clone());
                oldest.map(|service| reread.remove(&service));
            }
        });
    }

    /// Another list could settle what is doubted.
    pub(crate) fn may_settle_a_doubt(&self) -> bool {
        self.held.stale() + self.resources.stale() > 0 && self.unavailable.is_none()
    }

    /// Files are waited for in any case, which takes a moment only.
    fn has_answered(&self) -> bool {
        let is_known = self.is_heard || (self.was_known && self.kind != FilesSource::KIND);
        let says = |prefix| self.resources.has_heard_of(prefix);
        self.unavailable.is_some() || (is_known && self.prefixes.iter().all(says))
    }

    pub(crate) fn take_part(&mut self, name: &ServiceName, part: Part) {
        if part == Part::default() {
            self.parts.remove(name);
        } else {
            self.parts.insert(name.clone(), part);
        }
    }

    pub(crate) fn health(&self) -> SourceHealth {
        let own = self.unavailable.iter();
        let refused = self.parts.values().flat_map(|part| &part.refused);
        let mut errors: Vec<String> = own
            .chain(self.held.problems())
            .chain(refused)
            .chain(&self.resource_errors)
            .take(MOST_ERRORS + 1)
            .cloned()
            .collect();
        if errors.len() > MOST_ERRORS {
            errors[MOST_ERRORS] = format!("and more than these {MOST_ERRORS}: mend them to see the rest");
        }
        SourceHealth {
            name: self.name.to_string(),
            kind: self.kind,
            services: self.parts.values().filter(|part| part.defines).count(),
            endpoints: self.parts.values().map(|part| part.endpoints).sum(),
            resources: self.resources.len(),
            refused_resources: self.resources.count_refused(),
            stale: self.held.stale() + self.resources.stale(),
            from_disk: self.from_disk,
            shadowed: self.shadowed(),
            last_change: self.last_change,
            last_ok: self.last_ok,
            last_listed: self.lists.values().min().copied(),
            suspected: self.suspected,
            errors,
            has_answered: self.has_answered(),
        }
    }

    fn shadowed(&self) -> Vec<ServiceName> {
        self.parts.iter().filter(|(_, part)| part.shadowed).map(|(name, _)| name.clone()).collect()
    }
}

/// Each error once when it appears, and once when all are gone.
pub(crate) fn log_difference(old: &SourceHealth, new: &SourceHealth) {
    for error in new.errors.iter().filter(|error| !old.errors.contains(error)) {
        tracing::warn!(source = new.name, "{error}");
    }
    let shadowed = if old.shadowed == new.shadowed { &[][..] } else { &new.shadowed };
    for service in shadowed.iter().filter(|service| !old.shadowed.contains(service)) {
        tracing::warn!(source = new.name, %service, "also defined by a source listed earlier in meshd.toml, which holds");
    }
    if !old.errors.is_empty() && new.errors.is_empty() {
        tracing::info!(source = new.name, "source is well again");
    }
}
