//! Who opened a connection, when its socket does not know any more: asked of what the backend recorded.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_sys::nft_map::NftMaps;

use super::iptables::Hearing;
use super::tun::Flows;

/// Where it is recorded who opens a connection.
#[derive(Clone, Debug, Default)]
pub enum OwnerRecord {
    #[default]
    Nowhere,
    /// In maps of our nftables tables.
    Nft,
    /// Where TUN remembers its connections.
    Tun(Arc<Flows>),
    /// What rules of iptables tell as connections are opened.
    Heard(Arc<Hearing>),
}

/// Whose socket it was at its first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedOwner {
    pub uid: u32,
    /// cgroup-v2 id of its cgroup or an ancestor; None for the root of the hierarchy: no information.
    pub cgroup: Option<u64>,
}

/// One worker's means of asking.
pub enum OwnerReader {
    Nft(NftMaps),
    Tun(Arc<Flows>),
    Heard(Arc<Hearing>),
}

impl OwnerReader {
    /// None for a backend that records nothing.
    pub fn open(record: &OwnerRecord) -> io::Result<Option<OwnerReader>> {
        Ok(match record {
            OwnerRecord::Nowhere => None,
            OwnerRecord::Nft => Some(OwnerReader::Nft(NftMaps::open()?)),
            OwnerRecord::Tun(flows) => Some(OwnerReader::Tun(flows.clone())),
            OwnerRecord::Heard(hearing) => Some(OwnerReader::Heard(hearing.clone())),
        })
    }

    /// The owner of the socket bound to `client` and connected to `original`, both as that process saw them.
    pub fn owner(&mut self, client: SocketAddr, original: SocketAddr) -> io::Result<Option<RecordedOwner>> {
        let maps = match self {
            OwnerReader::Tun(flows) => return Ok(flows.owner(client, original)),
            OwnerReader::Heard(hearing) => return Ok(hearing.owner(client, original)),
            OwnerReader::Nft(maps) => maps,
        };
        let map = if original.is_ipv4() { "owner4" } else { "owner6" };
        let key = key(client, original);
        for table in ["meshd", "meshd_raw"] {
            if let Some(value) = maps.value(table, map, &key)? {
                return Ok(recorded(&value, client, original));
            }
        }
        Ok(None)
    }
}

/// Fields as in nft/owners.rs, each padded to 4 bytes.
fn key(client: SocketAddr, original: SocketAddr) -> Vec<u8> {
    let (sport, dport) = (client.port().to_be_bytes(), original.port().to_be_bytes());
    match (client.ip(), original.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            [&from.octets()[..], &sport, &[0; 2], &to.octets(), &dport, &[0; 2]].concat()
        }
        (_, IpAddr::V6(to)) => [&to.octets()[4..], &sport, &dport].concat(),
        // No connection is of both families, and no key is empty.
        (IpAddr::V6(_), IpAddr::V4(_)) => Vec::new(),
    }
}

/// `meta skuid . socket cgroupv2`: 4 and 8 bytes, in the host's order; then what of the tuple is not in the key.
fn recorded(value: &[u8], client: SocketAddr, original: SocketAddr) -> Option<RecordedOwner> {
    let uid = u32::from_ne_bytes(value.get(..4)?.try_into().ok()?);
    let cgroup = u64::from_ne_bytes(value.get(4..12)?.try_into().ok()?);
    let same_connection = match (client.ip(), original.ip()) {
        (IpAddr::V6(from), IpAddr::V6(to)) => value[12..] == [&from.octets()[..], &to.octets()[..4]].concat(),
        _ => value.len() == 12,
    };
    same_connection.then_some(RecordedOwner { uid, cgroup: (cgroup > 1).then_some(cgroup) })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn end(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_record_without_uid_or_cgroup_is_nobodys() {
        let value = [1001u32.to_ne_bytes().as_slice(), &77u64.to_ne_bytes()].concat();
        let recorded = |value: &[u8]| recorded(value, end("10.0.0.9:4000"), end("240.240.0.1:80"));
        assert_eq!(recorded(&value), Some(RecordedOwner { uid: 1001, cgroup: Some(77) }));
        for length in 0..value.len() {
            assert_eq!(recorded(&value[..length]), None);
        }
        let root = [0u32.to_ne_bytes().as_slice(), &1u64.to_ne_bytes()].concat();
        assert_eq!(recorded(&root), Some(RecordedOwner { uid: 0, cgroup: None }));
    }

    #[test]
    fn over_ipv6_a_record_is_of_exactly_one_connection() {
        let (client, original) = (end("[fd00::9]:4000"), end("[fd6d:6573:6864::7]:80"));
        let [from, to] = ["fd00::9", "fd6d:6573:6864::7"].map(|address| address.parse::<Ipv6Addr>().unwrap().octets());
        let value = [&1001u32.to_ne_bytes()[..], &77u64.to_ne_bytes(), &from, &to[..4]].concat();
        assert_eq!(recorded(&value, client, original), Some(RecordedOwner { uid: 1001, cgroup: Some(77) }));
        assert_eq!(recorded(&value, end("[fd00::a]:4000"), original), None);
        assert_eq!(recorded(&value, client, end("[fd6e:6573:6864::7]:80")), None);
        assert_ne!(key(client, original), key(client, end("[fd6d:6573:6865::7]:80")));
        for length in 0..value.len() {
            assert_eq!(recorded(&value[..length], client, original), None);
        }
    }
}
