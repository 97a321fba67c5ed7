//! Every TCP socket of this network namespace, or every listening one, in one dump. All of them cost time and memory
//! per socket of the host, so never on the path of a connection: that is `sock_diag`. For listeners the kernel walks its
//! table of those only.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::sock_diag::{
    INET_DIAG_MSG, NLM_F_REQUEST, NLMSG_ERROR, NLMSG_HEADER, SOCK_DIAG_BY_FAMILY, SocketOwner, cgroup_attribute,
    truncated, u16_at, u32_at,
};

const NLM_F_DUMP: u16 = 0x300;
const NLMSG_DONE: u16 = 3;
const REQUEST: usize = NLMSG_HEADER + 56; // nlmsghdr + inet_diag_req_v2
/// The kernel fills whatever buffer it is given; 32 KiB is what `ss` uses.
const BUFFER: usize = 32 * 1024;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The kernel's TCP states (include/net/tcp_states.h) that matter to whoever plans.
const LISTEN: u8 = 10;
/// Established, SYN sent, FIN sent, close wait: the ones that belong to a process.
const OPEN: [u8; 5] = [1, 2, 4, 5, 8];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketState {
    Listening,
    Open,
}

/// One TCP socket as the kernel knows it. IPv4 addresses of IPv6 sockets are given as IPv4.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpSocket {
    pub state: SocketState,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub uid: u32,
    pub inode: u32,
    /// cgroup-v2 id; None on hosts without it.
    pub cgroup: Option<u64>,
}

/// A socket somebody listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: SocketAddr,
    /// Whoever made the socket: systemd for a socket-activated one.
    pub owner: SocketOwner,
}

/// All of them, IPv4 and IPv6.
pub fn tcp_sockets() -> io::Result<Vec<TcpSocket>> {
    sockets_in(OPEN.iter().chain([&LISTEN]).map(|state| 1 << state).sum())
}

/// Those somebody listens on.
pub fn listeners() -> io::Result<Vec<Listener>> {
    let listener = |TcpSocket { local, uid, inode, cgroup, .. }| Listener {
        address: local,
        owner: SocketOwner { uid, inode, cgroup },
    };
    Ok(sockets_in(1 << LISTEN)?.into_iter().map(listener).collect())
}

/// `states`: a bit for each.
fn sockets_in(states: u32) -> io::Result<Vec<TcpSocket>> {
    let netlink =
        socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
    let mut sockets = Vec::new();
    dump(&netlink, AF_INET, states, &mut sockets)?;
    dump(&netlink, AF_INET6, states, &mut sockets)?;
    Ok(sockets)
}

fn dump(netlink: &OwnedFd, family: u8, states: u32, sockets: &mut Vec<TcpSocket>) -> io::Result<()> {
    let request = encode_request(family, states);
    sendto(netlink.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buffer = vec![0u8; BUFFER];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if decode(&buffer[..length], u32::from(family), sockets)? == End::Reached {
            return Ok(());
        }
    }
}

