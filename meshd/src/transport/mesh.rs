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
    CONNECTION_WINDOW, DEAD_AFTER, IDLE_PING_AFTER, MAX_FRAME, MAX_HEADERS, PING_AFTER, SEND_BUFFER, STREAM_WINDOW,
    STREAMS,
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
    #[error("the peer let go of the connection before anything was asked on it")]
    Leaving,
    #[error("the peer does not answer, and has been silent for {0:?}")]
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
            Poll::Ready(Ok(())) => Poll::Ready(Err(MeshError::Leaving)),
            Poll::Pending if self.keepalive.asked.is_none() => Poll::Ready(Ok(())),
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

/// Asks a silent peer whether it is there, and gives it up when it does not answer. Idle connections are
/// asked rarely, busy ones soon; nobody is given up without having been asked.
struct KeepAlive {
    heard: Rc<Cell<Instant>>,
    pings: Option<PingPong>,
    asked: Option<Instant>,
    tick: Interval,
}

impl KeepAlive {
    fn new(io: &SecureIo, pings: Option<PingPong>) -> KeepAlive {
        let mut tick = tokio::time::interval(KEEPALIVE_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        KeepAlive { heard: io.heard(), pings, asked: None, tick }
    }

    fn ask(&mut self) {
        if let Some(pings) = &mut self.pings {
            // An error means the connection is over, which its driver sees.
            self.asked = pings.send_ping(Ping::opaque()).is_ok().then(Instant::now);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, busy: bool) -> Result<(), MeshError> {
        while self.tick.poll_tick(cx).is_ready() {
            match verdict(self.heard.get(), self.asked, busy, Instant::now()) {
                Verdict::Fine => {}
                Verdict::Ask => self.ask(),
                Verdict::Dead(silence) => return Err(MeshError::Silent(silence)),
            }
        }
        Ok(())
    }

    fn poll_pong(&mut self, cx: &mut Context<'_>) {
        if self.asked.is_some()
            && let Some(pings) = &mut self.pings
            && pings.poll_pong(cx).is_ready()
        {
            self.asked = None;
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Fine,
    Ask,
    Dead(Duration),
}

fn verdict(heard: Instant, asked: Option<Instant>, busy: bool, now: Instant) -> Verdict {
    let silence = now.saturating_duration_since(heard);
    let patience = if busy { PING_AFTER } else { IDLE_PING_AFTER };
    match asked {
        // Whatever was heard after the question is an answer, too.
        Some(asked) if now.saturating_duration_since(asked.max(heard)) >= DEAD_AFTER - PING_AFTER => {
            Verdict::Dead(silence)
        }
        None if silence >= patience => Verdict::Ask,
        _ => Verdict::Fine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_given_up_without_having_been_asked() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(verdict(start, None, true, after(9)), Verdict::Fine);
        assert_eq!(verdict(start, None, true, after(3600)), Verdict::Ask);
        assert_eq!(verdict(start, Some(after(10)), true, after(29)), Verdict::Fine);
        assert_eq!(verdict(start, Some(after(10)), true, after(30)), Verdict::Dead(Duration::from_secs(30)));
        assert_eq!(verdict(after(20), Some(after(10)), true, after(30)), Verdict::Fine);
    }

    #[test]
    fn an_idle_peer_is_asked_rarely_and_given_up_all_the_same() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(verdict(start, None, false, after(59)), Verdict::Fine);
        assert_eq!(verdict(start, None, false, after(60)), Verdict::Ask);
        assert_eq!(verdict(start, Some(after(60)), false, after(80)), Verdict::Dead(Duration::from_secs(80)));
    }
}
