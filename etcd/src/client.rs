//! Calls on the first member that answers, until it does not.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::Uri;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Code, Request, Status, Streaming};

use crate::api::auth_client::AuthClient;
use crate::api::kv_client::KvClient;
use crate::api::lease_client::LeaseClient;
use crate::api::watch_client::WatchClient;
use crate::api::watch_request::RequestUnion;
use crate::api::{
    AuthenticateRequest, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, RangeRequest,
    ResponseHeader, TxnRequest, TxnResponse, WatchCancelRequest, WatchCreateRequest, WatchRequest, WatchResponse,
};
use crate::connection::{Connection, connect};
use crate::ops::Prefix;
use crate::settings::{Settings, SettingsError};

/// TCP, TLS and HTTP/2 together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
/// A commit takes milliseconds; an election of etcd's own takes 1 to 2 s by its defaults.
const CALL_DEADLINE: Duration = Duration::from_secs(4);
/// Keys per answer: values may have some 100 KiB each.
const PAGE: i64 = 100;
/// Watches that may be asked for before the stream takes them; more wait.
const WATCH_REQUESTS: usize = 16;
const LARGEST_ANSWER: usize = 256 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("no etcd member can be reached: {0}")]
    Unreachable(String),
    #[error("etcd did not answer within {} s; has it lost its quorum?", CALL_DEADLINE.as_secs())]
    Deadline,
    #[error("etcd refused: {} ({:?})", .0.message(), .0.code())]
    Refused(Status),
}

impl Error {
    /// Whether a member went away before it answered: what was asked may or may not have been done.
    pub fn is_gone(&self) -> bool {
        matches!(self, Error::Refused(status) if matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled))
    }

    /// Whether etcd takes no changes now, from anybody or from this user: it is full, or a right is missing.
    pub fn is_refusal_to_write(&self) -> bool {
        matches!(self, Error::Refused(status) if matches!(status.code(), Code::ResourceExhausted | Code::PermissionDenied))
    }

    /// Whether who asks is not known, or may not.
    pub fn is_denied(&self) -> bool {
        let unknown = ["authentication failed", "user name is empty"];
        matches!(self, Error::Refused(status)
            if matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated)
                || unknown.iter().any(|text| status.message().contains(text)))
    }

    /// Whether etcd does not know any more who asks: it was not done, and may be asked again.
    fn is_of_old_login(&self) -> bool {
        let old = ["invalid auth token", "revision of auth store is old"];
        matches!(self, Error::Refused(status) if status.code() == Code::Unauthenticated
            || old.iter().any(|text| status.message().contains(text)))
    }

    /// For whoever follows etcd, when following cannot go on.
    pub fn gone(why: &str) -> Error {
        Error::Refused(Status::unavailable(why))
    }

    /// A right is missing.
    pub fn forbidden(why: &str) -> Error {
        Error::Refused(Status::permission_denied(why))
    }

    /// The revision asked for is not kept any more.
    pub fn compacted() -> Error {
        Error::Refused(Status::out_of_range("compacted"))
    }

    pub fn is_compacted(&self) -> bool {
        matches!(self, Error::Refused(status) if status.code() == Code::OutOfRange)
    }
}

#[derive(Clone)]
struct Session {
    connection: Connection,
    token: Option<MetadataValue<Ascii>>,
    member: usize,
}

pub struct Client {
    settings: Settings,
    session: Mutex<Option<Session>>,
    /// Where to begin when there is no session.
    next: Mutex<usize>,
}

/// Everything below a prefix at one revision.
#[derive(Debug, Default)]
pub struct Listed {
    pub header: ResponseHeader,
    pub keys: Vec<KeyValue>,
}

/// A watch that was confirmed. What comes out is in the order of revisions.
pub struct Watching {
    /// The watch ends when nobody can say anything on it any more.
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Watching {
    /// The next message; an end of the stream is an error.
    pub async fn next(&mut self) -> Result<WatchResponse, Error> {
        let message = self.responses.message().await.map_err(Error::Refused)?;
        message.ok_or_else(|| Error::Refused(Status::unavailable("the watch ended")))
    }
}

/// Several watches on one stream.
pub struct Watches(Watching);

impl Watches {
    /// The next message of any of them, in the order of revisions for each.
    pub async fn next(&mut self) -> Result<WatchResponse, Error> {
        self.0.next().await
    }

    pub async fn add(&self, id: i64, prefix: &Prefix, from: i64) -> Result<(), Error> {
        self.request(create(id, prefix, from)).await
    }

