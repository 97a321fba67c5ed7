//! Questions to Consul. By TLS they share HTTP/2 connections, also while they block; in clear, which Consul speaks HTTP/1.1
//! only by, each takes a connection for as long as it blocks.

use std::hash::RandomState;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use super::settings::{Address, Settings, SettingsError};
use crate::yaml::printable;

/// TCP and TLS together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Who waits to open a connection while that fails for another fails as well.
const SAME_FAILURE: Duration = Duration::from_secs(1);
/// Of a connection. Consul takes 250 (Go's default), and a question beyond them would wait for others to end.
const MOST_STREAMS: usize = 100;
/// A connection of blocked questions that stands still is noticed within both together, as soon as Consul by probes.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_ANSWER: Duration = Duration::from_secs(5);
/// 10,000 instances of one service have a third of it.
const LARGEST_ANSWER: usize = 64 * 1024 * 1024;
/// Every connection holds one for good; the least that hyper takes.
const BUFFER: usize = 8192;
/// Of words that Consul says.
const MOST_SAID: usize = 300;

#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("Consul at {authority} cannot be reached: {reason}")]
    Unreachable { authority: String, reason: String },
    #[error("Consul at {authority} did not answer within {} s", after.as_secs())]
    Deadline { authority: String, after: Duration },
}

#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Reply {
    /// Where it is no list: an error, mostly.
    pub(super) fn said(&self) -> String {
        printable(String::from_utf8_lossy(&self.body[..self.body.len().min(MOST_SAID)]).trim())
    }

    /// Consul leaves out what a token may not see, and says so here only.
    pub(super) fn is_filtered(&self) -> bool {
        self.headers.get("x-consul-results-filtered-by-acls").is_some_and(|value| value == "true")
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) path: &'a str,
    pub(super) body: Bytes,
}

struct Question<'a> {
    address: Address,
    call: &'a Call<'a>,
    token: Option<&'a HeaderValue>,
    deadline: Duration,
}

pub(super) struct Client {
    settings: Arc<Settings>,
    shared: Arc<Shared>,
    own: Option<http1::SendRequest<Full<Bytes>>>,
}

/// Among clients of the same Consul.
#[derive(Default)]
struct Shared {
    tls: SharedTls,
    multiplexed: Mutex<Vec<Multiplexed>>,
    /// Held by who opens one, so that the others use it; and why that failed, and when.
    opening: tokio::sync::Mutex<Option<(Instant, String)>>,
}

/// An HTTP/2 connection.
#[derive(Clone)]
struct Multiplexed {
    sender: http2::SendRequest<Full<Bytes>>,
    load: Arc<Load>,
}

#[derive(Default)]
struct Load {
    under_way: AtomicUsize,
    /// Questions nobody waits for any more. Consul does until their time is over, and counts them.
    given_up: AtomicUsize,
}

impl Load {
    fn has_room(&self) -> bool {
        self.under_way.load(Relaxed) + self.given_up.load(Relaxed) < MOST_STREAMS
    }

    fn is_worn(&self) -> bool {
        self.given_up.load(Relaxed) >= MOST_STREAMS / 2
    }
}

/// Counts while it is there, and for good if it is dropped without an answer.
struct UnderWay {
    load: Arc<Load>,
    answered: bool,
}

impl UnderWay {
    fn begin(load: &Arc<Load>) -> UnderWay {
        load.under_way.fetch_add(1, Relaxed);
        UnderWay { load: load.clone(), answered: false }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.load.under_way.fetch_sub(1, Relaxed);
        self.load.given_up.fetch_add(usize::from(!self.answered), Relaxed);
    }
}

enum Connection {
    Own(http1::SendRequest<Full<Bytes>>),
    Shared(Multiplexed),
}

impl Shared {
    fn multiplexed(&self) -> MutexGuard<'_, Vec<Multiplexed>> {
        self.multiplexed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with_room(&self) -> Option<Multiplexed> {
        let mut all = self.multiplexed();
        all.retain(|one| !one.sender.is_closed() && !one.load.is_worn());
        all.iter().find(|one| one.load.has_room()).cloned()
    }
}

/// For as long as the files say the same: with the authorities in it, one for each connection is much of its memory.
#[derive(Default)]
struct SharedTls {
    hashing: RandomState,
    last: Mutex<Option<(u64, Arc<ClientConfig>)>>,
}

