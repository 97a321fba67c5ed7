//! One HTTP/2 connection between two hosts, client or server side: settings, driver, keep-alive.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::{Ping, PingPong, RecvStream, client, server};
use http::Request;
use tokio::time::{Interval, MissedTickBehavior};

use super::secure_io::SecureIo;
use super::wire::{
    CONNECTION_WINDOW, DEAD_AFTER, MAX_FRAME, MAX_HEADERS, PING_AFTER, SEND_BUFFER, STREAM_WINDOW, STREAMS,
};

/// How often silence is looked at.
const KEEPALIVE_TICK: Duration = Duration::from_secs(5);

/// Why a connection ended, beyond what HTTP/2 says.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    #[error(transparent)]
    Http2(#[from] h2::Error),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the peer has been silent for {0:?} with streams open")]
    Silent(Duration),
}

pub async fn client(io: SecureIo) -> Result<(client::SendRequest<Bytes>, ClientDriver), MeshError> {
    let (send, mut connection) = client::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .initial_max_send_streams(STREAMS as usize)
        .enable_push(false)
        .handshake(io.clone())
        .await?;
    let keepalive = KeepAlive::new(&io, connection.ping_pong());
    Ok((send, ClientDriver { connection, io, keepalive }))
}

/// Moves a client connection along; runs as a task of its own until the connection ends.
pub struct ClientDriver {
    connection: client::Connection<SecureIo, Bytes>,
    io: SecureIo,
    keepalive: KeepAlive,
}

impl ClientDriver {
    /// Returns once the peer has answered a PING: only then is it proven that it accepted our certificate.
    pub async fn proven(&mut self) -> Result<(), MeshError> {
        self.keepalive.ask();
        poll_fn(|cx| match self.poll(cx, true) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) => Poll::Ready(Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into())),
            Poll::Pending if !self.keepalive.waiting => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    pub async fn run(mut self, busy: impl Fn() -> bool) -> Result<(), MeshError> {
        poll_fn(|cx| self.poll(cx, busy())).await?;
        self.io.linger().await;
        Ok(())
    }

    fn poll(&mut self, cx: &mut Context<'_>, busy: bool) -> Poll<Result<(), MeshError>> {
        if let Err(silent) = self.keepalive.poll(cx, busy) {
            return Poll::Ready(Err(silent));
        }
        let polled = Pin::new(&mut self.connection).poll(cx);
        if let Poll::Ready(Err(error)) = self.io.poll_send(cx) {
            return Poll::Ready(Err(error.into()));
        }
        // The turn's answers are in: a pong may be among them.
        self.keepalive.poll_pong(cx);
        polled.map_err(Into::into)
    }
}

/// The server side of a connection.
pub struct Server {
    connection: server::Connection<SecureIo, Bytes>,
    io: SecureIo,
    keepalive: KeepAlive,
}

pub async fn server(io: SecureIo) -> Result<Server, MeshError> {
    let mut connection = server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake(io.clone())
        .await?;
    let keepalive = KeepAlive::new(&io, connection.ping_pong());
    Ok(Server { connection, io, keepalive })
}

/// A stream a peer opened.
pub type Incoming = (Request<RecvStream>, server::SendResponse<Bytes>);

impl Server {
    /// The next stream; None when the connection is over. Must be awaited for anything to move.
    pub async fn accept(&mut self) -> Option<Result<Incoming, MeshError>> {
        poll_fn(|cx| {
            if let Err(silent) = self.keepalive.poll(cx, self.connection.has_streams()) {
                return Poll::Ready(Some(Err(silent)));
            }
            let accepted = self.connection.poll_accept(cx);
            // More streams of this turn are collected first; they share one record.
            if let Poll::Ready(Some(Ok(incoming))) = accepted {
                return Poll::Ready(Some(Ok(incoming)));
            }
            if let Poll::Ready(Err(error)) = self.io.poll_send(cx) {
                return Poll::Ready(Some(Err(error.into())));
            }
            self.keepalive.poll_pong(cx);
            accepted.map(|ended| ended.map(|result| result.map_err(Into::into)))
        })
        .await
    }

    /// After `accept` has said that it is over: lets the peer read all of it.
    pub async fn close(self) {
        let Server { connection, io, .. } = self;
        drop(connection);
        io.linger().await;
    }

    /// GOAWAY: streams under way and in flight are served, no new ones.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}

/// Asks a silent peer of a busy connection whether it is there, and gives it up when it is not.
struct KeepAlive {
    heard: Rc<Cell<Instant>>,
    pings: Option<PingPong>,
    waiting: bool,
    tick: Interval,
}

impl KeepAlive {
    fn new(io: &SecureIo, pings: Option<PingPong>) -> KeepAlive {
        let mut tick = tokio::time::interval(KEEPALIVE_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        KeepAlive { heard: io.heard(), pings, waiting: false, tick }
    }

    fn ask(&mut self) {
        if let Some(pings) = &mut self.pings {
            // An error means the connection is over, which its driver sees.
            self.waiting = pings.send_ping(Ping::opaque()).is_ok();
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, busy: bool) -> Result<(), MeshError> {
        while self.tick.poll_tick(cx).is_ready() {
            let silence = self.heard.get().elapsed();
            if busy && silence >= DEAD_AFTER {
                return Err(MeshError::Silent(silence));
            }
            if busy && silence >= PING_AFTER && !self.waiting {
                self.ask();
            }
        }
        Ok(())
    }

    fn poll_pong(&mut self, cx: &mut Context<'_>) {
        if self.waiting
            && let Some(pings) = &mut self.pings
            && pings.poll_pong(cx).is_ready()
        {
            self.waiting = false;
        }
    }
}
