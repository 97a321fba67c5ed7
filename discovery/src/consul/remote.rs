//! What the source asks of Consul, and when its answers are to be believed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use data_encoding::BASE64;
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{HeaderMap, HeaderValue};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::client::{CallError, Client, Reply};
use crate::name::check_label;
use crate::yaml::printable;

/// Consul answers what does not block within milliseconds; an election of its servers takes seconds.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// What a blocking query may take beyond what it was asked to wait and the sixteenth of that which Consul adds.
const GRACE: Duration = Duration::from_secs(10);
const CLUSTER: &str = "which cluster it is";
/// They are services of their own catalog. `leader`: as below.
const SERVERS: &str = "/v1/catalog/service/consul?leader";
/// The first version that says so where it hides something from a token.
const OLDEST: (u32, u32) = (1, 11);

/// Something that is followed by blocking queries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Query {
    /// Of the services of a namespace, or of all.
    Documents(Option<Arc<str>>),
    /// Routes and policies, below this key.
    Resources(Arc<str>),
    /// Of all services.
    Names,
    /// Of the service of that name, in whatever namespace of the mesh.
    Instances(Arc<str>),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    pub(super) index: u64,
    pub(super) content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Documents(Vec<Pair>),
    Resources(Vec<Pair>),
    Names(Vec<Arc<str>>),
    /// The JSON of each: most of them were read before.
    Instances(Vec<Bytes>),
}

/// A key of Consul's store.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) modified: u64,
    pub(super) value: Vec<u8>,
}

/// What `follow` needs; scripted in its tests.
pub(super) trait Remote: Send + 'static {
    /// The same Consul over a connection of its own.
    fn another(&self) -> Self;
    /// Which cluster it is, if it knows; and that it has a leader and does not hide things without saying so.
    fn cluster(&mut self) -> impl Future<Output = Result<Option<Arc<str>>, Error>> + Send;
    /// All there is, as soon as its index is beyond `index` and after `wait` at the latest; from 0: now.
    fn ask(&mut self, query: &Query, index: u64, wait: Duration) -> impl Future<Output = Result<Answer, Error>> + Send;
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("Consul has no leader, so what it says may be old; see `consul operator raft list-peers`")]
    NoLeader,
    #[error("Consul refuses the token ({0}); write the SecretID of a valid one to the file that `token_file` names")]
    Token(String),
    #[error("Consul hides {what} from this token; add `{rule}` to its policy{instead}")]
    Hidden { what: &'static str, rule: String, instead: &'static str },
    #[error(
        "Consul denies by default and does not tell who shows no token what it hides; give the SecretID of one with \
         `token_file`, or give the agent a default token"
    )]
    Anonymous,
    #[error(
        "Consul takes no more requests of this host now ({0}); raise limits.http_max_conns_per_client of its agent (200 by \
         default) or limits.request_limits of its servers, or import fewer services"
    )]
    TooMany(String),
    #[error(
        "Consul {0} does not say what it hides from a token, so that an empty answer of it means nothing; upgrade its servers \
         and agents to {major}.{minor} or later",
        major = OLDEST.0, minor = OLDEST.1
    )]
    TooOld(String),
    #[error("Consul answers {what} with {status}: {said}")]
    Status { what: String, status: u16, said: String },
    #[error("Consul's answer about {what} cannot be understood: {reason}")]
    Garbage { what: String, reason: String },
    #[error("a watch of Consul failed inside; all are started again; report this")]
    Inside,
    #[cfg(test)]
    #[error("{0}")]
    Scripted(&'static str),
}

impl Error {
    pub(super) fn garbage(what: &impl fmt::Display, error: &serde_json::Error) -> Error {
        Error::Garbage { what: what.to_string(), reason: printable(&error.to_string()) }
    }

    /// It has too much to do, and is there.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Error::TooMany(_))
    }

    /// Nobody is there.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Error::Call(CallError::Unreachable { .. }))
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Query::Documents(None) => f.write_str("the documents in its store"),
            Query::Documents(Some(namespace)) => write!(f, "the documents of namespace `{namespace}` in its store"),
            Query::Resources(_) => f.write_str("the routes and policies in its store"),
            Query::Names => f.write_str("the names of services"),
            Query::Instances(name) => write!(f, "service `{name}`"),
        }
    }
}

impl Query {
    fn path(&self, base: &str) -> String {
        match self {
            Query::Documents(_) => format!("/v1/kv/{}?recurse=true", self.documents(base)),
            Query::Resources(base) => format!("/v1/kv/{base}/?recurse=true"),
            // `leader`: agents with `discovery_max_stale` would ask any server, and those differ in how far they are.
            Query::Names => "/v1/catalog/services?leader".to_owned(),
            // `near` keeps agents from answering by their streaming backend, which says nothing of what is hidden from
            // the token, nor that it has lost its servers: it answers either with an empty list.
            Query::Instances(name) => format!("/v1/health/service/{name}?near=_agent&leader"),
        }
    }

