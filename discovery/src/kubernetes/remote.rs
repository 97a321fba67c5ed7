//! What the source asks of the API server, and its answers in the words of discovery.

use std::fmt::Write;
use std::time::Duration;

use super::client::{Asked, Caller, Client, Lines};
use super::error::Error;
use super::objects::{self, Event, Kind, Listed, SERVICE_NAME};
use crate::backoff::jittered;
use crate::{Epoch, Scope};

/// The server ends a watch then, so that watches do not pile up on the one that restarted first.
const WATCH_FOR: Duration = Duration::from_secs(300);
/// Objects per page of a list that is not of one service: some MB of pods.
const PAGE: usize = 500;

/// Objects of one kind that are followed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Collection {
    pub(super) kind: Kind,
    pub(super) area: Scope,
    /// Which labels they have: `app=payments,tier=web`. Empty: any, but of a service by name its own.
    pub(super) labels: String,
    /// The server's cache may answer, all at once.
    pub(super) is_little: bool,
}

/// What `follow` needs; scripted in its tests.
pub(super) trait Remote: Clone + Send + Sync + 'static {
    type Watch: Watch + Send + 'static;

    /// Which cluster it is, and how far it has come, as the majority of its etcd knows.
    fn probe(&self) -> impl Future<Output = Result<Epoch, Error>> + Send;
    /// No older than what is known already; `None`: the other life of a store may be younger.
    fn list(&self, what: &Collection, known: Option<&str>) -> impl Future<Output = Result<Listed, Error>> + Send;
    fn watch(&self, what: &Collection, from: &str) -> impl Future<Output = Result<Self::Watch, Error>> + Send;
    /// The next call goes by a new connection.
    fn leave(&mut self);
}

pub(super) trait Watch {
    /// `None`: it came to its end, which is normal.
    fn next(&mut self) -> impl Future<Output = Result<Option<Event>, Error>> + Send;
}

#[derive(Clone)]
pub(super) struct ApiServer(pub(super) Client);

pub(super) struct ServerWatch {
    lines: Lines,
    kind: Kind,
}

const LIFE: &str = "/api/v1/namespaces?fieldSelector=metadata.name%3Dkube-system";
const READY: &str = "/readyz";
/// Says whether our kinds are there; everybody who is known may ask.
const OURS: &str = "/apis/meshd.dev/v1alpha1";

impl Remote for ApiServer {
    type Watch = ServerWatch;

    async fn probe(&self) -> Result<Epoch, Error> {
        let mut furthest_back: Option<Epoch> = None;
        for caller in self.0.callers().await? {
            let life = life_by(&caller).await?;
            furthest_back = match furthest_back {
                None => Some(life),
                Some(other) if other.store != life.store => return Err(of_two_clusters(&other, &life)),
                Some(other) => Some(if other.position <= life.position { other } else { life }),
            };
        }
        Ok(furthest_back.unwrap_or_default())
    }

    async fn list(&self, what: &Collection, known: Option<&str>) -> Result<Listed, Error> {
        match self.list_once_or_in_pages(what, known).await {
            Err(Error::Refused { status: 404, .. }) if what.kind == Kind::Mesh => Err(Error::NotServed),
            // Who may not read what is not there has no trouble.
            Err(Error::Forbidden { verb, resource, reason }) if what.kind == Kind::Mesh => {
                let asked = Asked { verb: "get", resource: OURS.to_owned() };
                match self.0.get(OURS, &asked).await {
                    Err(Error::Refused { status: 404, .. } | Error::Forbidden { .. }) => Err(Error::NotServed),
                    _ => Err(Error::Forbidden { verb, resource, reason }),
                }
            }
            listed => listed,
        }
    }

    async fn watch(&self, what: &Collection, from: &str) -> Result<ServerWatch, Error> {
        let seconds = jittered(WATCH_FOR, fastrand::f64()).as_secs();
        let options =
            format!("&watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={}", encode(from));
        let lines = self.0.lines(&what.path(&options), &what.asked("watch")).await?;
        Ok(ServerWatch { lines, kind: what.kind })
    }

    fn leave(&mut self) {
        self.0.leave();
    }
}

/// What the majority of its etcd knows, by way of that connection.
async fn life_by(caller: &Caller) -> Result<Epoch, Error> {
    let asked = Asked { verb: "list", resource: "namespaces (kube-system)".to_owned() };
    match caller.get(LIFE, &asked).await {
        Ok(answer) => {
            let (uid, position) = objects::read_life(&answer)?;
            Ok(Epoch { store: uid.into(), position })
        }
        // Who may not know that knows the server by its address, and how far it is by its lists.
        Err(Error::Forbidden { .. }) => {
            let asked = Asked { verb: "get", resource: READY.to_owned() };
            caller.get(READY, &asked).await?;
            Ok(Epoch { store: caller.server().into(), position: 0 })
        }
        Err(Error::Refused { status: 500..=599, reason, .. }) => Err(Error::NotReady(reason)),
        Err(error) => Err(error),
    }
}

fn of_two_clusters(one: &Epoch, other: &Epoch) -> Error {
    Error::NotReady(format!(
        "servers of two clusters answer at its address ({} and {}); name one of them, or take the strange one out of the \
         load balancer",
        one.store, other.store
    ))
}

