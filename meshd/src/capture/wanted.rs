//! What the kernel is to do, as plain data: the same for every backend, comparable, and kept on disk so that
//! whoever reverts knows what was applied.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::HEXLOWER;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::enrol::{Cgroup, PortMemory, PortOwner, ScopePattern, find_cgroups, find_port_owners};

/// The operator's intent, out of meshd.toml and enrol.d. Nothing in it changes by itself.
///
/// Its JSON is hashed, and confirmations are by hash: a field that is added here or to `StrictPort` has
/// `#[serde(default, skip_serializing_if = ...)]` and is left out where it asks for nothing. An upgrade must not take
/// back plans that operators confirmed.
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
    /// Whose openings of connections rules must tell apart; only for a backend that needs to know.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub enrolled: BTreeSet<Caller>,
    /// Where connections seem to come from the peer's host: what answers there must come back to us.
    #[serde(default)]
    pub transparent: BTreeSet<SocketAddr>,
}

/// A port whose plaintext callers the kernel refuses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StrictPort {
    pub port: u16,
    /// Whose port it is.
    pub owner: Caller,
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
    /// A systemd unit: everything in its cgroup. With `*`, every scope of such a name.
    Unit(String),
    /// Whoever listens on this port.
    Port(u16),
}

/// A caller as the kernel can tell it at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Present<'a> {
    Uid(u32),
    Cgroup(&'a Cgroup),
}

impl Caller {
    fn unit(&self) -> Option<&str> {
        match self {
            Caller::Unit(unit) => Some(unit),
            Caller::Uid(_) | Caller::Port(_) => None,
        }
    }

    fn port(&self) -> Option<u16> {
        match self {
            Caller::Port(port) => Some(*port),
            Caller::Uid(_) | Caller::Unit(_) => None,
        }
    }

    /// As operators write it: `payments.service`, `uid:1001`, `port:8080`.
    pub fn label(&self) -> String {
        match self {
            Caller::Unit(unit) => unit.clone(),
            Caller::Uid(uid) => format!("uid:{uid}"),
            Caller::Port(port) => format!("port:{port}"),
        }
    }
}

impl Wanted {
    /// Short name of this intent: what an operator confirms. Whom rules merely tell apart does not matter.
    pub fn hash(&self) -> String {
        let confirmed = Wanted { enrolled: BTreeSet::new(), ..self.clone() };
        // JSON of ordered collections: the same on every build, unlike Rust's own hashing.
        let text = serde_json::to_vec(&confirmed).unwrap_or_default();
        let digest = digest(&SHA256, &text);
        HEXLOWER.encode(&digest.as_ref()[..8])
    }

    /// Mark of what answers a transparent delivery: another one than our own sockets', of the same bits.
    /// 0 where the mask has only one bit.
    pub fn answer_mark(&self) -> u32 {
        self.mark ^ (1 << self.mark_mask.trailing_zeros().min(31))
    }

    /// The value of our mark bits that says: captured at a raw address. Other than the one on our own sockets.
    pub fn raw_mark(&self) -> u32 {
        !self.mark & self.mark_mask
    }

    /// Permissive ports whose plaintext callers are counted. A port that is strict for somebody is strict.
    pub fn counted_ports(&self) -> BTreeSet<u16> {
        let is_strict = |port: &u16| self.strict.iter().any(|strict| strict.port == *port);
        self.permissive.iter().copied().filter(|port| !is_strict(port)).collect()
    }

    /// Every unit the rules must know the cgroup of.
    pub fn units(&self) -> BTreeSet<&str> {
        self.callers().filter_map(Caller::unit).collect()
    }

    /// Every port the rules must know the owner of.
    pub fn owned_ports(&self) -> BTreeSet<u16> {
        self.callers().filter_map(Caller::port).collect()
    }

    fn callers(&self) -> impl Iterator<Item = &Caller> {
        self.strict.iter().flat_map(|strict| &strict.local).chain(&self.raw_callers).chain(&self.enrolled)
    }
}

/// What is so at the moment on this host; changes with units starting and endpoints moving.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Where the cgroup of each running unit is.
    pub cgroups: BTreeMap<String, Cgroup>,
    /// Whose the ports are that stand for a caller.
    pub port_owners: BTreeMap<u16, PortOwner>,
    /// Raw addresses of services whose capture is asked for.
    pub raw_addresses: Arc<BTreeSet<SocketAddr>>,
}