    /// The prefix of their keys.
    fn documents(&self, base: &str) -> String {
        match self {
            Query::Documents(Some(namespace)) => format!("{base}/{namespace}/"),
            _ => format!("{base}/"),
        }
    }

    fn hidden(&self, base: &str) -> Error {
        let by_name = "; or list what this host uses in `imports`";
        let services = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" }";
        match self {
            Query::Documents(_) => Error::Hidden {
                what: "documents in its store",
                rule: format!("key_prefix \"{}\" {{ policy = \"read\" }}", self.documents(base)),
                instead: "",
            },
            Query::Resources(base) => Error::Hidden {
                what: "routes and policies in its store",
                rule: format!("key_prefix \"{base}/\" {{ policy = \"read\" }}"),
                instead: "; or take `routes` and `policies` out of `provides`",
            },
            Query::Names => Error::Hidden { what: "services", rule: services.to_owned(), instead: by_name },
            Query::Instances(_) => Error::Hidden { what: "instances", rule: services.to_owned(), instead: "" },
        }
    }
}

pub(super) struct Consul {
    client: Client,
    base: Arc<str>,
    /// As every one does since `OLDEST`.
    says_what_it_hides: bool,
}

impl Consul {
    pub(super) fn new(client: Client, base: Arc<str>) -> Consul {
        Consul { client, base, says_what_it_hides: false }
    }

    async fn call(&mut self, path: &str, deadline: Duration) -> Result<(Reply, Option<HeaderValue>), Error> {
        let token = self.client.token()?;
        let reply = self.client.get(path, token.as_ref(), deadline).await?;
        // It was replaced while the query blocked.
        if reply.status == StatusCode::FORBIDDEN && self.client.token()? != token {
            let token = self.client.token()?;
            return Ok((self.client.get(path, token.as_ref(), deadline).await?, token));
        }
        Ok((reply, token))
    }
}

impl Remote for Consul {
    fn another(&self) -> Consul {
        let Consul { base, says_what_it_hides, .. } = self;
        Consul { client: self.client.another(), base: base.clone(), says_what_it_hides: *says_what_it_hides }
    }

    /// The authority for service-to-service certificates is drawn with the cluster and lies in its snapshots.
    async fn cluster(&mut self) -> Result<Option<Arc<str>>, Error> {
        let (reply, token) = self.call("/v1/connect/ca/roots", CALL_DEADLINE).await?;
        let cluster = match reply.status {
            StatusCode::OK => {
                let roots: Roots = json(&reply, &CLUSTER)?;
                if !knows_leader(&reply.headers) {
                    return Err(Error::NoLeader);
                }
                Some(roots.trust_domain.into())
            }
            StatusCode::INTERNAL_SERVER_ERROR if has_no_authority(&reply.said()) => {
                let (leader, _) = self.call("/v1/status/leader", CALL_DEADLINE).await?;
                if leader.status != StatusCode::OK || leader.body.len() <= r#""""#.len() {
                    return Err(Error::NoLeader);
                }
                None
            }
            _ => return Err(refused(&reply, &CLUSTER, hidden_cluster)),
        };
        if token.is_none() && text(&reply.headers, "x-consul-default-acl-policy") == Some("deny") {
            let (reply, _) = self.call("/v1/acl/token/self", CALL_DEADLINE).await?;
            if !is_somebody(&reply) {
                return Err(Error::Anonymous);
            }
        }
        if !self.says_what_it_hides {
            let (reply, _) = self.call(SERVERS, CALL_DEADLINE).await?;
            self.says_what_it_hides = check_version(&reply)?;
        }
        Ok(cluster)
    }

    async fn ask(&mut self, query: &Query, index: u64, wait: Duration) -> Result<Answer, Error> {
        let path = query.path(&self.base);
        let (path, deadline) = match index {
            0 => (path, CALL_DEADLINE),
            _ => (format!("{path}&index={index}&wait={}ms", wait.as_millis()), wait + wait / 16 + GRACE),
        };
        let (reply, _) = self.call(&path, deadline).await?;
        answer(query, &reply, &self.base)
    }
}

/// What a reply says, if it says all there is.
fn answer(query: &Query, reply: &Reply, base: &str) -> Result<Answer, Error> {
    let is_empty_store =
        matches!(query, Query::Documents(_) | Query::Resources(_)) && reply.status == StatusCode::NOT_FOUND;
    if reply.status != StatusCode::OK && !is_empty_store {
        return Err(refused(reply, query, || query.hidden(base)));
    }
    if !knows_leader(&reply.headers) {
        return Err(Error::NoLeader);
    }
    if reply.is_filtered() {
        return Err(query.hidden(base));
    }
    let garbage = |reason: &str| Error::Garbage { what: query.to_string(), reason: reason.to_owned() };
    let index = text(&reply.headers, "x-consul-index").and_then(|index| index.parse().ok());
    let index = index.ok_or_else(|| garbage("it has no index"))?;
    let content = match query {
        Query::Documents(_) => Content::Documents(if is_empty_store { Vec::new() } else { pairs(reply, query)? }),
        Query::Resources(_) => Content::Resources(if is_empty_store { Vec::new() } else { pairs(reply, query)? }),
        Query::Names => {
            let names: BTreeMap<String, IgnoredAny> = json(reply, query)?;
            // Others cannot be names of the mesh.
            let names = names.into_keys().filter(|name| check_label("name", name).is_ok());
            Content::Names(names.map(Arc::from).collect())
        }
        Query::Instances(_) => {
            Content::Instances(elements(&reply.body).ok_or_else(|| garbage("it is no list of instances"))?)
        }
    };
    // An index of 0 would make the next query return at once, and the one after it.
    Ok(Answer { index: u64::max(index, 1), content })
}

