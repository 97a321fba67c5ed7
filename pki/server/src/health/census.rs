//! Certificates in use by hosts and workloads, as far as they were issued here.

use super::Health;
use crate::store::hosts::{Host, HostState, KEEP_ENDED_S};
use crate::store::leaves::{Leaf, Leaves};

/// A certificate or key of the PKI itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Own {
    pub(crate) kind: &'static str,
    pub(crate) id: String,
    pub(crate) state: &'static str,
    /// The authority above it.
    pub(crate) parent: Option<String>,
    pub(crate) not_after: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) host: String,
    pub(crate) spiffe_id: String,
    pub(crate) kind: Kind,
    pub(crate) state: LeafState,
    pub(crate) leaf: Leaf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Host,
    Workload,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LeafState {
    Fresh,
    /// Past half of its life. Renewal is due before 45 %, so the host tries in vain, is off, or has no use for it.
    Overdue,
    Ended,
}

impl Kind {
    pub(crate) const ALL: [Kind; 2] = [Kind::Host, Kind::Workload];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Host => "host",
            Kind::Workload => "workload",
        }
    }
}

impl LeafState {
    pub(crate) const ALL: [LeafState; 3] = [LeafState::Fresh, LeafState::Overdue, LeafState::Ended];

    pub(crate) fn name(self) -> &'static str {
        match self {
            LeafState::Fresh => "fresh",
            LeafState::Overdue => "overdue",
            LeafState::Ended => "ended",
        }
    }

    fn of(leaf: &Leaf, now: i64) -> LeafState {
        let half = leaf.issued_at + (leaf.not_after - leaf.issued_at) / 2;
        match now {
            now if now >= leaf.not_after => LeafState::Ended,
            now if now >= half => LeafState::Overdue,
            _ => LeafState::Fresh,
        }
    }
}

/// The earliest end first. Those of hosts that may hold nothing any more are nobody's worry.
pub(crate) fn leaves(of_hosts: Vec<(String, Leaves)>, hosts: &[Host], now: i64) -> Vec<Held> {
    let active: std::collections::BTreeSet<&str> =
        hosts.iter().filter(|host| host.state == HostState::Active).map(|host| host.id.as_str()).collect();
    let mut held: Vec<Held> = of_hosts
        .into_iter()
        .filter(|(host, _)| active.contains(host.as_str()))
        .flat_map(|(host, leaves)| leaves.into_iter().map(move |(spiffe_id, leaf)| held(&host, spiffe_id, leaf, now)))
        .collect();
    // A host that is gone is no alarm for ever.
    held.retain(|held| held.leaf.not_after > now - KEEP_ENDED_S);
    held.sort_by(|a, b| a.leaf.not_after.cmp(&b.leaf.not_after).then_with(|| a.spiffe_id.cmp(&b.spiffe_id)));
    held
}

fn held(host: &str, spiffe_id: String, leaf: Leaf, now: i64) -> Held {
    let is_system = spiffe_id.contains("/ns/meshd-system/");
    let kind = if is_system { Kind::Host } else { Kind::Workload };
    Held { host: host.to_owned(), kind, state: LeafState::of(&leaf, now), spiffe_id, leaf }
}

/// Hosts that should have renewed. A workload's certificate ends by itself when nobody wants it any more; a host's does
/// not while the host runs.
pub(crate) fn overdue_hosts(leaves: &[Held]) -> Vec<&Held> {
    leaves.iter().filter(|held| held.kind == Kind::Host && held.state != LeafState::Fresh).collect()
}

/// Roots first, each state as it is; then what they signed, then JWT keys. What has ended is of no use to anybody.
pub(crate) fn own(health: &Health) -> Vec<Own> {
    let Health { trust, intermediates, bridged, now, .. } = health;
    let now = *now;
    let roots = trust.roots.iter().map(|root| Own {
        kind: "root",
        id: root.id.clone(),
        state: root.state.name(),
        parent: None,
        not_after: root.not_after,
    });
    let below = intermediates.iter().map(|one| Own {
        kind: "intermediate",
        id: one.id.clone(),
        state: if one.replaced_at.is_none() { "active" } else { "old" },
        parent: Some(one.root.clone()),
        not_after: one.not_after,
    });
    let bridges = trust.roots.iter().filter_map(|root| Some((root, root.bridge.as_ref()?)));
    let bridges = bridges.map(|(root, bridge)| Own {
        kind: "bridge",
        id: root.id.clone(),
        state: if bridged.contains(&root.id) { "active" } else { "old" },
        parent: Some(bridge.by.clone()),
        not_after: bridge.not_after,
    });
    let signs = trust.jwt_signer(now).map(|key| key.kid.as_str());
    let keys = trust.jwt_keys.iter().map(|key| Own {
        kind: "jwt_key",
        id: key.kid.clone(),
        state: match () {
            () if signs == Some(&key.kid) => "active",
            () if key.usable_at > now => "prepared",
            () => "old",
        },
        parent: None,
        not_after: key.not_after,
    });
    let kept = |one: &Own| one.not_after > now || (one.state == "active" && one.kind != "bridge");
    roots.chain(below).chain(bridges).chain(keys).filter(kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(issued_at: i64, not_after: i64) -> Leaf {
        Leaf { serial: "1".to_owned(), authority: "a".to_owned(), issued_at, not_after }
    }

    #[test]
    fn a_leaf_is_overdue_past_half_of_its_life() {
        let states = [0, 499, 500, 999, 1000].map(|now| LeafState::of(&leaf(0, 1000), now));
        use LeafState::{Ended, Fresh, Overdue};
        assert_eq!(states, [Fresh, Fresh, Overdue, Overdue, Ended]);
    }
}
