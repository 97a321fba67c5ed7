//! One HTTP/1.1 connection to Consul: a request at a time, as a blocking query occupies it.

use std::hash::RandomState;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::settings::{Address, Settings, SettingsError};
use crate::yaml::printable;

/// TCP and TLS together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
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

pub(super) struct Client {
    settings: Arc<Settings>,
    tls: Arc<SharedTls>,
    connection: Option<SendRequest<Full<Bytes>>>,
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
        Client { settings, tls: Arc::default(), connection: None }
    }

    /// To the same Consul over a connection of its own.
    pub(super) fn another(&self) -> Client {
        Client { settings: self.settings.clone(), tls: self.tls.clone(), connection: None }
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
        let address = self.settings.parsed()?;
        let late = |_| CallError::Deadline { authority: address.authority.clone(), after: deadline };
        // Consul may close a connection between two requests, or while one waits; that is no trouble. What is asked again
        // may take its whole time again.
        if let Some(mut connection) = self.connection.take()
            && let Ok(reply) = timeout(deadline, send(&mut connection, &address, call, token)).await.map_err(late)?
        {
            self.connection = Some(connection);
            return Ok(reply);
        }
        timeout(deadline, self.exchange(&address, call, token)).await.map_err(late)?
    }

    async fn exchange(
        &mut self,
        address: &Address,
        call: &Call<'_>,
        token: Option<&HeaderValue>,
    ) -> Result<Reply, CallError> {
        let unreachable = |reason: String| CallError::Unreachable { authority: address.authority.clone(), reason };
        let opened = timeout(CONNECT_DEADLINE, self.open(address)).await;
        let late = |_| unreachable(format!("no connection within {} s", CONNECT_DEADLINE.as_secs()));
        let mut connection = opened.map_err(late)??;
        let reply = send(&mut connection, address, call, token).await.map_err(unreachable)?;
        self.connection = Some(connection);
        Ok(reply)
    }

    async fn open(&self, address: &Address) -> Result<SendRequest<Full<Bytes>>, CallError> {
        let unreachable = |reason: &dyn std::fmt::Display| CallError::Unreachable {
            authority: address.authority.clone(),
            reason: reason.to_string(),
        };
        let tls = if address.tls { Some(self.tls.get(&self.settings)?) } else { None };
        let tcp = TcpStream::connect(&address.authority).await.map_err(|error| unreachable(&error))?;
        // By its name it is loopback; what that means is said elsewhere.
        if !address.tls && !tcp.peer_addr().is_ok_and(|peer| peer.ip().is_loopback()) {
            return Err(SettingsError::Clear(address.authority.clone()).into());
        }
        tcp.set_nodelay(true).map_err(|error| unreachable(&error))?;
        let connection = match tls {
            None => handshake(tcp).await,
            Some(config) => {
                let name = ServerName::try_from(address.host.clone()).map_err(|error| unreachable(&error))?;
                let tls = TlsConnector::from(config).connect(name, tcp).await;
                handshake(tls.map_err(|error| unreachable(&format!("TLS: {error}")))?).await
            }
        };
        connection.map_err(|error| unreachable(&error))
    }
}

async fn handshake(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<SendRequest<Full<Bytes>>, hyper::Error> {
    let (sender, connection) = http1::Builder::new().max_buf_size(BUFFER).handshake(TokioIo::new(io)).await?;
    // Ends by itself when the sender is dropped.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to Consul ended");
        }
    });
    Ok(sender)
}

async fn send(
    connection: &mut SendRequest<Full<Bytes>>,
    address: &Address,
    call: &Call<'_>,
    token: Option<&HeaderValue>,
) -> Result<Reply, String> {
    let mut request = Request::builder().method(&call.method).uri(call.path).header(HOST, &address.authority);
    if let Some(token) = token {
        request = request.header("x-consul-token", token);
    }
    let request = request.body(Full::new(call.body.clone())).map_err(|error| error.to_string())?;
    connection.ready().await.map_err(|error| told(&error))?;
    let response = connection.send_request(request).await.map_err(|error| told(&error))?;
    let (parts, body) = response.into_parts();
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
    fn connections_share_what_the_files_say_until_they_say_something_else() {
        let directory = tempfile::tempdir().unwrap();
        let ca = directory.path().join("ca.pem");
        let authority = || rcgen::generate_simple_self_signed(vec!["consul".to_owned()]).unwrap().cert.pem();
        std::fs::write(&ca, authority()).unwrap();
        let client = Client::new(Arc::new(Settings { ca: Some(ca.clone()), ..Settings::default() }));
        let other = client.another();
        let first = client.tls.get(&client.settings).unwrap();
        assert!(Arc::ptr_eq(&first, &other.tls.get(&other.settings).unwrap()));
        std::fs::write(&ca, authority()).unwrap();
        assert!(!Arc::ptr_eq(&first, &other.tls.get(&other.settings).unwrap()));
        std::fs::remove_file(&ca).unwrap();
        assert!(other.tls.get(&other.settings).unwrap_err().to_string().starts_with("ca: "));
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
