//! SERVE: copies bytes both ways between a local application and a stream of the mesh, keeping half-closes.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::Poll;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use socket2::SockRef;
use tokio::io::{AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::held::{self, Budget};
use crate::fault::Fault;
use crate::transport::chunk::{CHUNK, poll_chunk};

/// Told of every byte as it passes, and how much may pile up.
pub(super) struct Watch<'a, F: Fn(usize), G: Fn(usize)> {
    pub from_app: F,
    pub to_app: G,
    pub budget: &'a Budget,
}

/// Application <-> mesh stream, until both sides have ended or either broke.
pub(super) async fn opaque<F: Fn(usize), G: Fn(usize)>(
    app: &mut TcpStream,
    send: &mut SendStream<Bytes>,
    receive: &mut RecvStream,
    already_read: Vec<Bytes>,
    watch: &Watch<'_, F, G>,
) -> Result<(), Fault> {
    let outcome = async {
        for chunk in already_read {
            // At most the early data limit, which HTTP/2 queues whatever the window.
            send.send_data(chunk, false).map_err(|_| Fault::PeerReset)?;
        }
        let (read, write) = app.split();
        let upload_over = Cell::new(false);
        let upload = async {
            let outcome = from_app(read, send, &watch.from_app).await;
            upload_over.set(true);
            outcome
        };
        let download = to_app(write, receive, watch, &upload_over);
        tokio::try_join!(upload, download).map(|_| ())
    }
    .await;
    if outcome.is_err() {
        // The far application must see a broken connection, not a clean end.
        send.send_reset(h2::Reason::CANCEL);
        abort(app);
    }
    outcome
}

async fn from_app(mut app: ReadHalf<'_>, send: &mut SendStream<Bytes>, count: &impl Fn(usize)) -> Result<(), Fault> {
    loop {
        send.reserve_capacity(CHUNK);
        let room = match send.capacity() {
            0 => Box::pin(capacity(&app, send)).await?,
            room => room,
        };
        let chunk = poll_fn(|cx| match poll_chunk(&mut app, cx, room) {
            Poll::Ready(chunk) => Poll::Ready(chunk.map_err(|_| Fault::AppReset)),
            // A peer that has ended its own side can still break the stream, and nobody else would notice.
            Poll::Pending => send.poll_reset(cx).map(|_| Err(Fault::PeerReset)),
        })
        .await?;
        let end = chunk.is_empty();
        count(chunk.len());
        send.send_data(chunk, end).map_err(|_| Fault::PeerReset)?;
        if end {
            return Ok(());
        }
    }
}

/// Waits until the peer lets us send, so that a slow far side slows the local application instead of
/// filling our memory. Nothing is read meanwhile; an application that is gone is noticed all the same.
async fn capacity(app: &ReadHalf<'_>, send: &mut SendStream<Bytes>) -> Result<usize, Fault> {
    loop {
        tokio::select! {
            biased;
            room = poll_fn(|cx| send.poll_capacity(cx)) => match room {
                Some(Ok(0)) => {}
                Some(Ok(room)) => return Ok(room),
                Some(Err(_)) | None => return Err(Fault::PeerReset),
            },
            _ = app.ready(Interest::ERROR) => return Err(Fault::AppReset),
        }
    }
}

async fn to_app<F: Fn(usize), G: Fn(usize)>(
    mut app: WriteHalf<'_>,
    receive: &mut RecvStream,
    watch: &Watch<'_, F, G>,
    upload_over: &Cell<bool>,
) -> Result<(), Fault> {
    while let Some(data) = receive.data().await {
        let data = data.map_err(|_| Fault::PeerReset)?;
        write(&mut app, &data, receive, watch.budget).await?;
        (watch.to_app)(data.len());
        // Only now may the peer send as much again: what an application does not take stays with its sender.
        receive.flow_control().release_capacity(data.len()).map_err(|_| Fault::PeerReset)?;
    }
    if upload_over.get() {
        // Both sides have ended: closing says so, without a system call of its own.
        return Ok(());
    }
    app.shutdown().await.map_err(|_| Fault::AppReset)
}

/// Writes all of `data`, at once if the application takes it.
async fn write(app: &mut WriteHalf<'_>, data: &[u8], receive: &mut RecvStream, budget: &Budget) -> Result<(), Fault> {
    let written = poll_fn(|cx| match Pin::new(&mut *app).poll_write(cx, data) {
        Poll::Pending => Poll::Ready(Ok(0)),
        done => done,
    });
    match written.await.map_err(|_| Fault::AppReset)? {
        all if all == data.len() => Ok(()),
        some => Box::pin(write_patiently(app, &data[some..], receive, budget)).await,
    }
}

/// While the application does not take `data`, what piles up behind it counts against the budget.
async fn write_patiently(
    app: &mut WriteHalf<'_>,
    data: &[u8],
    receive: &mut RecvStream,
    budget: &Budget,
) -> Result<(), Fault> {
    let mut writing = pin!(app.write_all(data));
    let mut held = budget.hold_nothing();
    loop {
        tokio::select! {
            biased;
            written = &mut writing => return written.map_err(|_| Fault::AppReset),
            () = tokio::time::sleep(held::LOOK) => held.update(receive.flow_control().used_capacity())?,
        }
    }
}

/// Application <-> plaintext endpoint.
pub(super) async fn plain<F: Fn(usize), G: Fn(usize)>(
    app: &mut TcpStream,
    far: &mut TcpStream,
    already_read: Vec<Bytes>,
    watch: &Watch<'_, F, G>,
) -> Result<(), Fault> {
    let outcome = async {
        for chunk in already_read {
            far.write_all(&chunk).await.map_err(|_| Fault::PeerReset)?;
        }
        let (app_read, app_write) = app.split();
        let (far_read, far_write) = far.split();
        let upload = copy(app_read, far_write, &watch.from_app, Fault::AppReset, Fault::PeerReset);
        let download = copy(far_read, app_write, &watch.to_app, Fault::PeerReset, Fault::AppReset);
        tokio::try_join!(upload, download).map(|_| ())
    }
    .await;
    if outcome.is_err() {
        abort(app);
        abort(far);
    }
    outcome
}

async fn copy(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    count: &impl Fn(usize),
    from_broke: Fault,
    to_broke: Fault,
) -> Result<(), Fault> {
    loop {
        let chunk = poll_fn(|cx| poll_chunk(&mut from, cx, CHUNK)).await.map_err(|_| from_broke)?;
        if chunk.is_empty() {
            return to.shutdown().await.map_err(|_| to_broke);
        }
        to.write_all(&chunk).await.map_err(|_| to_broke)?;
        count(chunk.len());
    }
}

/// Closing then sends a reset.
pub(super) fn abort(socket: &TcpStream) {
    // Fails only for a socket that is gone already.
    let _ = SockRef::from(socket).set_linger(Some(std::time::Duration::ZERO));
}
