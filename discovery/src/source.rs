use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use crate::resources::ResourceNews;
use crate::{Record, ServiceName};

/// What a source's `watch` returns; a box so that sources can be mixed.
pub type SourceFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// One configured discovery backend.
///
/// `watch` runs for as long as the daemon does: it lists, watches, backs off and resyncs as its backend needs, and
/// reports through `sink`. It says what it read; what of it is believed at once is decided elsewhere (`belief.rs`).
/// Trouble is [`SourceEvent::Unavailable`], which changes no service.
///
/// ```
/// use meshd_discovery::{Epoch, Listing, Scope, Sink, Source, SourceEvent, SourceFuture, Wanted};
/// use tokio::sync::watch;
///
/// struct Nothing;
/// impl Source for Nothing {
///     fn name(&self) -> &str { "nothing" }
///     fn kind(&self) -> &'static str { "example" }
///     fn watch(&self, _wanted: watch::Receiver<Wanted>, sink: Sink) -> SourceFuture {
///         Box::pin(async move {
///             sink.send(SourceEvent::Listed(Listing::empty(Scope::Everything, Epoch::default()))).await;
///             std::future::pending().await
///         })
///     }
/// }
/// # let _: Box<dyn Source> = Box::new(Nothing);
/// ```
pub trait Source: Send + Sync {
    fn name(&self) -> &str;
    fn kind(&self) -> &'static str;
    /// Below which it says routes and policies: each is listed, or why it cannot be is told, once it can be reached.
    fn resource_prefixes(&self) -> Vec<Arc<str>> {
        Vec::new()
    }
    /// A source that reads from another machine keeps to what is `wanted`.
    /// Called again when it ended, which only a defect does.
    fn watch(&self, wanted: watch::Receiver<Wanted>, sink: Sink) -> SourceFuture;
}

/// What this host uses of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Declared with `*`.
    pub everything: bool,
    /// Declared with `*.namespace`.
    pub namespaces: BTreeSet<String>,
    /// Declared by name.
    pub services: BTreeSet<ServiceName>,
    /// Looked up here. As with a pattern, what does not take part in the mesh is not meant.
    pub looked_up: BTreeSet<ServiceName>,
    /// Grows with every request to read all again.
    pub resync: u64,
    /// Services to be read again because an endpoint of theirs cannot be reached, each with the number of its request: what
    /// was answered before is not asked for any more.
    pub reread: BTreeMap<ServiceName, u64>,
}

impl Wanted {
    pub fn covers(&self, service: &ServiceName) -> bool {
        self.everything
            || self.namespaces.contains(service.namespace())
            || self.services.contains(service)
            || self.looked_up.contains(service)
    }

    /// Whether the same is meant, whatever is to be read again.
    pub(crate) fn is_same_as(&self, other: &Wanted) -> bool {
        *self == Wanted { resync: self.resync, reread: self.reread.clone(), ..other.clone() }
    }

    /// The same, as lists that do not overlap.
    pub fn scopes(&self) -> Vec<Scope> {
        if self.everything {
            return vec![Scope::Everything];
        }
        let alone = |service: &&ServiceName| !self.namespaces.contains(service.namespace());
        let services = self.services.union(&self.looked_up).filter(alone).cloned().map(Scope::Service);
        self.namespaces.iter().cloned().map(Scope::Namespace).chain(services).collect()
    }
}

/// What a list was a list of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    Everything,
    Namespace(String),
    Service(ServiceName),
}

impl Scope {
    pub fn holds(&self, service: &ServiceName) -> bool {
        match self {
            Scope::Everything => true,
            Scope::Namespace(namespace) => service.namespace() == namespace,
            Scope::Service(name) => name == service,
        }
    }

    pub fn overlaps(&self, other: &Scope) -> bool {
        match (self, other) {
            (Scope::Everything, _) | (_, Scope::Everything) => true,
            (Scope::Namespace(ours), Scope::Namespace(theirs)) => ours == theirs,
            (scope, Scope::Service(service)) | (Scope::Service(service), scope) => scope.holds(service),
        }
    }
}

/// Which life of the store a list was read from, and how far it had come: etcd's cluster id and revision, Consul's
/// index, the resourceVersion of Kubernetes. Another store, or a lower position, is a store that was put back.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Epoch {
    pub store: Arc<str>,
    pub position: u64,
}

impl Epoch {
    pub(crate) fn continues_in(&self, later: &Epoch) -> bool {
        self.store == later.store && self.position <= later.position
    }
}

/// All there is of one scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    pub scope: Scope,
    pub epoch: Epoch,
    pub records: Vec<Record>,
    pub refused: Vec<Refused>,
}

impl Listing {
    pub fn empty(scope: Scope, epoch: Epoch) -> Listing {
        Listing { scope, epoch, records: Vec::new(), refused: Vec::new() }
    }
}

/// Something that cannot be understood; what its key said before stays in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub key: Arc<str>,
    /// Full messages for the operator.
    pub problems: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// New, or says something else now.
    Set(Record),
    /// By its key.
    Removed(Arc<str>),
    Refused(Refused),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// What was said before of this scope, and is not in it, is gone.
    Listed(Listing),
    /// What happened since the list of this scope, up to a position.
    Changed { scope: Scope, position: u64, changes: Vec<Change> },
    /// All there is of one service, read again beside what is followed: a part of that scope.
    Reread { within: Scope, listing: Listing },
    /// What happened of routes and policies, or all there is of them.
    Resources(ResourceNews),
    /// Nothing else is followed from now on: what was said of other services is forgotten.
    Narrowed(Wanted),
    /// Reached and unchanged.
    InSync,
    /// Cannot be read now. What it said before stays in force.
    Unavailable { error: String },
    /// Some of it cannot be read now. What it says of the rest is believed as ever.
    Troubled { error: String },
}

/// Where a source reports to.
#[derive(Debug, Clone)]
pub struct Sink {
    index: usize,
    events: mpsc::Sender<(usize, SourceEvent)>,
}

impl Sink {
    pub(crate) fn new(index: usize, events: mpsc::Sender<(usize, SourceEvent)>) -> Sink {
        Sink { index, events }
    }

    /// Waits when the watcher is behind. Once the watcher is gone the event is dropped: the source's task is being
    /// cancelled with it.
    pub async fn send(&self, event: SourceEvent) {
        let _ = self.events.send((self.index, event)).await;
    }
}
