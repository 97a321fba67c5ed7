//! What the source asks of the API server, and its answers in the words of discovery.

use std::fmt::Write;
use std::time::Duration;

use super::client::{Asked, Client, Lines};
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
    /// Of pods and Leases, which labels they have: `app=payments,tier=web`. Empty: all.
    pub(super) labels: String,
}

/// What `follow` needs; scripted in its tests.
pub(super) trait Remote: Send {
    type Watch: Watch + Send + 'static;

    /// Which cluster it is, and how far it has come, as the majority of its etcd knows.
    fn probe(&mut self) -> impl Future<Output = Result<Epoch, Error>> + Send;
    /// No older than what is known already; `None`: the other life of a store may be younger.
    fn list(&mut self, what: &Collection, known: Option<&str>) -> impl Future<Output = Result<Listed, Error>> + Send;
    fn watch(&mut self, what: &Collection, from: &str) -> impl Future<Output = Result<Self::Watch, Error>> + Send;
    /// The next call goes by a new connection.
    fn leave(&mut self);
}

pub(super) trait Watch {
    /// `None`: it came to its end, which is normal.
    fn next(&mut self) -> impl Future<Output = Result<Option<Event>, Error>> + Send;
}

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

    async fn probe(&mut self) -> Result<Epoch, Error> {
        let asked = Asked { verb: "list", resource: "namespaces (kube-system)".to_owned() };
        match self.0.get(LIFE, &asked).await {
            Ok(answer) => {
                let (uid, position) = objects::read_life(&answer)?;
                Ok(Epoch { store: uid.into(), position })
            }
            // Who may not know that knows the server by its address, and how far it is by its lists.
            Err(Error::Forbidden { .. }) => {
                let asked = Asked { verb: "get", resource: READY.to_owned() };
                self.0.get(READY, &asked).await?;
                Ok(Epoch { store: self.0.server().into(), position: 0 })
            }
            Err(Error::Refused { status: 500..=599, reason }) => Err(Error::NotReady(reason)),
            Err(error) => Err(error),
        }
    }

    async fn list(&mut self, what: &Collection, known: Option<&str>) -> Result<Listed, Error> {
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

    async fn watch(&mut self, what: &Collection, from: &str) -> Result<ServerWatch, Error> {
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

impl ApiServer {
    async fn list_once_or_in_pages(&mut self, what: &Collection, known: Option<&str>) -> Result<Listed, Error> {
        let asked = what.asked("list");
        // Of one service the server's cache answers: cheap, and never older than what is known. Of more, in pages, which
        // read etcd: rare, and little at a time.
        if let Scope::Service(_) = what.area {
            let from = known.map_or("&resourceVersion=0".to_owned(), |known| {
                format!("&resourceVersion={}&resourceVersionMatch=NotOlderThan", encode(known))
            });
            match self.0.get(&what.path(&from), &asked).await {
                // A cache that has not come so far, or a store put back: etcd itself knows.
                Err(Error::Refused { status: 504, .. }) if known.is_some() => {}
                answer => return objects::read_list(what.kind, &answer?),
            }
        }
        let mut listed = Listed::default();
        let mut next = String::new();
        loop {
            let answer = self.0.get(&what.path(&format!("&limit={PAGE}{next}")), &asked).await?;
            let page = objects::read_list(what.kind, &answer)?;
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
            (Kind::Slice, _) => format!("&labelSelector={}", encode(SERVICE_NAME)),
            (Kind::Pod | Kind::Lease, _) if !self.labels.is_empty() => {
                format!("&labelSelector={}", encode(&self.labels))
            }
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
        Collection { kind, area, labels: labels.to_owned() }.path("&watch=1")
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
