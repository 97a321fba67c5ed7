use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::Service;

/// What a source's `watch` returns; a box so that sources can be mixed.
pub type SourceFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// One configured discovery backend.
///
/// `watch` runs for as long as the daemon does: it lists, watches, backs off and resyncs as its backend needs, and
/// reports through `sink`. It sends a [`SourceEvent::Snapshot`] only for a state it believes; trouble is
/// [`SourceEvent::Unavailable`], which changes no service.
///
/// ```
/// use meshd_discovery::{Sink, Source, SourceEvent, SourceFuture};
///
/// struct Nothing;
/// impl Source for Nothing {
///     fn name(&self) -> &str { "nothing" }
///     fn kind(&self) -> &'static str { "example" }
///     fn watch(self: Box<Self>, sink: Sink) -> SourceFuture {
///         Box::pin(async move {
///             sink.send(SourceEvent::Snapshot { offers: Vec::new(), problems: Vec::new() }).await;
///             std::future::pending().await
///         })
///     }
/// }
/// # let _: Box<dyn Source> = Box::new(Nothing);
/// ```
pub trait Source: Send {
    fn name(&self) -> &str;
    fn kind(&self) -> &'static str;
    fn watch(self: Box<Self>, sink: Sink) -> SourceFuture;
}

/// A service as a source offers it, and where it was read, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub service: Arc<Service>,
    /// `payments.yaml:3`, or a key in a remote store.
    pub origin: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// Everything the source offers now. Replaces all it said before; an empty one is believed.
    /// `problems` are entries it had to refuse (each a full message for the operator).
    Snapshot { offers: Vec<Offer>, problems: Vec<String> },
    /// Reached and unchanged since the last snapshot.
    InSync,
    /// Cannot be read now. What it said before stays in force.
    Unavailable { error: String },
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
