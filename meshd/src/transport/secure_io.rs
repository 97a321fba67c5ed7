//! The encrypted byte stream under an HTTP/2 connection, once the TLS handshake is done.
//!
//! Two things make it cheaper than a general-purpose TLS stream. Writes are gathered: HTTP/2 frames of
//! all streams that became ready in one turn of the event loop leave as one TLS record and one system
//! call, because `poll_flush` does nothing and the connection's driver calls `poll_send` at the end of
//! its turn. Reads go through one 64 KiB buffer per worker thread, so an idle connection holds none.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, BufRead, Write};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use rustls::Connection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Ciphertext read per system call: four full TLS records.
const READ_BUFFER: usize = 64 * 1024;
/// Plaintext gathered before it is sent even in the middle of a turn.
const GATHER_MAX: usize = 128 * 1024;
/// A gather buffer that grew beyond this is given back when it runs empty.
const GATHER_KEEP: usize = 16 * 1024;
/// Writes of at least a full TLS record are encrypted where they are instead of being gathered first.
const RECORD: usize = 16 * 1024;
/// Ciphertext taken in per turn. Then the streams have their turn while what was decrypted is still in
/// the CPU's cache, and its memory is used again instead of piling up.
const TURN_MAX: usize = 256 * 1024;
/// How long a connection that has ended waits for its peer to have read everything.
const LINGER: Duration = Duration::from_secs(5);

thread_local! {
    static CIPHERTEXT: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BUFFER].into_boxed_slice());
}

struct Inner {
    socket: TcpStream,
    tls: Connection,
    /// Ciphertext that did not fit into rustls because plaintext was not taken yet. Empty while idle.
    unread: Vec<u8>,
    unread_at: usize,
    /// Plaintext waiting for the end of the turn.
    gathered: Vec<u8>,
    /// Bytes encrypted and not yet sent, at most.
    encrypted: usize,
    /// Ciphertext taken in this turn.
    taken: usize,
    ended: bool,
    /// The peer has ended it by TLS close_notify, after everything it had to say.
    in_order: bool,
    heard: Rc<Cell<Instant>>,
}

/// The stream as HTTP/2 sees it. Clones share one stream: HTTP/2 holds one, its driver the other.
#[derive(Clone)]
pub struct SecureIo(Rc<RefCell<Inner>>);

impl SecureIo {
    pub fn new(socket: TcpStream, mut tls: Connection) -> SecureIo {
        // What rustls may hold is bounded by what is gathered, which is bounded here.
        tls.set_buffer_limit(None);
        let heard = Rc::new(Cell::new(Instant::now()));
        SecureIo(Rc::new(RefCell::new(Inner {
            socket,
            tls,
            unread: Vec::new(),
            unread_at: 0,
            gathered: Vec::new(),
            encrypted: 0,
            taken: 0,
            ended: false,
            in_order: false,
            heard,
        })))
    }

    /// When the peer was last heard; stays readable while HTTP/2 owns the stream.
    pub fn heard(&self) -> Rc<Cell<Instant>> {
        self.0.borrow().heard.clone()
    }

    /// After an orderly end: reads and throws away until the peer has closed, too. Closing earlier would
    /// answer what it still sends with a reset, which takes what it has not yet read from us with it.
    pub async fn linger(&self) {
        let peer_closed = poll_fn(|cx| self.0.borrow_mut().poll_discard(cx));
        // Whoever does not close within this time has lost interest in the rest.
        let _ = tokio::time::timeout(LINGER, peer_closed).await;
    }

    /// Whether the peer ended it by its own will, and did not break.
    pub fn ended_in_order(&self) -> bool {
        self.0.borrow().in_order
    }

    /// Ends the turn: encrypts and sends what was gathered. An error is the connection's end; a full
    /// socket wakes the task when it drains.
    pub fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        inner.taken = 0;
        inner.poll_send(cx)
    }
}