impl ApiServer {
    async fn list_once_or_in_pages(&self, what: &Collection, known: Option<&str>) -> Result<Listed, Error> {
        // What is little the server's cache tells: cheap, and never older than what is known. What is more comes in pages,
        // which read etcd: rare, and little at a time.
        if what.is_little {
            let from = known.map_or("&resourceVersion=0".to_owned(), |known| {
                format!("&resourceVersion={}&resourceVersionMatch=NotOlderThan", encode(known))
            });
            match self.0.get(&what.path(&from), &what.asked("list")).await {
                // A cache that has not come so far, or a store put back: etcd itself knows.
                Err(Error::Refused { status: 504, .. }) if known.is_some() => {}
                answer => return what.read(&answer?),
            }
        }
        match self.list_in_pages(what).await {
            // It took longer than the server keeps where a page begins.
            Err(Error::Expired) => self.list_in_pages(what).await,
            listed => listed,
        }
    }

    async fn list_in_pages(&self, what: &Collection) -> Result<Listed, Error> {
        let mut listed = Listed::default();
        let mut next = String::new();
        loop {
            let answer = self.0.get(&what.path(&format!("&limit={PAGE}{next}")), &what.asked("list")).await?;
            let page = what.read(&answer)?;
            listed.objects.extend(page.objects);
            listed.position = page.position;
            match page.more {
                Some(token) => next = format!("&continue={}", encode(&token)),
                None => return Ok(listed),
            }
        }
    }
}

impl Watch for ServerWatch {
    async fn next(&mut self) -> Result<Option<Event>, Error> {
        match self.lines.next().await? {
            Some(line) => objects::read_event(self.kind, &line).map(Some),
            None => Ok(None),
        }
    }
}

impl Collection {
    fn read(&self, answer: &[u8]) -> Result<Listed, Error> {
        let unreadable = |error| match error {
            Error::Garbled(reason) => Error::Garbled(format!("{}: {reason}", self.asked("list"))),
            error => error,
        };
        let listed = objects::read_list(self.kind, answer).map_err(unreadable)?;
        if listed.position.is_empty() {
            return Err(Error::Garbled(format!("{}: `metadata.resourceVersion` is missing", self.asked("list"))));
        }
        Ok(listed)
    }

    fn asked(&self, verb: &'static str) -> Asked {
        let kind = match self.kind {
            Kind::Service => "services",
            Kind::Slice => "endpointslices",
            Kind::Pod => "pods",
            Kind::Lease => "leases",
            Kind::Mesh => "meshservices",
        };
        let place = match &self.area {
            Scope::Everything => "all namespaces".to_owned(),
            Scope::Namespace(namespace) => format!("namespace {namespace}"),
            Scope::Service(service) => format!("namespace {}", service.namespace()),
        };
        Asked { verb, resource: format!("{kind} in {place}") }
    }

    /// `options` begin with `&`.
    fn path(&self, options: &str) -> String {
        let (group, plural) = match self.kind {
            Kind::Service => ("/api/v1", "services"),
            Kind::Slice => ("/apis/discovery.k8s.io/v1", "endpointslices"),
            Kind::Pod => ("/api/v1", "pods"),
            Kind::Lease => ("/apis/coordination.k8s.io/v1", "leases"),
            Kind::Mesh => (OURS, "meshservices"),
        };
        let namespace = match &self.area {
            Scope::Everything => String::new(),
            Scope::Namespace(namespace) => format!("/namespaces/{namespace}"),
            Scope::Service(service) => format!("/namespaces/{}", service.namespace()),
        };
        let selector = match (self.kind, &self.area) {
            (Kind::Service | Kind::Mesh, Scope::Service(service)) => {
                format!("&fieldSelector={}", encode(&format!("metadata.name={}", service.name())))
            }
            (Kind::Slice, Scope::Service(service)) => {
                format!("&labelSelector={}", encode(&format!("{SERVICE_NAME}={}", service.name())))
            }
            _ if !self.labels.is_empty() => format!("&labelSelector={}", encode(&self.labels)),
            (Kind::Slice, _) => format!("&labelSelector={}", encode(SERVICE_NAME)),
            _ => String::new(),
        };
        let query = format!("{selector}{options}");
        format!("{group}{namespace}/{plural}?{}", query.trim_start_matches('&'))
    }
}

/// RFC 3986 2.1, for a value in a query.
pub(super) fn encode(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut encoded, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
            // Writing to a String does not fail.
            _ => write!(encoded, "%{byte:02X}").unwrap_or_default(),
        }
        encoded
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(kind: Kind, area: Scope, labels: &str) -> String {
        Collection { kind, area, labels: labels.to_owned(), is_little: false }.path("&watch=1")
    }

    #[test]
    fn no_more_than_one_service_is_asked_for_when_no_more_is_wanted() {
        let payments = || Scope::Service("payments.shop".parse().unwrap());
        assert_eq!(
            path(Kind::Service, payments(), ""),
            "/api/v1/namespaces/shop/services?fieldSelector=metadata.name%3Dpayments&watch=1"
        );
        assert_eq!(
            path(Kind::Slice, payments(), ""),
            "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3Dpayments&watch=1"
        );
        assert_eq!(
            path(Kind::Pod, payments(), "app=payments,tier=web"),
            "/api/v1/namespaces/shop/pods?labelSelector=app%3Dpayments%2Ctier%3Dweb&watch=1"
        );
    }

    #[test]
    fn a_pattern_asks_for_a_namespace_or_the_whole_cluster() {
        assert_eq!(path(Kind::Pod, Scope::Namespace("shop".into()), ""), "/api/v1/namespaces/shop/pods?watch=1");
        assert_eq!(
            path(Kind::Slice, Scope::Everything, ""),
            "/apis/discovery.k8s.io/v1/endpointslices?labelSelector=kubernetes.io%2Fservice-name&watch=1"
        );
    }
}