impl Facts {
    /// What is so at this moment.
    pub fn find(wanted: &Wanted, memory: &PortMemory) -> Facts {
        let port_owners = find_port_owners(&wanted.owned_ports(), memory);
        let owning = port_owners.values().filter_map(|owner| match owner {
            PortOwner::Unit(unit) => Some(&**unit),
            PortOwner::Uid(_) => None,
        });
        let units = wanted.units().into_iter().chain(owning).collect();
        Facts { cgroups: find_cgroups(&units), port_owners, ..Facts::default() }
    }

    /// The processes a caller stands for; a unit that does not run has nobody to let in.
    pub fn present(&self, caller: &Caller) -> Vec<Present<'_>> {
        match caller {
            Caller::Uid(uid) => vec![Present::Uid(*uid)],
            Caller::Unit(name) => match ScopePattern::parse(name) {
                Ok(pattern) => {
                    let matching = self.cgroups.iter().filter(|(unit, _)| pattern.matches(unit));
                    matching.map(|(_, cgroup)| Present::Cgroup(cgroup)).collect()
                }
                Err(_) => self.cgroups.get(name).map(Present::Cgroup).into_iter().collect(),
            },
            Caller::Port(port) => match self.port_owners.get(port) {
                Some(PortOwner::Unit(unit)) => self.cgroups.get(&**unit).map(Present::Cgroup).into_iter().collect(),
                Some(PortOwner::Uid(uid)) => vec![Present::Uid(*uid)],
                None => Vec::new(),
            },
        }
    }
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
            enrolled: BTreeSet::new(),
            transparent: BTreeSet::new(),
        }
    }

    #[test]
    fn another_intent_has_another_hash() {
        let (one, mut other) = (wanted(), wanted());
        assert_eq!(one.hash(), wanted().hash());
        other.enrolled.insert(Caller::Uid(7));
        assert_eq!(one.hash(), other.hash());
        other.permissive.insert(8080);
        assert_ne!(one.hash(), other.hash());
    }

    #[test]
    fn a_plan_that_was_confirmed_stays_confirmed_after_an_upgrade() {
        let owner = Caller::Unit("payments.service".into());
        let strict = StrictPort {
            port: 8080,
            local: [owner.clone(), Caller::Uid(997), Caller::Port(9090)].into(),
            owner,
            plaintext_from: ["10.9.0.0/24".parse().unwrap()].into(),
        };
        let everything = Wanted {
            strict: [strict].into(),
            permissive: [2525].into(),
            raw_callers: [Caller::Uid(1001)].into(),
            transparent: ["127.0.0.1:8081".parse().unwrap()].into(),
            ..wanted()
        };
        let found = [wanted().hash(), everything.hash()];
        assert_eq!(
            found,
            ["9682173e6f5cf13c", "085019c85fe95e79"],
            "the same plan has another hash than in earlier releases, so every plan operators confirmed would be taken \
             back by the next `meshd intercept apply`. Give what you added to Wanted or StrictPort a default and \
             skip_serializing_if; do not rename, reorder or remove fields. Only if what is in force really changes for \
             everybody, pin the new hashes here and tell it in CHANGELOG.md"
        );
    }

    #[test]
    fn answers_carry_another_mark_than_our_own_sockets() {
        let wanted = wanted();
        assert_ne!(wanted.answer_mark(), wanted.mark);
        assert_eq!(wanted.answer_mark() & !wanted.mark_mask, 0);
        assert_eq!(Wanted { mark: 8, mark_mask: 8, ..wanted }.answer_mark(), 0);
    }

    #[test]
    fn callers_are_whoever_runs_under_their_name_or_holds_their_port() {
        let cgroup = |path: &str| Cgroup { nft_path: path.into(), path: path.into(), level: 1, id: 7 };
        let cgroups = ["docker-1.scope", "docker-2.scope", "db.service"].map(|unit| (unit.to_owned(), cgroup(unit)));
        let facts = Facts {
            cgroups: cgroups.into(),
            port_owners: [(5432, PortOwner::Unit("db.service".into())), (80, PortOwner::Uid(33))].into(),
            ..Facts::default()
        };
        let paths = |caller| {
            let present = facts.present(&caller);
            present.iter().map(|present| format!("{present:?}")).collect::<Vec<_>>().join(" ")
        };
        let scopes = paths(Caller::Unit("docker-*.scope".into()));
        assert!(scopes.contains("docker-1") && scopes.contains("docker-2") && !scopes.contains("db"), "{scopes}");
        assert!(paths(Caller::Port(5432)).contains("db.service"));
        assert_eq!(facts.present(&Caller::Port(80)), [Present::Uid(33)]);
        assert_eq!(facts.present(&Caller::Port(81)), []);
        assert_eq!(facts.present(&Caller::Unit("off.service".into())), []);
    }
}
