//! In front of our HTTP/2: what a client calls us.
//!
//! gRPC's C core, and every language on top of it, sends the path of a Unix socket as `:authority`, percent-encoded. That
//! is no authority of HTTP, and h2 resets the request. So what a client sends is read here first
//! (docs/adr/0006-authority-of-unix-sockets.md).

mod frames;
mod headers;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::frames::Frames;

/// A gRPC client's first request with all around it is well below.
const READ: usize = 2048;

/// A connection whose requests name an authority HTTP accepts. `pace` is told of every request and may end it all.
pub(super) struct Named<S, P> {
    socket: S,
    pace: P,
    frames: Frames,
    /// Read, and not looked at yet.
    raw: Vec<u8>,
    /// Looked at, and not given on yet; how much of it was.
    ready: Vec<u8>,
    given: usize,
}

impl<S, P> Named<S, P> {
    pub(super) fn new(socket: S, pace: P) -> Named<S, P> {
        Named { socket, pace, frames: Frames::new(), raw: Vec::new(), ready: Vec::new(), given: 0 }
    }

    fn give(&mut self, buf: &mut ReadBuf<'_>) {
        let left = &self.ready[self.given..];
        let length = left.len().min(buf.remaining());
        buf.put_slice(&left[..length]);
        self.given += length;
        if self.given == self.ready.len() {
            // An open stream says nothing for hours; it holds no buffer meanwhile.
            (self.ready, self.given) = (Vec::new(), 0);
        }
    }
}

impl<S, P: FnMut(u64) -> bool> Named<S, P> {
    /// Makes some of `raw` ready.
    fn advance(&mut self) -> io::Result<()> {
        let before = self.frames.blocks;
        let broken = |why| io::Error::new(io::ErrorKind::InvalidData, format!("{why}"));
        let taken = self.frames.advance(&self.raw, &mut self.ready).map_err(broken)?;
        if taken == self.raw.len() {
            self.raw = Vec::new();
        } else {
            self.raw.drain(..taken);
        }
        match (self.pace)(self.frames.blocks - before) {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::QuotaExceeded, "too many requests")),
        }
    }
}

impl<S: AsyncRead + Unpin, P: FnMut(u64) -> bool + Unpin> AsyncRead for Named<S, P> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.ready.is_empty() {
            if this.raw.is_empty() {
                let mut space = [0; READ];
                let mut read = ReadBuf::new(&mut space);
                ready!(Pin::new(&mut this.socket).poll_read(context, &mut read))?;
                if read.filled().is_empty() {
                    return Poll::Ready(Ok(()));
                }
                this.raw.extend_from_slice(read.filled());
            }
            this.advance()?;
        }
        this.give(buf);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin, P: Unpin> AsyncWrite for Named<S, P> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(context, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write_vectored(context, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }
}