    /// What was on its way may still come.
    pub async fn cancel(&self, id: i64) -> Result<(), Error> {
        let cancel = RequestUnion::CancelRequest(WatchCancelRequest { watch_id: id });
        self.request(WatchRequest { request_union: Some(cancel) }).await
    }

    async fn request(&self, request: WatchRequest) -> Result<(), Error> {
        match timeout(CALL_DEADLINE, self.0.requests.send(request)).await {
            Ok(sent) => sent.map_err(|_| Error::Refused(Status::unavailable("the watch ended"))),
            Err(_) => Err(Error::Deadline),
        }
    }
}

fn create(id: i64, prefix: &Prefix, from: i64) -> WatchRequest {
    let create = WatchCreateRequest {
        key: prefix.key.clone(),
        range_end: prefix.end.clone(),
        start_revision: from,
        progress_notify: false,
        watch_id: id,
    };
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

impl Client {
    pub fn new(settings: Settings) -> Result<Client, Error> {
        settings.check()?;
        Ok(Client { settings, session: Mutex::default(), next: Mutex::default() })
    }

    /// All keys below a prefix as they were at one revision.
    pub async fn list(&self, prefix: &Prefix) -> Result<Listed, Error> {
        let mut listed = Listed::default();
        let mut from = prefix.key.clone();
        loop {
            let revision = listed.header.revision;
            let range_end = prefix.end.clone();
            let request =
                RangeRequest { key: from.clone(), range_end, limit: PAGE, revision, ..RangeRequest::default() };
            let answer = self.range(request).await?;
            if listed.header.revision == 0 {
                listed.header = answer.header.unwrap_or_default();
            }
            let last = answer.kvs.last().map(|pair| pair.key.clone());
            listed.keys.extend(answer.kvs);
            match last.filter(|_| answer.more) {
                Some(last) if last < from => return Err(Error::gone("a list goes on with what was asked for already")),
                Some(last) => from = [last, vec![0]].concat(),
                None => return Ok(listed),
            }
        }
    }

    /// The revision in which a key was last written, as the majority knows it, and of which cluster; 0 if it is not
    /// there.
    pub async fn modified(&self, key: &str) -> Result<(ResponseHeader, i64), Error> {
        let answer = self.range(RangeRequest { key: key.into(), keys_only: true, ..RangeRequest::default() }).await?;
        let revision = answer.kvs.first().map_or(0, |pair| pair.mod_revision);
        Ok((answer.header.unwrap_or_default(), revision))
    }

    async fn range(&self, request: RangeRequest) -> Result<crate::api::RangeResponse, Error> {
        let mut attempts = self.settings.endpoints.len();
        loop {
            let answer = self.call(|session| {
                let request = session.request(request.clone());
                async move { session.kv().range(request).await }
            });
            attempts -= 1;
            match answer.await {
                Err(error) if error.is_gone() && attempts > 0 => {}
                other => return other,
            }
        }
    }

    /// Never carried out twice.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Error> {
        self.call(|session| {
            let request = session.request(request.clone());
            async move { session.kv().txn(request).await }
        })
        .await
    }

    pub async fn grant(&self, seconds: i64) -> Result<i64, Error> {
        let answer = self.call(|session| async move {
            let request = session.request(LeaseGrantRequest { ttl: seconds, id: 0 });
            session.lease().lease_grant(request).await
        });
        Ok(answer.await?.id)
    }

    pub async fn revoke(&self, lease: i64) -> Result<(), Error> {
        let answer = self.call(|session| async move {
            let request = session.request(LeaseRevokeRequest { id: lease });
            session.lease().lease_revoke(request).await
        });
        answer.await.map(drop)
    }

    /// Whether the lease still is.
    pub async fn keep_alive(&self, lease: i64) -> Result<bool, Error> {
        let answer = self.call(|session| async move {
            let (send, requests) = mpsc::channel(1);
            send.try_send(LeaseKeepAliveRequest { id: lease }).map_err(|_| Status::internal("a new queue is full"))?;
            let request = session.request(ReceiverStream::new(requests));
            let mut stream = session.lease().lease_keep_alive(request).await?.into_inner();
            let answer = stream.message().await?;
            answer.map(tonic::Response::new).ok_or_else(|| Status::unavailable("the stream ended"))
        });
        Ok(answer.await?.ttl > 0)
    }

    /// Everything below a prefix from a revision on. Ends when its member loses sight of the majority.
    pub async fn watch(&self, prefix: &Prefix, from: i64) -> Result<Watching, Error> {
        let watches = self.watches(1, prefix, from).await?;
        Ok(watches.0)
    }

    /// The first of several watches on one stream; ids are the caller's, from 1 on. Each is confirmed, or refused, by a
    /// message of its own. The stream ends when its member loses sight of the majority.
    pub async fn watches(&self, id: i64, prefix: &Prefix, from: i64) -> Result<Watches, Error> {
        let create = create(id, prefix, from);
        let started = self.call(|session| {
            let first = create.clone();
            async move {
                let (requests, queue) = mpsc::channel(WATCH_REQUESTS);
                requests.try_send(first).map_err(|_| Status::internal("a new queue is full"))?;
                let mut request = session.request(ReceiverStream::new(queue));
                request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
                let responses = session.watch().watch(request).await?.into_inner();
                Ok(tonic::Response::new(Watches(Watching { requests, responses })))
            }
        });
        started.await
    }

    /// The next call goes to another member.
    pub fn leave_member(&self) {
        let left = self.lock_session().take();
        if let Some(session) = left {
            *self.next.lock().unwrap_or_else(PoisonError::into_inner) = session.member + 1;
        }
    }

    async fn call<T, F>(&self, act: impl Fn(Session) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        match self.attempt(&act).await {
            Err(error) if error.is_of_old_login() => self.attempt(&act).await,
            other => other,
        }
    }

    async fn attempt<T, F>(&self, act: &impl Fn(Session) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let session = self.session().await?;
        let answer = match timeout(CALL_DEADLINE, act(session)).await {
            Ok(answer) => answer.map(tonic::Response::into_inner).map_err(Error::Refused),
            Err(_) => Err(Error::Deadline),
        };
        match &answer {
            // Tokens end, and etcd forgets those of its users when it restarts.
            Err(error) if error.is_of_old_login() => self.forget(),
            Err(error) if error.is_gone() || matches!(error, Error::Deadline) => self.leave_member(),
            _ => {}
        }
        answer
    }

    fn forget(&self) {
        self.lock_session().take();
    }

    fn lock_session(&self) -> std::sync::MutexGuard<'_, Option<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn session(&self) -> Result<Session, Error> {
        if let Some(session) = self.lock_session().clone() {
            return Ok(session);
        }
        let endpoints = self.settings.parsed()?;
        let first = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reasons = Vec::new();
        for n in 0..endpoints.len() {
            let member = (first + n) % endpoints.len();
            let address = &endpoints[member].address;
            match timeout(CONNECT_DEADLINE, self.open(member)).await {
                Ok(Ok(session)) => {
                    *self.lock_session() = Some(session.clone());
                    return Ok(session);
                }
                Ok(Err(Error::Settings(error))) => return Err(error.into()),
                Ok(Err(error)) => reasons.push(format!("{address}: {error}")),
                Err(_) => reasons.push(format!("{address}: no answer within {} s", CONNECT_DEADLINE.as_secs())),
            }
        }
        Err(Error::Unreachable(reasons.join("; ")))
    }

