//! The kinds of socket meshd opens: listeners for peers, listeners for captured connections, and marked sockets to
//! dial with, or to tell our own rules something with.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Accept queue length; the kernel caps it at net.core.somaxconn (4096 by default since 5.4).
const BACKLOG: i32 = 4096;

/// The mark on meshd's own sockets, so that strict ports let them in. Setting it needs CAP_NET_ADMIN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub u32);

/// Listens on `address`, shared between worker threads (SO_REUSEPORT).
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = listener(address)?;
    finish(socket, address)
}

/// Listens for connections captured by TPROXY: their destination is an address this host does not have.
pub fn listen_transparent(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = listener(address)?;
    match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    finish(socket, address)
}

/// A non-blocking TCP socket carrying `mark`, ready to connect.
pub fn marked(address: SocketAddr, mark: Mark) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if mark.0 != 0 {
        socket.set_mark(mark.0)?;
    }
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A socket whose datagrams to `address` carry `mark`.
pub fn marked_datagrams(address: SocketAddr, mark: Mark) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    socket.set_mark(mark.0)?;
    socket.connect(&address.into())?;
    Ok(socket.into())
}

/// Has `socket` speak for `source`, an address this host need not have; before it connects. What answers it must be
/// routed back to this host. Needs CAP_NET_ADMIN.
pub fn speak_for(socket: &Socket, source: IpAddr) -> io::Result<()> {
    match source {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    // The port is chosen when it connects: one per destination, not one for all.
    setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}

fn listener(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    Ok(socket)
}

fn finish(socket: Socket, address: SocketAddr) -> io::Result<TcpListener> {
    // Accepted sockets inherit it: one system call less per connection.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A listener whose accepted sockets belong to no runtime yet: any worker may register them with its own.
pub struct AcceptQueue(AsyncFd<TcpListener>);

impl AcceptQueue {
    /// Must be called within the runtime that will wait on it.
    pub fn new(listener: TcpListener) -> io::Result<AcceptQueue> {
        // SAFETY: TcpListener is I/O safe: it returns the one descriptor it owns until it is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) };
        registered.map(AcceptQueue).map_err(io::Error::from)
    }

    /// The next connection, non-blocking already.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.0.async_io(Interest::READABLE, accept).await
    }
}

fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let mut accepted = None;
    // SAFETY: try_init hands out storage of the length it says, which accept4 fills and shortens as documented;
    // what accept4 returns is a new descriptor that nobody else owns.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, length| {
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let fd = libc::accept4(listener.as_raw_fd(), storage.cast(), length, flags);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            accepted = Some(TcpStream::from_raw_fd(fd));
            Ok(())
        })
    }?;
    accepted.zip(address.as_socket()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}
