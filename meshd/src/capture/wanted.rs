//! What the kernel is to do, as plain data: the same for every backend, comparable, and kept on disk so that
//! whoever reverts knows what was applied.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::enrol::Cgroup;

/// The operator's intent, out of meshd.toml and enrol.d. Nothing in it changes by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wanted {
    /// Virtual IPs of services: captured for everybody.
    pub vip4: Ipv4Net,
    pub vip6: Ipv6Net,
    /// Where captured connections arrive, on loopback.
    pub capture_port: u16,
    /// Routing table of the virtual IPs.
    pub table: u32,
    /// Mark on meshd's own sockets, and which bits of a mark are ours.
    pub mark: u32,
    pub mark_mask: u32,
    /// Who may set that mark and be believed.
    pub daemon_uid: u32,
    /// Ports whose plaintext callers are refused, by port.
    pub strict: BTreeSet<StrictPort>,
    /// Ports that anybody may call, but whoever does it in clear is counted.
    pub permissive: BTreeSet<u16>,
    /// Whose connections to raw service addresses are captured; nobody's if empty.
    pub raw_callers: BTreeSet<Caller>,
}

/// A port whose plaintext callers the kernel refuses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StrictPort {
    pub port: u16,
    /// Who may still call it on this host: its owner, and the operator's `local_ok`.
    pub local: BTreeSet<Caller>,
    /// Networks that may still call it in clear (`plaintext_from`), say for a load balancer's checks.
    pub plaintext_from: BTreeSet<IpNet>,
}

/// A local process, as rules can tell it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Caller {
    Uid(u32),
    /// A systemd unit: everything in its cgroup.
    Unit(String),
}

impl Caller {
    fn unit(&self) -> Option<&str> {
        match self {
            Caller::Unit(unit) => Some(unit),
            Caller::Uid(_) => None,
        }
    }
}

impl Wanted {
    /// Short name of this intent: what an operator confirms.
    pub fn hash(&self) -> String {
        let mut hasher = DefaultHasher::new();
        Hash::hash(self, &mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Every unit the rules must know the cgroup of.
    pub fn units(&self) -> BTreeSet<&str> {
        let callers = self.strict.iter().flat_map(|strict| &strict.local).chain(&self.raw_callers);
        callers.filter_map(Caller::unit).collect()
    }
}

/// What is so at the moment on this host; changes with units starting and endpoints moving.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Where the cgroup of each running unit is.
    pub cgroups: BTreeMap<String, Cgroup>,
    /// Raw addresses of services whose capture is asked for.
    pub raw_addresses: BTreeSet<SocketAddr>,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn wanted() -> Wanted {
        Wanted {
            vip4: "240.240.0.0/16".parse().unwrap(),
            vip6: "fd6d:6573:6864::/64".parse().unwrap(),
            capture_port: 15001,
            table: 7471,
            mark: 0x004d_0000,
            mark_mask: 0x00ff_0000,
            daemon_uid: 998,
            strict: BTreeSet::new(),
            permissive: BTreeSet::new(),
            raw_callers: BTreeSet::new(),
        }
    }

    #[test]
    fn another_intent_has_another_hash() {
        let (one, mut other) = (wanted(), wanted());
        assert_eq!(one.hash(), wanted().hash());
        other.permissive.insert(8080);
        assert_ne!(one.hash(), other.hash());
    }
}