    async fn open(&self, member: usize) -> Result<Session, Error> {
        let endpoint = self.settings.parsed()?.swap_remove(member);
        let tls = if endpoint.tls { Some(self.settings.tls()?) } else { None };
        let connected = connect(&endpoint, tls).await;
        let connection = connected.map_err(|error| Error::Unreachable(error.to_string()))?;
        let mut session = Session { connection, token: None, member };
        if let Some((name, password)) = self.settings.credentials()? {
            let request = Request::new(AuthenticateRequest { name, password });
            let answer = session.auth().authenticate(request).await.map_err(Error::Refused)?;
            session.token = MetadataValue::try_from(answer.into_inner().token).ok();
        }
        Ok(session)
    }
}

/// gRPC wants one; etcd looks at the connection.
fn origin() -> Uri {
    Uri::from_static("https://etcd")
}

impl Session {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }

    fn kv(&self) -> KvClient<Connection> {
        let client = KvClient::with_origin(self.connection.clone(), origin());
        client.max_decoding_message_size(LARGEST_ANSWER)
    }

    fn lease(&self) -> LeaseClient<Connection> {
        LeaseClient::with_origin(self.connection.clone(), origin())
    }

    fn watch(&self) -> WatchClient<Connection> {
        let client = WatchClient::with_origin(self.connection.clone(), origin());
        client.max_decoding_message_size(LARGEST_ANSWER)
    }

    fn auth(&self) -> AuthClient<Connection> {
        AuthClient::with_origin(self.connection.clone(), origin())
    }
}
