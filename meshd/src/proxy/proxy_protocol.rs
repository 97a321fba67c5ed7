//! The PROXY protocol, version 2: the header that tells an application who calls, before the caller's first byte.
//!
//! Layout: <https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt>, section 2.2.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use meshd_identity::SpiffeId;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// Not in the range left to applications (0xE0 to 0xEF), but what Istio's ztunnel sends and its receivers read.
const TLV_SPIFFE_ID: u8 = 0xD0;

/// The header for a connection of `caller` from `source` to `destination`.
pub(super) fn header(source: SocketAddr, destination: SocketAddr, caller: &SpiffeId) -> Vec<u8> {
    let (family, addresses) = addresses(source.ip().to_canonical(), destination.ip().to_canonical());
    let caller = caller.to_string();
    // A SPIFFE ID has at most 2048 bytes (SPIFFE-ID, 2.3), so lengths never exceed 16 bits.
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    let mut header = Vec::with_capacity(SIGNATURE.len() + 4 + addresses.len() + 4 + 3 + caller.len());
    header.extend_from_slice(SIGNATURE);
    header.extend_from_slice(&[VERSION_COMMAND, family]);
    header.extend_from_slice(&length(addresses.len() + 4 + 3 + caller.len()));
    header.extend_from_slice(&addresses);
    header.extend_from_slice(&source.port().to_be_bytes());
    header.extend_from_slice(&destination.port().to_be_bytes());
    header.push(TLV_SPIFFE_ID);
    header.extend_from_slice(&length(caller.len()));
    header.extend_from_slice(caller.as_bytes());
    header
}

/// Both addresses must be of one family: IPv4 is written as IPv6 beside an IPv6 one, as HAProxy does.
fn addresses(source: IpAddr, destination: IpAddr) -> (u8, Vec<u8>) {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            (TCP_OVER_IPV4, [source.octets(), destination.octets()].concat())
        }
        _ => (TCP_OVER_IPV6, [ipv6(source).octets(), ipv6(destination).octets()].concat()),
    }
}

fn ipv6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller() -> SpiffeId {
        "spiffe://mesh.example/ns/shop/sa/web".parse().unwrap()
    }

    #[test]
    fn ipv4_is_written_as_the_specification_says() {
        let header = header("192.0.2.7:40000".parse().unwrap(), "127.0.0.1:8080".parse().unwrap(), &caller());
        let mut expected = b"\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A\x21\x11\x00\x33".to_vec();
        expected.extend_from_slice(&[192, 0, 2, 7, 127, 0, 0, 1, 0x9c, 0x40, 0x1f, 0x90]);
        expected.extend_from_slice(b"\xD0\x00\x24spiffe://mesh.example/ns/shop/sa/web");
        assert_eq!(header, expected);
    }

    #[test]
    fn the_length_covers_all_that_follows() {
        for (source, destination) in [("192.0.2.7:1", "127.0.0.1:2"), ("[fd00::7]:1", "[::1]:2")] {
            let header = header(source.parse().unwrap(), destination.parse().unwrap(), &caller());
            assert_eq!(usize::from(u16::from_be_bytes([header[14], header[15]])), header.len() - 16);
        }
    }

    #[test]
    fn families_that_differ_meet_in_ipv6() {
        let header = header("[fd00::7]:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap(), &caller());
        assert_eq!(header[13], TCP_OVER_IPV6);
        assert_eq!(header[16..32], "fd00::7".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(header[32..48], "::ffff:127.0.0.1".parse::<Ipv6Addr>().unwrap().octets());
    }

    #[test]
    fn a_mapped_address_is_the_ipv4_address_it_stands_for() {
        let header = header("[::ffff:192.0.2.7]:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap(), &caller());
        assert_eq!((header[13], &header[16..20]), (TCP_OVER_IPV4, &[192, 0, 2, 7][..]));
    }
}