impl SharedTls {
    fn get(&self, settings: &Settings) -> Result<Arc<ClientConfig>, SettingsError> {
        let files = settings.hash_of_files(&self.hashing);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, config)) = &*last
            && *known == files
        {
            return Ok(config.clone());
        }
        let config = settings.tls()?;
        *last = Some((files, config.clone()));
        Ok(config)
    }
}

impl Client {
    pub(super) fn new(settings: Arc<Settings>) -> Client {
        Client { settings, shared: Arc::default(), own: None }
    }

    /// To the same Consul, for questions at the same time.
    pub(super) fn another(&self) -> Client {
        Client { settings: self.settings.clone(), shared: self.shared.clone(), own: None }
    }

    /// What is shown to Consul now.
    pub(super) fn token(&self) -> Result<Option<HeaderValue>, CallError> {
        Ok(self.settings.token()?)
    }

    pub(super) async fn get(
        &mut self,
        path: &str,
        token: Option<&HeaderValue>,
        deadline: Duration,
    ) -> Result<Reply, CallError> {
        self.call(&Call { method: Method::GET, path, body: Bytes::new() }, token, deadline).await
    }

    /// May be carried out twice.
    pub(super) async fn call(
        &mut self,
        call: &Call<'_>,
        token: Option<&HeaderValue>,
        deadline: Duration,
    ) -> Result<Reply, CallError> {
        let question = Question { address: self.settings.parsed()?, call, token, deadline };
        // Consul may close a connection between two requests, or while one waits; that is no trouble. What is asked again
        // may take its whole time again.
        if let Some(connection) = self.opened()
            && let Ok(reply) = self.ask(connection, &question, Instant::now()).await?
        {
            return Ok(reply);
        }
        let began = Instant::now();
        // In a place of its own: each question under way would hold the room for it.
        let connection = Box::pin(self.connect(&question.address)).await?;
        let reply = self.ask(connection, &question, began).await?;
        reply.map_err(|reason| unreachable(&question.address, &reason))
    }

    /// A connection that does not answer in time, or that is broken, is left to the questions that are under way on it.
    async fn ask(
        &mut self,
        connection: Connection,
        question: &Question<'_>,
        began: Instant,
    ) -> Result<Result<Reply, String>, CallError> {
        let load = match &connection {
            Connection::Shared(one) => Some(one.load.clone()),
            Connection::Own(_) => None,
        };
        let reply = timeout_at(began + question.deadline, self.send(connection, question)).await;
        if !matches!(reply, Ok(Ok(_)))
            && let Some(load) = load
        {
            self.shared.multiplexed().retain(|one| !Arc::ptr_eq(&one.load, &load));
        }
        let late = |_| CallError::Deadline { authority: question.address.authority.clone(), after: question.deadline };
        reply.map_err(late)
    }

    fn opened(&mut self) -> Option<Connection> {
        self.own.take().map(Connection::Own).or_else(|| self.shared.with_room().map(Connection::Shared))
    }

    async fn send(&mut self, connection: Connection, question: &Question<'_>) -> Result<Reply, String> {
        let (authority, path) = (&question.address.authority, question.call.path);
        match connection {
            Connection::Own(mut sender) => {
                let mut request = question.request(path.to_owned())?;
                let host = HeaderValue::try_from(authority).map_err(|error| error.to_string())?;
                request.headers_mut().insert(HOST, host);
                sender.ready().await.map_err(|error| told(&error))?;
                let reply = read(sender.send_request(request).await).await?;
                self.own = Some(sender);
                Ok(reply)
            }
            Connection::Shared(Multiplexed { mut sender, load }) => {
                let request = question.request(format!("https://{authority}{path}"))?;
                let mut under_way = UnderWay::begin(&load);
                let reply = read(sender.send_request(request).await).await;
                under_way.answered = reply.is_ok();
                reply
            }
        }
    }

    /// Of those who need one at the same time, one opens it.
    async fn connect(&self, address: &Address) -> Result<Connection, CallError> {
        let late = |_| unreachable(address, &format!("no connection within {} s", CONNECT_DEADLINE.as_secs()));
        if !address.tls {
            let opened = timeout(CONNECT_DEADLINE, self.open_in_clear(address)).await;
            return opened.map_err(late)?.map(Connection::Own);
        }
        let mut opening = self.shared.opening.lock().await;
        if let Some(one) = self.shared.with_room() {
            return Ok(Connection::Shared(one));
        }
        if let Some((at, reason)) = &*opening
            && at.elapsed() < SAME_FAILURE
        {
            return Err(unreachable(address, reason));
        }
        let opened = timeout(CONNECT_DEADLINE, self.open(address)).await.map_err(late).flatten();
        *opening = match &opened {
            Err(CallError::Unreachable { reason, .. }) => Some((Instant::now(), reason.clone())),
            _ => None,
        };
        opened
    }

