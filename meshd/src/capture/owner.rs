//! Who opened a connection, when its socket does not know any more: asked of what the backend recorded.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use meshd_sys::nft_map::NftMaps;

use super::tun::Flows;

/// Where it is recorded who opens a connection.
#[derive(Clone, Debug, Default)]
pub enum OwnerRecord {
    #[default]
    Nowhere,
    /// In maps of our nftables table.
    Nft,
    /// Where TUN remembers its connections.
    Tun(Arc<Flows>),
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
}

impl OwnerReader {
    /// None for a backend that records nothing.
    pub fn open(record: &OwnerRecord) -> io::Result<Option<OwnerReader>> {
        Ok(match record {
            OwnerRecord::Nowhere => None,
            OwnerRecord::Nft => Some(OwnerReader::Nft(NftMaps::open("meshd")?)),
            OwnerRecord::Tun(flows) => Some(OwnerReader::Tun(flows.clone())),
        })
    }

    /// The owner of the socket bound to `client` and connected to `original`, both as that process saw them.
    pub fn owner(&mut self, client: SocketAddr, original: SocketAddr) -> io::Result<Option<RecordedOwner>> {
        let maps = match self {
            OwnerReader::Tun(flows) => return Ok(flows.owner(client, original)),
            OwnerReader::Nft(maps) => maps,
        };
        let map = if original.is_ipv4() { "owner4" } else { "owner6" };
        Ok(maps.value(map, &key(client, original))?.as_deref().and_then(recorded))
    }
}

/// `ip saddr . tcp sport . ip daddr . tcp dport`, each padded to 4 bytes.
fn key(client: SocketAddr, original: SocketAddr) -> Vec<u8> {
    let mut key = Vec::with_capacity(40);
    for end in [client, original] {
        match end.ip() {
            IpAddr::V4(v4) => key.extend(v4.octets()),
            IpAddr::V6(v6) => key.extend(v6.octets()),
        }
        key.extend(end.port().to_be_bytes());
        key.extend([0; 2]);
    }
    key
}

/// `meta skuid . socket cgroupv2`: 4 and 8 bytes, in the host's order.
fn recorded(value: &[u8]) -> Option<RecordedOwner> {
    let uid = u32::from_ne_bytes(value.get(..4)?.try_into().ok()?);
    let cgroup = u64::from_ne_bytes(value.get(4..)?.try_into().ok()?);
    Some(RecordedOwner { uid, cgroup: (cgroup > 1).then_some(cgroup) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_without_uid_or_cgroup_is_nobodys() {
        let value = [1001u32.to_ne_bytes().as_slice(), &77u64.to_ne_bytes()].concat();
        assert_eq!(recorded(&value), Some(RecordedOwner { uid: 1001, cgroup: Some(77) }));
        for length in 0..value.len() {
            assert_eq!(recorded(&value[..length]), None);
        }
        let root = [0u32.to_ne_bytes().as_slice(), &1u64.to_ne_bytes()].concat();
        assert_eq!(recorded(&root), Some(RecordedOwner { uid: 0, cgroup: None }));
    }
}
