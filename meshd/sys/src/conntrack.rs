//! What NAT rewrote: one exact ctnetlink request per redirected connection, about 5 us. REDIRECT also rewrites
//! the client's source port when it would collide, so the peer address alone does not find the client's socket.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET.
const CT_GET: u16 = 1 << 8 | 1;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_HEADER: usize = 16;
/// nlmsghdr + nfgenmsg: where attributes begin.
const HEADERS: usize = NLMSG_HEADER + 4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const TCP: u8 = 6;

/// A netlink socket to ask with; one per worker thread. Needs CAP_NET_ADMIN.
pub struct Conntrack {
    netlink: OwnedFd,
    sequence: u32,
}

impl Conntrack {
    pub fn open() -> io::Result<Conntrack> {
        let netlink =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
        // The kernel answers inside sendto(); the timeout only bounds a kernel that does not answer at all.
        setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::milliseconds(200))?;
        Ok(Conntrack { netlink, sequence: 0 })
    }

    /// The address a client really has whose connection arrived here from `peer`, redirected to `listener`.
    /// None if conntrack knows no such connection.
    pub fn original_source(&mut self, peer: SocketAddr, listener: SocketAddr) -> io::Result<Option<SocketAddr>> {
        self.sequence = self.sequence.wrapping_add(1);
        // Replies go from the listener to the peer: that tuple is unique in the kernel's table.
        let request = encode_request(self.sequence, listener, peer);
        sendto(self.netlink.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut reply = [0u8; 2048];
        loop {
            let length = recv(self.netlink.as_raw_fd(), &mut reply, MsgFlags::empty())?;
            let message = &reply[..length];
            // A late answer to an earlier question that timed out is not the answer to this one.
            if message.get(8..12) == Some(&self.sequence.to_ne_bytes()) {
                return decode_reply(message);
            }
        }
    }
}

fn encode_request(sequence: u32, source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut ip = Vec::with_capacity(48);
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            attribute(&mut ip, CTA_IP_V4_SRC, &source.octets());
            attribute(&mut ip, CTA_IP_V4_DST, &destination.octets());
        }
        (source, destination) => {
            attribute(&mut ip, CTA_IP_V6_SRC, &as_v6(source).octets());
            attribute(&mut ip, CTA_IP_V6_DST, &as_v6(destination).octets());
        }
    }
    let mut protocol = Vec::with_capacity(32);
    attribute(&mut protocol, CTA_PROTO_NUM, &[TCP]);
    attribute(&mut protocol, CTA_PROTO_SRC_PORT, &source.port().to_be_bytes());
    attribute(&mut protocol, CTA_PROTO_DST_PORT, &destination.port().to_be_bytes());
    let mut tuple = Vec::with_capacity(96);
    attribute(&mut tuple, CTA_TUPLE_IP | NESTED, &ip);
    attribute(&mut tuple, CTA_TUPLE_PROTO | NESTED, &protocol);
    let mut request = vec![0u8; HEADERS];
    attribute(&mut request, CTA_TUPLE_REPLY | NESTED, &tuple);
    let length = request.len() as u32;
    request[0..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&CT_GET.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    request[8..12].copy_from_slice(&sequence.to_ne_bytes());
    request[NLMSG_HEADER] = if source.is_ipv4() { 2 } else { 10 }; // nfgen_family: AF_INET, AF_INET6
    request
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// struct nlattr: length with header, type, value, padded to 4 bytes.
fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn decode_reply(message: &[u8]) -> io::Result<Option<SocketAddr>> {
    let kind = u16_at(message, 4).ok_or_else(truncated)?;
    if kind == NLMSG_ERROR {
        let errno = message.get(NLMSG_HEADER..NLMSG_HEADER + 4).ok_or_else(truncated)?;
        let errno = -i32::from_ne_bytes(errno.try_into().map_err(|_| truncated())?);
        return if errno == nix::libc::ENOENT { Ok(None) } else { Err(io::Error::from_raw_os_error(errno)) };
    }
    let attributes = message.get(HEADERS..).ok_or_else(truncated)?;
    let tuple = find(attributes, CTA_TUPLE_ORIG).ok_or_else(truncated)?;
    let (ip, protocol) = find(tuple, CTA_TUPLE_IP).zip(find(tuple, CTA_TUPLE_PROTO)).ok_or_else(truncated)?;
    let port = find(protocol, CTA_PROTO_SRC_PORT).and_then(|port| port.try_into().ok()).ok_or_else(truncated)?;
    let address = source_address(ip).ok_or_else(truncated)?;
    Ok(Some(SocketAddr::new(address, u16::from_be_bytes(port))))
}

fn source_address(ip: &[u8]) -> Option<IpAddr> {
    if let Some(v4) = find(ip, CTA_IP_V4_SRC) {
        let octets: [u8; 4] = v4.try_into().ok()?;
        return Some(Ipv4Addr::from(octets).into());
    }
    let octets: [u8; 16] = find(ip, CTA_IP_V6_SRC)?.try_into().ok()?;
    Some(Ipv6Addr::from(octets).into())
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    while attributes.len() >= 4 {
        let length = usize::from(u16_at(attributes, 0)?);
        if length < 4 || length > attributes.len() {
            return None;
        }
        if u16_at(attributes, 2)? & TYPE_MASK == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "ctnetlink reply is too short: kernel and meshd disagree on its layout")
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_original_tuple_of_an_answer_is_read() {
        let mut ip = Vec::new();
        attribute(&mut ip, CTA_IP_V4_SRC, &[127, 0, 0, 1]);
        attribute(&mut ip, CTA_IP_V4_DST, &[240, 240, 0, 9]);
        let mut protocol = Vec::new();
        attribute(&mut protocol, CTA_PROTO_NUM, &[TCP]);
        attribute(&mut protocol, CTA_PROTO_SRC_PORT, &50001u16.to_be_bytes());
        let mut tuple = Vec::new();
        attribute(&mut tuple, CTA_TUPLE_IP | NESTED, &ip);
        attribute(&mut tuple, CTA_TUPLE_PROTO | NESTED, &protocol);
        let mut message = vec![0u8; HEADERS];
        message[4..6].copy_from_slice(&(1u16 << 8).to_ne_bytes());
        attribute(&mut message, CTA_TUPLE_ORIG | NESTED, &tuple);
        assert_eq!(decode_reply(&message).unwrap(), Some("127.0.0.1:50001".parse().unwrap()));
        for length in 0..message.len() {
            let _ = decode_reply(&message[..length]);
        }
    }
}
