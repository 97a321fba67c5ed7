//! HTTP/2 to the API server, many requests at once on few connections.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::error::{CALL_DEADLINE, Error};
use super::objects;
use super::settings::{Access, Settings};

const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Between two pieces of an answer.
const STALL_DEADLINE: Duration = Duration::from_secs(10);
/// A connection of watches that stands still is noticed within both together, as soon as a server by probes.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_ANSWER: Duration = Duration::from_secs(4);
/// An API server takes 250 streams per connection unless told otherwise (--http2-max-streams-per-connection, Go's
/// default), and a request beyond them would wait for a watch to end.
const MOST_STREAMS: usize = 100;
/// etcd takes 1.5 MiB per object (--max-request-bytes), which is JSON of several.
const LONGEST_LINE: usize = 16 * 1024 * 1024;
/// A page of a list has 500 objects at most, unless the server answers from its cache.
const LARGEST_ANSWER: usize = 256 * 1024 * 1024;
const LARGEST_REFUSAL: usize = 64 * 1024;
/// What a watch may send unread, and all of a connection together: one that is not read takes nothing from the others,
/// nor from the probe between them.
const WATCH_WINDOW: u32 = 256 * 1024;
const WATCHES_WINDOW: u32 = (MOST_STREAMS as u32 + 4) * WATCH_WINDOW;

/// Its clones share connections.
#[derive(Clone)]
pub(super) struct Client {
    settings: Settings,
    opened: Arc<Mutex<Opened>>,
}

type Sender = SendRequest<Full<Bytes>>;

#[derive(Default)]
struct Opened {
    /// Of the present connections.
    access: Option<Access>,
    /// Of what is not a watch: a long list takes nothing from watches, nor they from it.
    calls: Option<Sender>,
    watches: Vec<Connection>,
}

struct Connection {
    sender: Sender,
    /// Held by every answer that is being read.
    streams: Arc<()>,
}

/// An answer that is read line by line.
pub(super) struct Lines {
    body: Incoming,
    /// For messages.
    label: String,
    buffer: BytesMut,
    /// So much of it has no end of a line.
    searched: usize,
    _stream: Arc<()>,
}

/// What is asked, for messages.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) verb: &'static str,
    pub(super) resource: String,
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.verb, self.resource)
    }
}

/// A request: its path without the server, and of which media type its body is, if it has one.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) path: &'a str,
    pub(super) content: &'static str,
    pub(super) body: Bytes,
}

impl<'a> Call<'a> {
    pub(super) fn get(path: &'a str) -> Call<'a> {
        Call { method: Method::GET, path, content: "", body: Bytes::new() }
    }
}

/// A connection for calls, also for many at once.
pub(super) struct Caller {
    sender: Sender,
    access: Access,
}

impl Caller {
    /// `https://10.0.0.1:6443`
    pub(super) fn server(&self) -> &str {
        &self.access.server
    }

    pub(super) async fn get(&self, path: &str, asked: &Asked) -> Result<Bytes, Error> {
        self.call(Call::get(path), asked).await
    }

    pub(super) async fn call(&self, call: Call<'_>, asked: &Asked) -> Result<Bytes, Error> {
        let response = request(self.sender.clone(), &self.access, call, asked).await?;
        let label = label(&self.access, asked);
        read_all(response.into_body(), LARGEST_ANSWER, &label).await
    }
}

impl Client {
    pub(super) fn new(settings: Settings) -> Client {
        Client { settings, opened: Arc::default() }
    }

    /// The next request goes by a new connection, with what the files say then.
    pub(super) fn leave(&mut self) {
        self.opened = Arc::default();
    }

    pub(super) async fn caller(&self) -> Result<Caller, Error> {
        let mut opened = self.opened.lock().await;
        let access = opened.access(&self.settings)?;
        let sender = match opened.calls.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => open(&access, &http2::Builder::new(TokioExecutor::new())).await?,
        };
        opened.calls = Some(sender.clone());
        Ok(Caller { sender, access })
    }