    async fn open_in_clear(&self, address: &Address) -> Result<http1::SendRequest<Full<Bytes>>, CallError> {
        let tcp = connect_tcp(address).await?;
        // By its name it is loopback; what that means is said elsewhere.
        if !tcp.peer_addr().is_ok_and(|peer| peer.ip().is_loopback()) {
            return Err(SettingsError::Clear(address.authority.clone()).into());
        }
        handshake(tcp).await.map_err(|error| unreachable(address, &error))
    }

    async fn open(&self, address: &Address) -> Result<Connection, CallError> {
        let config = self.shared.tls.get(&self.settings)?;
        let tcp = connect_tcp(address).await?;
        let name = ServerName::try_from(address.host.clone()).map_err(|error| unreachable(address, &error))?;
        let tls = TlsConnector::from(config).connect(name, tcp).await;
        let tls = tls.map_err(|error| unreachable(address, &format!("TLS: {error}")))?;
        if tls.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Ok(Connection::Own(handshake(tls).await.map_err(|error| unreachable(address, &error))?));
        }
        let opened = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_ANSWER)
            .handshake(TokioIo::new(tls))
            .await;
        let (sender, connection) = opened.map_err(|error| unreachable(address, &told(&error)))?;
        // Ends by itself when the last sender and the last answer are dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to Consul ended");
            }
        });
        let one = Multiplexed { sender, load: Arc::default() };
        self.shared.multiplexed().push(one.clone());
        Ok(Connection::Shared(one))
    }
}

fn unreachable(address: &Address, reason: &dyn std::fmt::Display) -> CallError {
    CallError::Unreachable { authority: address.authority.clone(), reason: reason.to_string() }
}

async fn connect_tcp(address: &Address) -> Result<TcpStream, CallError> {
    let tcp = TcpStream::connect(&address.authority).await.map_err(|error| unreachable(address, &error))?;
    tcp.set_nodelay(true).map_err(|error| unreachable(address, &error))?;
    Ok(tcp)
}

async fn handshake(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<http1::SendRequest<Full<Bytes>>, hyper::Error> {
    let (sender, connection) = http1::Builder::new().max_buf_size(BUFFER).handshake(TokioIo::new(io)).await?;
    // Ends by itself when the sender is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to Consul ended");
        }
    });
    Ok(sender)
}

impl Question<'_> {
    fn request(&self, uri: String) -> Result<Request<Full<Bytes>>, String> {
        let mut request = Request::builder().method(&self.call.method).uri(uri);
        if let Some(token) = self.token {
            request = request.header("x-consul-token", token);
        }
        request.body(Full::new(self.call.body.clone())).map_err(|error| error.to_string())
    }
}

async fn read(response: Result<Response<Incoming>, hyper::Error>) -> Result<Reply, String> {
    let (parts, body) = response.map_err(|error| told(&error))?.into_parts();
    let body = Limited::new(body, LARGEST_ANSWER).collect().await.map_err(|error| error.to_string())?;
    Ok(Reply { status: parts.status, headers: parts.headers, body: body.to_bytes() })
}

