//! Who opened this connection? One exact `NETLINK_SOCK_DIAG` request per connection, answered from
//! the kernel's own hash table in 2-3 us whatever the number of sockets. Never a dump, never /proc.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

pub(crate) const SOCK_DIAG_BY_FAMILY: u16 = 20;
pub(crate) const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_HEADER: usize = 16;
const REQUEST: usize = NLMSG_HEADER + 56; // nlmsghdr + inet_diag_req_v2
pub(crate) const INET_DIAG_MSG: usize = 72;
const INET_DIAG_CGROUP_ID: u16 = 21;
const ENOENT: i32 = 2;

/// The kernel's TCP states (include/net/tcp_states.h) in which a socket still belongs to its process.
const OWNED_STATES: [u8; 5] = [1, 2, 4, 5, 8];

/// The process side of one connection, as the kernel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketOwner {
    pub uid: u32,
    pub inode: u32,
    /// cgroup-v2 id: the inode of the cgroup's directory. None on kernels or hosts without it.
    pub cgroup: Option<u64>,
}

/// What a lookup found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    Owned(SocketOwner),
    /// A socket in a state that has no owner any more: it would answer "uid 0", so it is never believed.
    Orphaned {
        state: u8,
    },
    Missing,
}

/// A netlink socket to ask with; one per worker thread.
pub struct SocketDiag {
    netlink: OwnedFd,
    sequence: u32,
}

impl SocketDiag {
    pub fn open() -> io::Result<SocketDiag> {
        SocketDiag::with_patience(Duration::from_millis(200))
    }

    /// The kernel answers inside sendto(); `patience` only bounds a kernel that does not answer at all.
    pub fn with_patience(patience: Duration) -> io::Result<SocketDiag> {
        let netlink =
            socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
        setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::milliseconds(patience.as_millis() as i64))?;
        Ok(SocketDiag { netlink, sequence: 0 })
    }

    /// The owner of the socket bound to `local` and connected to `remote`, both as that process sees them.
    pub fn owner(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<Lookup> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = encode_request(self.sequence, local, remote);
        sendto(self.netlink.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut reply = [0u8; 1024];
        loop {
            let length = recv(self.netlink.as_raw_fd(), &mut reply, MsgFlags::empty())?;
            let message = &reply[..length];
            // A late answer to an earlier question that timed out is not the answer to this one.
            if u32_at(message, 8) == Some(self.sequence) {
                return decode_reply(message, local, remote);
            }
        }
    }
}