    /// By every connection that carries watches: each may lead to another server. That of calls if there is none.
    pub(super) async fn callers(&self) -> Result<Vec<Caller>, Error> {
        let carrying: Vec<Caller> = {
            let mut opened = self.opened.lock().await;
            let access = opened.access(&self.settings)?;
            let carrying = opened.watches.iter().filter(|connection| Arc::strong_count(&connection.streams) > 1);
            carrying.map(|it| Caller { sender: it.sender.clone(), access: access.clone() }).collect()
        };
        if carrying.is_empty() { Ok(vec![self.caller().await?]) } else { Ok(carrying) }
    }

    pub(super) async fn get(&self, path: &str, asked: &Asked) -> Result<Bytes, Error> {
        self.call(Call::get(path), asked).await
    }

    pub(super) async fn call(&self, call: Call<'_>, asked: &Asked) -> Result<Bytes, Error> {
        let answer = self.caller().await?.call(call, asked).await;
        // A refusal is an answer as well.
        if matches!(answer, Err(Error::Broken(_) | Error::Deadline(_))) {
            self.opened.lock().await.calls = None;
        }
        answer
    }

    pub(super) async fn lines(&self, path: &str, asked: &Asked) -> Result<Lines, Error> {
        let (sender, access, stream) = {
            let mut opened = self.opened.lock().await;
            let access = opened.access(&self.settings)?;
            let (sender, stream) = opened.for_a_watch(&access).await?;
            (sender, access, stream)
        };
        let response = request(sender, &access, Call::get(path), asked).await?;
        let label = label(&access, asked);
        Ok(Lines { body: response.into_body(), label, buffer: BytesMut::new(), searched: 0, _stream: stream })
    }
}

impl Opened {
    fn access(&mut self, settings: &Settings) -> Result<Access, Error> {
        match &self.access {
            Some(access) => Ok(access.clone()),
            None => Ok(self.access.insert(settings.access()?).clone()),
        }
    }

    async fn for_a_watch(&mut self, access: &Access) -> Result<(Sender, Arc<()>), Error> {
        self.watches.retain(|connection| !connection.sender.is_closed());
        let free = |connection: &&Connection| Arc::strong_count(&connection.streams) <= MOST_STREAMS;
        if let Some(connection) = self.watches.iter().find(free) {
            return Ok((connection.sender.clone(), connection.streams.clone()));
        }
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.initial_stream_window_size(WATCH_WINDOW).initial_connection_window_size(WATCHES_WINDOW);
        let connection = Connection { sender: open(access, &builder).await?, streams: Arc::new(()) };
        let opened = (connection.sender.clone(), connection.streams.clone());
        self.watches.push(connection);
        Ok(opened)
    }
}

fn label(access: &Access, asked: &Asked) -> String {
    format!("{}, {asked}", access.server)
}

async fn request(
    mut sender: Sender,
    access: &Access,
    call: Call<'_>,
    asked: &Asked,
) -> Result<Response<Incoming>, Error> {
    let mut request = Request::builder()
        .method(call.method)
        .uri(format!("{}{}{}", access.server, access.base, call.path))
        .header(ACCEPT, "application/json")
        .header(USER_AGENT, concat!("meshd/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(call.body))
        .map_err(|error| Error::Broken(error.to_string()))?;
    if !call.content.is_empty() {
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(call.content));
    }
    if let Some(token) = &access.token {
        let bearer = HeaderValue::try_from(format!("Bearer {}", token.read()?));
        let unfit = |_| Error::Unauthorized { by: access.credential(), reason: "it is no token".to_owned() };
        let mut bearer = bearer.map_err(unfit)?;
        bearer.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, bearer);
    }
    let late =
        |_| Error::Deadline(format!("{} did not answer within {} s: {asked}", access.server, CALL_DEADLINE.as_secs()));
    let answer = timeout(CALL_DEADLINE, sender.send_request(request)).await.map_err(late)?;
    let response = answer.map_err(|error| Error::Broken(format!("{}: {}", label(access, asked), said(&error))))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let (status, after) = (response.status(), retry_after(response.headers()));
    let refusal = read_all(response.into_body(), LARGEST_REFUSAL, &label(access, asked)).await?;
    let (asked, reason) = (asked.clone(), objects::read_refusal(&refusal));
    Err(match status {
        StatusCode::UNAUTHORIZED => Error::Unauthorized { by: access.credential(), reason },
        StatusCode::FORBIDDEN => Error::Forbidden { verb: asked.verb, resource: asked.resource, reason },
        StatusCode::GONE => Error::Expired,
        StatusCode::TOO_MANY_REQUESTS => Error::Busy { asked: asked.to_string(), reason, after },
        status => Error::Refused { status: status.as_u16(), asked: asked.to_string(), reason },
    })
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    Some(Duration::from_secs(headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?))
}

