//! Who listens on this host: one dump of the LISTEN sockets, for the control path. The kernel walks its table of
//! listeners only, so the number of connections does not matter.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, NetlinkAddr, recv, sendto};

use super::{
    INET_DIAG_MSG, NLM_F_REQUEST, NLMSG_ERROR, NLMSG_HEADER, REQUEST, SOCK_DIAG_BY_FAMILY, SocketDiag, SocketOwner,
    cgroup_attribute, truncated, u16_at, u32_at,
};

const NLM_F_DUMP: u16 = 0x300;
const NLMSG_DONE: u16 = 3;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const TCP_LISTEN: u32 = 10;
/// The kernel fills at most 32 KiB per message it sends (NLMSG_GOODSIZE and the size of our buffer bound it).
const BUFFER: usize = 32 * 1024;

/// A socket somebody listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: SocketAddr,
    /// Whoever made the socket: systemd for a socket-activated one.
    pub owner: SocketOwner,
}

/// Every TCP socket in LISTEN of this network namespace.
pub fn listeners() -> io::Result<Vec<Listener>> {
    let mut found = dump(AF_INET)?;
    found.extend(dump(AF_INET6)?);
    Ok(found)
}

/// A socket per dump: an answer left over from an earlier one cannot be mistaken for this one's.
fn dump(family: u8) -> io::Result<Vec<Listener>> {
    let netlink = SocketDiag::open()?.netlink;
    sendto(netlink.as_raw_fd(), &request(family), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut found = Vec::new();
    let mut buffer = vec![0u8; BUFFER];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if take(&buffer[..length], &mut found)? {
            return Ok(found);
        }
    }
}

fn request(family: u8) -> [u8; REQUEST] {
    let mut request = [0u8; REQUEST];
    request[0..4].copy_from_slice(&(REQUEST as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    let body = &mut request[NLMSG_HEADER..];
    body[0] = family;
    body[1] = IPPROTO_TCP;
    body[4..8].copy_from_slice(&(1u32 << TCP_LISTEN).to_ne_bytes());
    request
}

/// Reads the messages of one datagram; true when it was the last one.
fn take(mut datagram: &[u8], found: &mut Vec<Listener>) -> io::Result<bool> {
    while datagram.len() >= NLMSG_HEADER {
        let length = u32_at(datagram, 0).ok_or_else(truncated)? as usize;
        let message = datagram.get(..length).filter(|message| message.len() >= NLMSG_HEADER).ok_or_else(truncated)?;
        match u16_at(message, 4).ok_or_else(truncated)? {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let errno = -(u32_at(message, NLMSG_HEADER).ok_or_else(truncated)? as i32);
                return Err(io::Error::from_raw_os_error(errno));
            }
            _ => found.push(decode(&message[NLMSG_HEADER..])?),
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn decode(body: &[u8]) -> io::Result<Listener> {
    if body.len() < INET_DIAG_MSG {
        return Err(truncated());
    }
    let port = u16::from_be_bytes([body[4], body[5]]);
    let ip: IpAddr = match body[0] {
        AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(&body[8..12]).map_err(|_| truncated())?).into(),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(&body[8..24]).map_err(|_| truncated())?).into(),
    };
    let owner = SocketOwner {
        uid: u32_at(body, 64).ok_or_else(truncated)?,
        inode: u32_at(body, 68).ok_or_else(truncated)?,
        cgroup: cgroup_attribute(&body[INET_DIAG_MSG..]),
    };
    Ok(Listener { address: SocketAddr::new(ip, port), owner })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

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
}