fn pairs(reply: &Reply, query: &Query) -> Result<Vec<Pair>, Error> {
    let pairs: Vec<StoredPair> = json(reply, query)?;
    let pairs = pairs.into_iter().map(StoredPair::decode).collect::<Option<_>>();
    pairs.ok_or_else(|| Error::Garbage { what: query.to_string(), reason: "a value is no base64".to_owned() })
}

fn refused(reply: &Reply, what: &impl fmt::Display, hidden: impl FnOnce() -> Error) -> Error {
    let said = reply.said();
    match reply.status {
        StatusCode::FORBIDDEN if said.contains("ACL not found") => Error::Token(said),
        StatusCode::FORBIDDEN => hidden(),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Error::TooMany(said),
        StatusCode::INTERNAL_SERVER_ERROR if said.contains("No cluster leader") => Error::NoLeader,
        status => Error::Status { what: what.to_string(), status: status.as_u16(), said },
    }
}

fn hidden_cluster() -> Error {
    Error::Hidden { what: CLUSTER, rule: "operator = \"read\"".to_owned(), instead: "" }
}

/// Then nothing tells one cluster from another; its indexes have to. Services are followed all the same.
fn has_no_authority(said: &str) -> bool {
    ["Connect must be enabled", "CA has not finished initializing"].iter().any(|words| said.contains(words))
}

/// Whether it says what it hides. No cluster is without servers, so who shows none has hidden them without a word, or its
/// servers have not come that far.
fn check_version(reply: &Reply) -> Result<bool, Error> {
    if reply.status != StatusCode::OK {
        return Err(refused(reply, &"its servers", hidden_cluster));
    }
    if reply.is_filtered() {
        return Ok(true);
    }
    let servers: Vec<Server> = json(reply, &"its servers")?;
    if servers.is_empty() {
        return Err(Error::TooOld("hides its own servers and".to_owned()));
    }
    let versions = servers.iter().filter_map(|server| server.service_meta.as_ref()?.get("version"));
    match versions.filter(|version| parsed(version).is_some_and(|version| version < OLDEST)).min() {
        Some(old) => Err(Error::TooOld(printable(old))),
        None => Ok(true),
    }
}

/// Major and minor.
fn parsed(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// ACLs are off, or the agent shows a token of its own for who shows none.
fn is_somebody(reply: &Reply) -> bool {
    const ANONYMOUS: &str = "00000000-0000-0000-0000-000000000002";
    let somebody = |token: OwnToken| token.accessor_id != ANONYMOUS;
    match reply.status {
        StatusCode::UNAUTHORIZED => reply.said().contains("ACL support disabled"),
        StatusCode::OK => serde_json::from_slice(&reply.body).is_ok_and(somebody),
        _ => false,
    }
}

fn knows_leader(headers: &HeaderMap) -> bool {
    text(headers, "x-consul-knownleader") == Some("true")
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn json<T: DeserializeOwned>(reply: &Reply, what: &impl fmt::Display) -> Result<T, Error> {
    serde_json::from_slice(&reply.body).map_err(|error| Error::garbage(what, &error))
}

/// Of an array of objects, which are not looked into.
fn elements(array: &Bytes) -> Option<Vec<Bytes>> {
    let mut elements = Vec::new();
    let mut rest = array.trim_ascii().strip_prefix(b"[")?.trim_ascii_start();
    while rest.first() == Some(&b'{') {
        let mut objects = serde_json::Deserializer::from_slice(rest).into_iter::<IgnoredAny>();
        objects.next()?.ok()?;
        let (element, after) = rest.split_at(objects.byte_offset());
        elements.push(array.slice_ref(element));
        let after = after.trim_ascii_start();
        rest = after.strip_prefix(b",").unwrap_or(after).trim_ascii_start();
    }
    (rest == b"]").then_some(elements)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Roots {
    trust_domain: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Server {
    service_meta: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct OwnToken {
    #[serde(rename = "AccessorID")]
    accessor_id: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct StoredPair {
    key: String,
    modify_index: u64,
    /// Absent where nothing was written.
    value: Option<String>,
}

impl StoredPair {
    fn decode(self) -> Option<Pair> {
        let value = BASE64.decode(self.value.unwrap_or_default().as_bytes()).ok()?;
        Some(Pair { key: self.key, modified: self.modify_index, value })
    }
}

#[cfg(test)]
#[path = "remote_tests.rs"]
mod tests;