fn encode_request(sequence: u32, local: SocketAddr, remote: SocketAddr) -> [u8; REQUEST] {
    let mut request = [0u8; REQUEST];
    request[0..4].copy_from_slice(&(REQUEST as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request[8..12].copy_from_slice(&sequence.to_ne_bytes());
    let body = &mut request[NLMSG_HEADER..];
    body[0] = if local.is_ipv4() { 2 } else { 10 }; // AF_INET, AF_INET6
    body[1] = 6; // IPPROTO_TCP
    body[4..8].copy_from_slice(&u32::MAX.to_ne_bytes()); // any state: decode_reply judges it
    encode_tuple(&mut body[8..56], local, remote);
    request
}

/// struct inet_diag_sockid: ports and addresses in network order, then interface and cookie.
fn encode_tuple(sockid: &mut [u8], local: SocketAddr, remote: SocketAddr) {
    sockid[0..2].copy_from_slice(&local.port().to_be_bytes());
    sockid[2..4].copy_from_slice(&remote.port().to_be_bytes());
    encode_ip(&mut sockid[4..20], local.ip());
    encode_ip(&mut sockid[20..36], remote.ip());
    sockid[40..48].fill(0xff); // INET_DIAG_NOCOOKIE
}

fn tuple(local: SocketAddr, remote: SocketAddr) -> [u8; 36] {
    let mut sockid = [0u8; 48];
    encode_tuple(&mut sockid, local, remote);
    std::array::from_fn(|at| sockid[at])
}

/// As an IPv6 socket sees an IPv4 connection of its own; what the JVM uses for every connection.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

fn encode_ip(field: &mut [u8], ip: IpAddr) {
    match ip {
        IpAddr::V4(v4) => field[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => field.copy_from_slice(&v6.octets()),
    }
}

fn decode_reply(message: &[u8], local: SocketAddr, remote: SocketAddr) -> io::Result<Lookup> {
    let kind = u16_at(message, 4).ok_or_else(truncated)?;
    if kind == NLMSG_ERROR {
        let errno = -(u32_at(message, NLMSG_HEADER).ok_or_else(truncated)? as i32);
        return if errno == ENOENT { Ok(Lookup::Missing) } else { Err(io::Error::from_raw_os_error(errno)) };
    }
    let body = message.get(NLMSG_HEADER..).filter(|body| body.len() >= INET_DIAG_MSG).ok_or_else(truncated)?;
    // An inexact hit (a wildcard listener on the port) is somebody else's socket.
    let answered = &body[4..40];
    if answered != tuple(local, remote) && answered != tuple(mapped(local), mapped(remote)) {
        return Ok(Lookup::Missing);
    }
    let state = body[1];
    let uid = u32_at(body, 64).ok_or_else(truncated)?;
    let inode = u32_at(body, 68).ok_or_else(truncated)?;
    if !OWNED_STATES.contains(&state) || inode == 0 {
        return Ok(Lookup::Orphaned { state });
    }
    Ok(Lookup::Owned(SocketOwner { uid, inode, cgroup: cgroup_attribute(&body[INET_DIAG_MSG..]) }))
}

pub(crate) fn cgroup_attribute(mut attributes: &[u8]) -> Option<u64> {
    while attributes.len() >= 4 {
        let length = u16_at(attributes, 0)? as usize;
        if length < 4 || length > attributes.len() {
            return None;
        }
        if u16_at(attributes, 2)? == INET_DIAG_CGROUP_ID {
            let id = u64::from_ne_bytes(attributes.get(4..12)?.try_into().ok()?);
            // Hosts with cgroup v1 only answer 0 or 1 (the root) for everybody: no information.
            return (id > 1).then_some(id);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

pub(crate) fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "sock_diag reply is too short: kernel and meshd disagree on its layout")
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    #[test]
    fn finds_the_owner_of_an_open_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found =
            SocketDiag::open().unwrap().owner(client.local_addr().unwrap(), client.peer_addr().unwrap()).unwrap();
        let Lookup::Owned(owner) = found else { panic!("{found:?}") };
        assert_eq!(owner.uid, nix::unistd::getuid().as_raw());
        assert_ne!(owner.inode, 0);
    }

    #[test]
    fn a_closed_socket_is_never_taken_for_root() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let (served, _) = listener.accept().unwrap();
        drop(client); // FIN_WAIT2 without a process: the kernel would say uid 0
        let mut diag = SocketDiag::open().unwrap();
        // A child that another test is starting has it until its exec, and is its owner.
        let began = Instant::now();
        let mut found = diag.owner(local, remote).unwrap();
        while matches!(found, Lookup::Owned(_)) && began.elapsed() < Duration::from_secs(10) {
            found = diag.owner(local, remote).unwrap();
        }
        assert!(matches!(found, Lookup::Orphaned { .. } | Lookup::Missing), "{found:?}");
        drop(served);
    }

    #[test]
    fn a_wildcard_listener_is_not_the_owner_of_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let nobody: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let found = SocketDiag::open().unwrap().owner(listener.local_addr().unwrap(), nobody).unwrap();
        assert!(matches!(found, Lookup::Missing), "{found:?}");
    }

    #[test]
    fn an_ipv4_connection_of_an_ipv6_socket_has_an_owner() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("::ffff:127.0.0.1", port)).unwrap();
        let (_served, seen) = listener.accept().unwrap();
        assert!(client.local_addr().unwrap().is_ipv6() && seen.is_ipv4());
        let found = SocketDiag::open().unwrap().owner(seen, listener.local_addr().unwrap()).unwrap();
        assert!(matches!(found, Lookup::Owned(_)), "{found:?}");
    }

    #[test]
    fn ipv6_tuples_are_found_too() {
        let Ok(listener) = TcpListener::bind("[::1]:0") else { return };
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found =
            SocketDiag::open().unwrap().owner(client.local_addr().unwrap(), client.peer_addr().unwrap()).unwrap();
        assert!(matches!(found, Lookup::Owned(_)), "{found:?}");
    }
}