async fn open(access: &Access, builder: &http2::Builder<TokioExecutor>) -> Result<Sender, Error> {
    let reason = || format!("no connection within {} s", CONNECT_DEADLINE.as_secs());
    let late = |_| Err(Error::Unreachable { server: access.server.clone(), reason: reason() });
    timeout(CONNECT_DEADLINE, connect(access, builder.clone())).await.unwrap_or_else(late)
}

async fn connect(access: &Access, mut builder: http2::Builder<TokioExecutor>) -> Result<Sender, Error> {
    let server = || access.server.clone();
    let unreachable = |reason: String| Error::Unreachable { server: server(), reason };
    let tcp = TcpStream::connect(&access.address).await.map_err(|error| unreachable(error.to_string()))?;
    tcp.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
    let name = ServerName::try_from(access.name.clone())
        .map_err(|_| unreachable(format!("`{}` is no name or address of a server", access.name)))?;
    let tls = TlsConnector::from(access.tls.clone()).connect(name, tcp).await;
    let tls = tls.map_err(|error| Error::Tls { server: server(), reason: error.to_string() })?;
    if tls.get_ref().1.alpn_protocol() != Some(b"h2") {
        let reason = "it does not speak HTTP/2; name the API server itself, or a proxy that does".to_owned();
        return Err(unreachable(reason));
    }
    let (sender, connection) = builder
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_ANSWER)
        .handshake(TokioIo::new(tls))
        .await
        .map_err(|error| unreachable(said(&error)))?;
    // Ends by itself when the last sender and the last answer are dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to the API server ended");
        }
    });
    Ok(sender)
}

/// With what hyper keeps for the source.
fn said(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

async fn piece(body: &mut Incoming, label: &str) -> Result<Option<Bytes>, Error> {
    loop {
        match body.frame().await {
            None => return Ok(None),
            Some(Err(error)) => return Err(Error::Broken(format!("{label}: {}", said(&error)))),
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

async fn read_all(mut body: Incoming, most: usize, label: &str) -> Result<Bytes, Error> {
    let expected = body.size_hint().exact().unwrap_or(0);
    let mut all = BytesMut::with_capacity(usize::try_from(expected).unwrap_or(0).min(LARGEST_REFUSAL));
    let stalled = |_| Error::Deadline(format!("stopped in an answer for {} s: {label}", STALL_DEADLINE.as_secs()));
    while let Some(data) = timeout(STALL_DEADLINE, piece(&mut body, label)).await.map_err(stalled)?? {
        if all.len() + data.len() > most {
            return Err(Error::Garbled(format!("{label}: it has more than {most} bytes")));
        }
        all.extend_from_slice(&data);
    }
    Ok(all.freeze())
}

impl Lines {
    /// The next line, without its end; `None` where the answer ends. Nothing is lost when the wait is given up.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let mut line = self.buffer.split_to(self.searched + end + 1);
                line.truncate(line.len() - 1);
                self.searched = 0;
                return Ok(Some(line.freeze()));
            }
            self.searched = self.buffer.len();
            if self.searched > LONGEST_LINE {
                return Err(Error::Garbled(format!("{}: a line has more than {LONGEST_LINE} bytes", self.label)));
            }
            let Some(data) = piece(&mut self.body, &self.label).await? else { return Ok(None) };
            self.buffer.extend_from_slice(&data);
        }
    }
}