/// hyper says the rest in its cause: that of a refused client certificate, for instance.
fn told(error: &hyper::Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(" ({cause})"));
    let cause = cause.unwrap_or_default();
    // It spoke before it was asked.
    let hint = if error.is_canceled() {
        "; it does that beyond limits.http_max_conns_per_client of its agent (200 by default): raise it, or import fewer \
         services"
    } else {
        ""
    };
    format!("{error}{cause}{hint}")
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// A server that says so to each connection: after a request, or at once.
    async fn serve(says: Vec<&'static str>, waits: bool) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = Some(format!("http://{}", listener.local_addr().unwrap()));
        tokio::spawn(async move {
            for text in says {
                let (mut connection, _) = listener.accept().await.unwrap();
                if waits {
                    let mut request = [0; 1024];
                    assert!(connection.read(&mut request).await.unwrap() > 0);
                }
                connection.write_all(text.as_bytes()).await.unwrap();
                connection.shutdown().await.unwrap();
                // What was asked is read, so that the client is not told of a reset before it has read the answer.
                tokio::io::copy(&mut connection, &mut tokio::io::sink()).await.unwrap();
            }
            std::future::pending::<()>().await;
        });
        Client::new(Arc::new(Settings { address, ..Settings::default() }))
    }

    #[tokio::test]
    async fn a_connection_closed_between_two_requests_is_opened_again() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let mut client = serve(vec![ok, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nagain"], true).await;
        assert_eq!(client.get("/a", None, DEADLINE).await.unwrap().body, "ok");
        assert_eq!(client.get("/b", None, DEADLINE).await.unwrap().body, "again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_whose_connection_is_cut_while_it_waits_has_its_whole_time_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = Some(format!("http://{}", listener.local_addr().unwrap()));
        let ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let server = async move {
            let mut request = [0; 1024];
            let (mut first, _) = listener.accept().await.unwrap();
            assert!(first.read(&mut request).await.unwrap() > 0);
            first.write_all(ok).await.unwrap();
            assert!(first.read(&mut request).await.unwrap() > 0);
            tokio::time::advance(Duration::from_secs(8)).await;
            drop(first);
            let (mut second, _) = listener.accept().await.unwrap();
            assert!(second.read(&mut request).await.unwrap() > 0);
            tokio::time::advance(Duration::from_secs(8)).await;
            second.write_all(ok).await.unwrap();
        };
        let mut client = Client::new(Arc::new(Settings { address, ..Settings::default() }));
        let asks = async {
            client.get("/a", None, DEADLINE).await.unwrap();
            client.get("/b", None, DEADLINE).await.unwrap();
        };
        tokio::join!(server, asks);
    }

    #[test]
    fn questions_that_were_given_up_wear_a_connection_and_answered_ones_do_not() {
        let load = Arc::<Load>::default();
        for _ in 0..MOST_STREAMS {
            UnderWay::begin(&load).answered = true;
        }
        assert!(load.has_room() && !load.is_worn());
        let waiting: Vec<UnderWay> = (0..MOST_STREAMS).map(|_| UnderWay::begin(&load)).collect();
        assert!(!load.has_room() && !load.is_worn());
        drop(waiting);
        assert!(!load.has_room() && load.is_worn());
    }

    #[test]
    fn connections_share_what_the_files_say_until_they_say_something_else() {
        let directory = tempfile::tempdir().unwrap();
        let ca = directory.path().join("ca.pem");
        let authority = || rcgen::generate_simple_self_signed(vec!["consul".to_owned()]).unwrap().cert.pem();
        std::fs::write(&ca, authority()).unwrap();
        let client = Client::new(Arc::new(Settings { ca: Some(ca.clone()), ..Settings::default() }));
        let other = client.another();
        let first = client.shared.tls.get(&client.settings).unwrap();
        let now = || other.shared.tls.get(&other.settings);
        assert!(Arc::ptr_eq(&first, &now().unwrap()));
        std::fs::write(&ca, authority()).unwrap();
        assert!(!Arc::ptr_eq(&first, &now().unwrap()));
        std::fs::remove_file(&ca).unwrap();
        assert!(now().unwrap_err().to_string().starts_with("ca: "));
    }

    #[tokio::test]
    async fn an_answer_given_before_the_question_is_understood_or_explained() {
        let refusal = "HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\nConnection: close\r\n\r\nslow";
        let mut client = serve(vec![refusal], false).await;
        let answer = client.get("/a", None, DEADLINE).await;
        match answer {
            Ok(reply) => assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS),
            Err(error) => assert!(error.to_string().contains("http_max_conns_per_client"), "{error}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_answer_in_time_is_named_and_so_is_who_cannot_be_reached() {
        let mut client = serve(vec![], true).await;
        let error = client.get("/a", None, DEADLINE).await.unwrap_err().to_string();
        assert!(error.contains("did not answer within 10 s"), "{error}");
        let address = Some("http://127.0.0.1:1".to_owned());
        let mut client = Client::new(Arc::new(Settings { address, ..Settings::default() }));
        let error = client.get("/a", None, DEADLINE).await.unwrap_err().to_string();
        assert!(error.starts_with("Consul at 127.0.0.1:1 cannot be reached: "), "{error}");
    }
}