impl Inner {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.encrypt_gathered()?;
        while self.tls.wants_write() {
            let mut socket = PolledWriter { socket: &mut self.socket, cx };
            match self.tls.write_tls(&mut socket) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        self.encrypted = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        CIPHERTEXT.with_borrow_mut(|buffer| {
            loop {
                let mut read = ReadBuf::new(buffer);
                let result = ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read));
                if result.is_err() || read.filled().is_empty() {
                    return Poll::Ready(());
                }
            }
        })
    }

    fn encrypt_gathered(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        self.tls.writer().write_all(&self.gathered)?;
        self.encrypted += self.gathered.len();
        self.gathered.clear();
        if self.gathered.capacity() > GATHER_KEEP {
            self.gathered = Vec::new();
        }
        Ok(())
    }

    fn poll_plaintext(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        loop {
            let end = self.take_plaintext(buf)?;
            if end || buf.remaining() == 0 || (buf.filled().len() > before && self.unread.is_empty()) {
                return Poll::Ready(Ok(()));
            }
            if !self.unread.is_empty() {
                self.feed_unread()?;
                continue;
            }
            match self.poll_ciphertext(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Moves decrypted bytes out; true once the peer has ended the stream.
    fn take_plaintext(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
        while buf.remaining() > 0 {
            let mut reader = self.tls.reader();
            // Borrowed and copied, because `read` would want the destination cleared first.
            match reader.fill_buf() {
                Ok([]) => return Ok(true),
                Ok(plaintext) => {
                    let count = plaintext.len().min(buf.remaining());
                    buf.put_slice(&plaintext[..count]);
                    reader.consume(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(self.ended),
                // A TCP close without TLS close_notify: HTTP/2 knows by its own framing what is missing.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn poll_ciphertext(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.taken >= TURN_MAX {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        CIPHERTEXT.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut read))?;
            let mut received = read.filled();
            if received.is_empty() {
                self.ended = true;
                self.tls.read_tls(&mut received)?;
                return Poll::Ready(Ok(()));
            }
            self.taken += received.len();
            self.heard.set(Instant::now());
            self.feed(&mut received)?;
            self.unread.extend_from_slice(received);
            Poll::Ready(Ok(()))
        })
    }

    fn feed_unread(&mut self) -> io::Result<()> {
        let unread = std::mem::take(&mut self.unread);
        let mut rest = &unread[self.unread_at..];
        self.feed(&mut rest)?;
        if rest.is_empty() {
            self.unread_at = 0;
        } else {
            self.unread_at = unread.len() - rest.len();
            self.unread = unread;
        }
        Ok(())
    }

    /// Gives rustls ciphertext until it has taken all or holds as much plaintext as it may.
    fn feed(&mut self, ciphertext: &mut &[u8]) -> io::Result<()> {
        while !ciphertext.is_empty() {
            match self.tls.read_tls(ciphertext) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                // "received plaintext buffer full": the rest waits until plaintext is taken.
                Err(error) if error.kind() == io::ErrorKind::Other => return Ok(()),
                Err(error) => return Err(error),
            }
            let state = self.tls.process_new_packets().map_err(io::Error::other)?;
            if state.peer_has_closed() {
                (self.ended, self.in_order) = (true, true);
            }
        }
        Ok(())
    }
}

impl AsyncRead for SecureIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.borrow_mut().poll_plaintext(cx, buf)
    }
}

impl AsyncWrite for SecureIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut inner = self.0.borrow_mut();
        if inner.gathered.len() + inner.encrypted >= GATHER_MAX {
            ready!(inner.poll_send(cx))?;
        }
        let length = slices.iter().map(|slice| slice.len()).sum();
        if length >= RECORD {
            inner.encrypt_gathered()?;
            let written = inner.tls.writer().write_vectored(slices)?;
            inner.encrypted += written;
            return Poll::Ready(Ok(written));
        }
        for slice in slices {
            inner.gathered.extend_from_slice(slice);
        }
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing: the driver sends at the end of its turn.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.0.borrow_mut();
        ready!(inner.poll_send(cx))?;
        inner.tls.send_close_notify();
        ready!(inner.poll_send(cx))?;
        Pin::new(&mut inner.socket).poll_shutdown(cx)
    }
}

/// Lets rustls write to the socket; "would block" has registered the task to be woken.
struct PolledWriter<'a, 'b> {
    socket: &'a mut TcpStream,
    cx: &'a mut Context<'b>,
}

impl Write for PolledWriter<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match Pin::new(&mut *self.socket).poll_write(self.cx, bytes) {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match Pin::new(&mut *self.socket).poll_write_vectored(self.cx, slices) {
            Poll::Ready(result) => result,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
