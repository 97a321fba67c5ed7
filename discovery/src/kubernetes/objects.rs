//! Of Services, EndpointSlices and Pods, the few fields that say where a service runs, and our own documents. Nothing else is
//! kept.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::{Protocol, ServiceName};

/// What operators write on objects for us.
pub(super) const NOTES: &str = "meshd.dev/";
/// On a slice: of which Service it is.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// On a slice, below [`NOTES`]: the Lease of the host that wrote it, and who must hold it.
pub(super) const LEASE: &str = "lease";
pub(super) const LEASE_HOLDER: &str = "lease-holder";

/// Annotations below [`NOTES`], without it.
pub(super) type Notes = BTreeMap<String, String>;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Kind {
    Service,
    Slice,
    Pod,
    /// Of a host that registers.
    Lease,
    /// Ours.
    Mesh,
}

/// That somebody is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) name: String,
    pub(super) holder: String,
    /// Only whether it changes matters.
    pub(super) renewed: String,
    pub(super) lasts: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) name: ServiceName,
    pub(super) ports: Vec<Port>,
    /// Its ClusterIPs.
    pub(super) addresses: Vec<IpAddr>,
    /// Of its addresses, those of its pods before all; `None`: it does not say.
    pub(super) is_of_ipv6: Option<bool>,
    /// Empty: somebody else says where it runs.
    pub(super) selector: BTreeMap<String, String>,
    /// A name elsewhere, which runs nowhere here.
    pub(super) is_external: bool,
    pub(super) notes: Notes,
}

/// TCP only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) port: u16,
    pub(super) protocol: Protocol,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slice {
    /// `shop/payments-x2v4f`
    pub(super) key: Arc<str>,
    pub(super) service: ServiceName,
    /// Each name with the port of the programs; `None`: whatever the Service says.
    pub(super) ports: Vec<(String, Option<u16>)>,
    pub(super) endpoints: Vec<SliceEndpoint>,
    /// Endpoints that are names, not addresses.
    pub(super) is_of_names: bool,
    pub(super) notes: Notes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SliceEndpoint {
    /// Its first: all of them lead to the same program.
    pub(super) address: Option<IpAddr>,
    pub(super) state: State,
    pub(super) zone: Arc<str>,
    /// `shop/payments-7d9f`, and which of that name.
    pub(super) pod: Option<(Arc<str>, Life)>,
}

/// The best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    Ready,
    /// It ends, and still answers.
    Draining,
    Away,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) life: Life,
    /// Its service account.
    pub(super) account: Arc<str>,
    pub(super) labels: Labels,
    /// It takes HBONE, by Istio's own rule.
    pub(super) takes_hbone: bool,
}

/// Of a uid, as much as tells two pods of one name apart; 0 where none is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life(u64);

impl Life {
    pub(super) fn of(uid: &str) -> Life {
        let mut hasher = DefaultHasher::new();
        uid.hash(&mut hasher);
        Life(if uid.is_empty() { 0 } else { hasher.finish().max(1) })
    }

    /// Nothing says that they are two.
    pub(super) fn may_be(self, other: Life) -> bool {
        self == other || self.0 == 0 || other.0 == 0
    }
}

/// Of labels, as much as tells whether a selector names them: there are many pods, and each has ten of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Labels(Box<[u64]>);

impl Labels {
    pub(super) fn of<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Labels {
        Labels(labels.into_iter().map(Self::mark).collect())
    }

    /// Who chooses a label of the same mark could have chosen that label.
    fn mark(label: (&String, &String)) -> u64 {
        let mut hasher = DefaultHasher::new();
        label.hash(&mut hasher);
        hasher.finish()
    }

    pub(super) fn are_selected(&self, selector: &BTreeMap<String, String>) -> bool {
        !selector.is_empty() && selector.iter().all(|label| self.0.contains(&Self::mark(label)))
    }
}

/// A MeshService, as text: what it means the reader of documents knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mesh {
    pub(super) name: ServiceName,
    pub(super) text: Box<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Object {
    Service(Service),
    Slice(Slice),
    /// By its key, `shop/payments-7d9f`.
    Pod(Arc<str>, Pod),
    Lease(Lease),
    Mesh(Mesh),
}

/// What a list says.
#[derive(Debug, Default)]
pub(super) struct Listed {
    pub(super) objects: Vec<Object>,
    pub(super) position: String,
    /// Where the next page begins.
    pub(super) more: Option<String>,
}

/// A line of a watch.
#[derive(Debug)]
pub(super) enum Event {
    Set(Object, String),
    Gone(Object, String),
    /// Nothing happened up to there.
    Bookmark(String),
    /// The history that the watch needs is no longer kept.
    Expired,
    Failed(String),
    /// An object that cannot be one of a service of the mesh.
    Other(String),
}
