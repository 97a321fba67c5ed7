//! Names that are asked for on this host, and what comes of it: see `interests.rs`.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use crate::interests::{Interests, Now, Presence};
use crate::saved::Keep;
use crate::{Directory, ServiceName, Wanted};

/// Who asks for a name may be kept waiting for so long: stub resolvers ask again after 5 s, and people notice one.
const PATIENCE: Duration = Duration::from_secs(1);
/// More at once are a scan of names.
const MOST_WAITING: usize = 256;
/// How what is followed is called where it is kept.
const KEPT_AS: &str = "interests";
const DAY: u64 = 86_400;

/// What came of a look for a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Looked {
    /// It is in the directory.
    Found,
    /// No source knows it.
    Nowhere,
    /// Sources that might know it have not answered.
    Unsure,
}

/// Where names are asked for, by DNS and by connections to virtual IPs. From any thread.
#[derive(Debug, Clone)]
pub struct Lookups(Option<Asking>);

#[derive(Debug, Clone)]
struct Asking {
    orders: mpsc::Sender<Order>,
    used: Arc<Mutex<BTreeSet<ServiceName>>>,
    directory: watch::Receiver<Arc<Directory>>,
}

#[derive(Debug)]
pub(crate) struct Order {
    service: ServiceName,
    answer: oneshot::Sender<Looked>,
}

impl Lookups {
    /// What this host uses is declared, or all of it is known anyway.
    pub fn off() -> Lookups {
        Lookups(None)
    }

    pub fn are_on(&self) -> bool {
        self.0.is_some()
    }

    /// Has the service followed from now on, and waits for every source that may know it; a second at most.
    pub async fn look_up(&self, service: &ServiceName) -> Looked {
        let Some(asking) = &self.0 else { return Looked::Nowhere };
        let (answer, answered) = oneshot::channel();
        if asking.orders.try_send(Order { service: service.clone(), answer }).is_err() {
            return Looked::Unsure;
        }
        match timeout(PATIENCE, answered).await {
            Ok(Ok(looked)) => looked,
            Ok(Err(_)) | Err(_) => Looked::Unsure,
        }
    }

    /// As of now: who was told that a service is found finds it there.
    pub fn directory(&self) -> Option<Arc<Directory>> {
        Some(self.0.as_ref()?.directory.borrow().clone())
    }

    /// It was asked for, or has connections.
    pub fn note_use(&self, service: &ServiceName) {
        let Some(asking) = &self.0 else { return };
        let mut used = asking.used.lock().unwrap_or_else(PoisonError::into_inner);
        if !used.contains(service) {
            used.insert(service.clone());
        }
    }
}

/// Something that remote sources are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Import {
    /// `payments.shop`, `*.shop` or `*`.
    pub name: String,
    pub why: Why,
    /// A service of the name is in the directory; of a pattern always.
    pub known: bool,
    /// The start of the day (UTC) on which it was asked for or had connections last, as Unix time.
    pub last_used: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// In meshd.toml.
    Declared,
    /// By name, or by a connection to its virtual IP.
    LookedUp,
}

impl Import {
    pub(crate) fn declared(wanted: &Wanted, known: impl Fn(&ServiceName) -> bool) -> impl Iterator<Item = Import> {
        let import = |name: String, known| Import { name, why: Why::Declared, known, last_used: None };
        let everything = wanted.everything.then(|| import("*".to_owned(), true));
        let namespaces = wanted.namespaces.iter().map(move |namespace| import(format!("*.{namespace}"), true));
        let services = wanted.services.iter().map(move |service| import(service.to_string(), known(service)));
        everything.into_iter().chain(namespaces).chain(services)
    }
}

/// The watcher's side.
pub(crate) struct Interested {
    interests: Interests,
    keep: Arc<dyn Keep>,
    kept: Arc<Mutex<String>>,
    lookups: Lookups,
    orders: mpsc::Receiver<Order>,
    waiting: Vec<Order>,
    /// It may have changed since it was written.
    is_new: bool,
}

