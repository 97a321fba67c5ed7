//! HTTP/2 in clear, by prior knowledge: the server, and a connection that clients share.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, join};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::client::{self, CHUNK, Failure};
use crate::serve::bytes_asked;

/// What a connection begins with looks like the head of a request.
pub(crate) fn begins(head: &[u8]) -> bool {
    head.starts_with(b"PRI * HTTP/2.0\r\n")
}

/// Serves a connection of which so much has been read.
pub(crate) async fn serve(stream: TcpStream, read: Vec<u8>, name: Rc<str>) -> Result<()> {
    let (rest, write) = stream.into_split();
    let mut connection = h2::server::handshake(join(std::io::Cursor::new(read).chain(rest), write)).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, respond) = accepted?;
        let name = name.clone();
        // A client that went away is not the server's concern.
        spawn_local(async move { answer(request, respond, &name).await });
    }
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, name: &str) -> Result<()> {
    let asked = bytes_asked(request.uri().path());
    read_all(&mut request.into_body()).await?;
    let mut body = respond.send_response(Response::new(()), false)?;
    match asked {
        Some(count) => send_all(&mut body, count).await,
        None => Ok(body.send_data(Bytes::copy_from_slice(name.as_bytes()), true)?),
    }
}

async fn read_all(body: &mut RecvStream) -> Result<usize, h2::Error> {
    let mut length = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        length += data.len();
        body.flow_control().release_capacity(data.len())?;
    }
    Ok(length)
}

async fn send_all(body: &mut SendStream<Bytes>, mut left: usize) -> Result<()> {
    while left > 0 {
        body.reserve_capacity(left.min(CHUNK.len()));
        let granted = std::future::poll_fn(|context| body.poll_capacity(context)).await.transpose()?;
        ensure!(granted.is_some(), "the other side took no more");
        let count = body.capacity().min(left);
        body.send_data(Bytes::from_static(&CHUNK[..count]), false)?;
        left -= count;
    }
    Ok(body.send_data(Bytes::new(), true)?)
}

/// Of a client: one connection for requests at the same time, made when there is none.
pub(crate) struct Shared {
    target: SocketAddr,
    authority: String,
    size: usize,
    limit: Duration,
    open: Mutex<Option<SendRequest<Bytes>>>,
}

impl Shared {
    pub(crate) fn new(target: SocketAddr, authority: &str, size: usize, limit: Duration) -> Rc<Self> {
        Rc::new(Self { target, authority: authority.to_owned(), size, limit, open: Mutex::default() })
    }

    /// A request that carries as much as it asks for.
    pub(crate) async fn exchange(&self) -> Result<(), Failure> {
        let result = timeout(self.limit, self.ask()).await.unwrap_or(Err("timeout"));
        if result.is_err() {
            self.close().await;
        }
        result
    }

    pub(crate) async fn close(&self) {
        *self.open.lock().await = None;
    }

    async fn ask(&self) -> Result<(), Failure> {
        let sender = self.connected().await?.ready().await;
        let uri = format!("http://{}/bytes/{}", self.authority, self.size);
        let request = Request::post(uri).body(()).map_err(|_| "bad_request")?;
        let (response, mut body) = sender.and_then(|mut sender| sender.send_request(request, false)).map_err(why)?;
        send_all(&mut body, self.size).await.map_err(|_| "reset")?;
        let response = response.await.map_err(why)?;
        if response.status() != StatusCode::OK {
            return Err("bad_status");
        }
        let length = read_all(&mut response.into_body()).await.map_err(why)?;
        if length == self.size { Ok(()) } else { Err("bad_answer") }
    }

    async fn connected(&self) -> Result<SendRequest<Bytes>, Failure> {
        let mut open = self.open.lock().await;
        if let Some(sender) = open.as_ref() {
            return Ok(sender.clone());
        }
        let stream = client::connect(self.target, self.limit).await?;
        let (sender, connection) = h2::client::handshake(stream).await.map_err(why)?;
        // Its end shows in the requests.
        spawn_local(connection);
        *open = Some(sender.clone());
        Ok(sender)
    }
}

fn why(error: h2::Error) -> Failure {
    match error.get_io() {
        Some(error) => client::name(error),
        None if error.is_go_away() => "go_away",
        None if error.is_reset() => "stream_reset",
        None => "bad_answer",
    }
}