fn encode_request(family: u8, states: u32) -> [u8; REQUEST] {
    let mut request = [0u8; REQUEST];
    request[0..4].copy_from_slice(&(REQUEST as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    // The family doubles as the sequence number: each is asked for once.
    request[8..12].copy_from_slice(&u32::from(family).to_ne_bytes());
    let body = &mut request[NLMSG_HEADER..];
    body[0] = family;
    body[1] = 6; // IPPROTO_TCP
    body[4..8].copy_from_slice(&states.to_ne_bytes());
    request
}

#[derive(PartialEq, Eq)]
enum End {
    Reached,
    MoreToCome,
}

/// Several messages come in one datagram.
fn decode(mut messages: &[u8], sequence: u32, sockets: &mut Vec<TcpSocket>) -> io::Result<End> {
    while !messages.is_empty() {
        let length = u32_at(messages, 0).ok_or_else(truncated)? as usize;
        if length < NLMSG_HEADER || length > messages.len() {
            return Err(truncated());
        }
        let message = &messages[..length];
        if u32_at(message, 8) == Some(sequence) {
            match u16_at(message, 4).ok_or_else(truncated)? {
                NLMSG_DONE => return Ok(End::Reached),
                NLMSG_ERROR => {
                    let errno = u32_at(message, NLMSG_HEADER).ok_or_else(truncated)?;
                    return Err(io::Error::from_raw_os_error(-errno.cast_signed()));
                }
                _ => sockets.extend(decode_socket(&message[NLMSG_HEADER..])?),
            }
        }
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(End::MoreToCome)
}

/// None for a state nobody asked for.
fn decode_socket(body: &[u8]) -> io::Result<Option<TcpSocket>> {
    if body.len() < INET_DIAG_MSG {
        return Err(truncated());
    }
    let state = match body[1] {
        LISTEN => SocketState::Listening,
        state if OPEN.contains(&state) => SocketState::Open,
        _ => return Ok(None),
    };
    let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    let local = SocketAddr::new(ip(body[0], &body[8..24])?, port(4));
    let remote = SocketAddr::new(ip(body[0], &body[24..40])?, port(6));
    let uid = u32_at(body, 64).ok_or_else(truncated)?;
    let inode = u32_at(body, 68).ok_or_else(truncated)?;
    Ok(Some(TcpSocket { state, local, remote, uid, inode, cgroup: cgroup_attribute(&body[INET_DIAG_MSG..]) }))
}

fn ip(family: u8, field: &[u8]) -> io::Result<IpAddr> {
    if family == AF_INET {
        let octets: [u8; 4] = field[..4].try_into().map_err(|_| truncated())?;
        return Ok(Ipv4Addr::from(octets).into());
    }
    let octets: [u8; 16] = field.try_into().map_err(|_| truncated())?;
    Ok(IpAddr::from(Ipv6Addr::from(octets)).to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn listeners_and_both_ends_of_a_connection_are_in_the_dump() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let client = TcpStream::connect(at).unwrap();
        let (_served, from) = listener.accept().unwrap();
        let sockets = tcp_sockets().unwrap();
        let find = |state, local| sockets.iter().find(|socket| socket.state == state && socket.local == local);
        let own = nix::unistd::getuid().as_raw();
        assert_eq!(find(SocketState::Listening, at).unwrap().uid, own);
        let ours = find(SocketState::Open, from).unwrap();
        assert_eq!((ours.remote, ours.uid), (at, own));
        assert_ne!(ours.inode, 0);
        assert!(sockets.iter().any(|socket| socket.local == at && socket.remote == from));
        drop(client);
    }

    #[test]
    fn a_listener_is_found_with_its_owner_and_a_connection_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let inode = nix::sys::stat::fstat(listener.as_fd()).unwrap().st_ino;
        let found = listeners().unwrap();
        let ours: Vec<&Listener> = found.iter().filter(|found| found.address == address).collect();
        assert_eq!(ours.len(), 1, "{ours:?}");
        assert_eq!(u64::from(ours[0].owner.inode), inode);
        assert_eq!(ours[0].owner.uid, nix::unistd::getuid().as_raw());
        assert!(!found.iter().any(|found| found.address == client.local_addr().unwrap()));
    }

    #[test]
    fn more_listeners_than_fit_one_message_are_all_found() {
        let listeners_here: Vec<TcpListener> = (0..400).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let found = listeners().unwrap();
        for listener in &listeners_here {
            let address = listener.local_addr().unwrap();
            assert!(found.iter().any(|found| found.address == address), "{address} is missing");
        }
    }

    #[test]
    fn an_ipv4_connection_of_an_ipv6_socket_is_given_as_ipv4() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let _client = TcpStream::connect(("::ffff:127.0.0.1", at.port())).unwrap();
        let sockets = tcp_sockets().unwrap();
        assert!(sockets.iter().any(|socket| socket.state == SocketState::Open && socket.remote == at), "{sockets:?}");
    }

    #[test]
    fn a_cut_off_answer_is_an_error_and_no_panic() {
        let mut message = vec![0u8; NLMSG_HEADER + INET_DIAG_MSG];
        let length = message.len() as u32;
        message[0..4].copy_from_slice(&length.to_ne_bytes());
        message[8..12].copy_from_slice(&2u32.to_ne_bytes());
        message[NLMSG_HEADER..NLMSG_HEADER + 2].copy_from_slice(&[AF_INET, 1]);
        let mut sockets = Vec::new();
        assert!(decode(&message, 2, &mut sockets).is_ok() && sockets.len() == 1);
        for cut in 1..message.len() {
            assert!(decode(&message[..cut], 2, &mut Vec::new()).is_err(), "{cut} bytes");
        }
    }
}