impl Interested {
    /// Begins with what an earlier life followed.
    pub(crate) fn open(keep: Arc<dyn Keep>, directory: watch::Receiver<Arc<Directory>>) -> Interested {
        let (orders, inbox) = mpsc::channel(MOST_WAITING);
        let interests = restore(&*keep).unwrap_or_else(|problem| {
            tracing::warn!("which services this host uses cannot be read: {problem}; they are learned anew");
            Interests::default()
        });
        let kept = Arc::new(Mutex::new(interests.to_text()));
        let lookups = Lookups(Some(Asking { orders, used: Arc::default(), directory }));
        Interested { interests, keep, kept, lookups, orders: inbox, waiting: Vec::new(), is_new: false }
    }

    pub(crate) fn lookups(&self) -> Lookups {
        self.lookups.clone()
    }

    pub(crate) async fn next(&mut self) -> Option<Order> {
        self.orders.recv().await
    }

    /// False: too many are followed and in use.
    pub(crate) fn take(&mut self, order: Order) -> bool {
        let fits = self.waiting.len() < MOST_WAITING && self.interests.ask(&order.service, now());
        if fits {
            self.waiting.push(order);
        } else {
            // Who asked may have left.
            let _ = order.answer.send(Looked::Unsure);
        }
        fits
    }

    /// Answers whom nothing keeps waiting any more.
    pub(crate) fn answer(&mut self, presence: impl Fn(&ServiceName) -> Presence) {
        for order in std::mem::take(&mut self.waiting) {
            let looked = match presence(&order.service) {
                Presence::Known => {
                    self.interests.note_known(&order.service);
                    self.is_new = true;
                    Looked::Found
                }
                Presence::Nowhere => Looked::Nowhere,
                Presence::Unsure => Looked::Unsure,
                Presence::Awaited if order.answer.is_closed() => continue,
                Presence::Awaited => {
                    self.waiting.push(order);
                    continue;
                }
            };
            // Who asked may have left.
            let _ = order.answer.send(looked);
        }
    }

    pub(crate) fn settle(&mut self, presence: impl Fn(&ServiceName) -> Presence) {
        let Some(asking) = &self.lookups.0 else { return };
        let used = std::mem::take(&mut *asking.used.lock().unwrap_or_else(PoisonError::into_inner));
        let now = now();
        used.iter().for_each(|service| self.interests.note_use(service, now));
        self.interests.settle(now, presence);
        self.is_new = *self.kept.lock().unwrap_or_else(PoisonError::into_inner) != self.interests.to_text();
    }

    pub(crate) fn is_new(&self) -> bool {
        self.is_new
    }

    pub(crate) fn names(&self) -> BTreeSet<ServiceName> {
        self.interests.names()
    }

    pub(crate) fn imports(&self) -> impl Iterator<Item = Import> {
        self.interests.iter().map(|(name, interest)| Import {
            name: name.to_string(),
            why: Why::LookedUp,
            known: interest.is_known(),
            last_used: Some(interest.last_day() * DAY),
        })
    }

    /// What is to be written, if that is not on disk.
    pub(crate) fn unsaved(&mut self) -> Option<impl FnOnce() + Send + 'static> {
        self.is_new = false;
        let text = self.interests.to_text();
        let kept = self.kept.clone();
        if *kept.lock().unwrap_or_else(PoisonError::into_inner) == text {
            return None;
        }
        let keep = self.keep.clone();
        Some(move || match keep.save(KEPT_AS, &text) {
            Ok(()) => *kept.lock().unwrap_or_else(PoisonError::into_inner) = text,
            Err(error) => tracing::warn!("which services this host uses cannot be saved: {error}; it is tried again"),
        })
    }
}

fn restore(keep: &dyn Keep) -> Result<Interests, String> {
    match keep.load(KEPT_AS).map_err(|error: io::Error| error.to_string())? {
        Some(text) => Interests::from_text(&text, Instant::now()),
        None => Ok(Interests::default()),
    }
}

fn now() -> Now {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { at: Instant::now(), day: since_1970.as_secs() / DAY }
}
