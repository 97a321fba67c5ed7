//! What NAT rewrote: one exact ctnetlink request per redirected connection, about 5 us. REDIRECT also rewrites
//! the client's source port when it would collide, so the peer address alone does not find the client's socket.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::nfnetlink::{NESTED, Nfnetlink, attribute, find};

/// NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET.
const CT_GET: u16 = 1 << 8 | 1;
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
pub struct Conntrack(Nfnetlink);

impl Conntrack {
    pub fn open() -> io::Result<Conntrack> {
        Ok(Conntrack(Nfnetlink::open()?))
    }

    /// The address a client really has whose connection arrived here from `peer`, redirected to `listener`.
    /// None if conntrack knows no such connection.
    pub fn original_source(&mut self, peer: SocketAddr, listener: SocketAddr) -> io::Result<Option<SocketAddr>> {
        let family = if peer.is_ipv4() { 2 } else { 10 }; // nfgen_family: AF_INET, AF_INET6
        // Replies go from the listener to the peer: that tuple is unique in the kernel's table.
        self.0.ask(CT_GET, family, &encode_request(listener, peer), original_client)
    }
}

fn encode_request(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
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
    let mut request = Vec::with_capacity(112);
    attribute(&mut request, CTA_TUPLE_REPLY | NESTED, &tuple);
    request
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

fn original_client(attributes: &[u8]) -> Option<SocketAddr> {
    let tuple = find(attributes, CTA_TUPLE_ORIG)?;
    let port = find(find(tuple, CTA_TUPLE_PROTO)?, CTA_PROTO_SRC_PORT)?.try_into().ok()?;
    Some(SocketAddr::new(source_address(find(tuple, CTA_TUPLE_IP)?)?, u16::from_be_bytes(port)))
}

fn source_address(ip: &[u8]) -> Option<IpAddr> {
    if let Some(v4) = find(ip, CTA_IP_V4_SRC) {
        let octets: [u8; 4] = v4.try_into().ok()?;
        return Some(Ipv4Addr::from(octets).into());
    }
    let octets: [u8; 16] = find(ip, CTA_IP_V6_SRC)?.try_into().ok()?;
    Some(Ipv6Addr::from(octets).into())
}

#[cfg(test)]
mod tests {
    use super::super::nfnetlink::{HEADERS, decode};
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
        assert_eq!(decode(&message, original_client).unwrap(), Some("127.0.0.1:50001".parse().unwrap()));
        for length in 0..message.len() {
            let _ = decode(&message[..length], original_client);
        }
    }
}
