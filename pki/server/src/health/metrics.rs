//! What Prometheus sees of the PKI's health. The number of series does not grow with the fleet: hosts are counted, and
//! only the worst few have a series of their own, and only while something is wrong with them.

use std::sync::atomic::AtomicU64;

use meshd_identity::Bundle;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::census::{Kind, LeafState, Own, own};
use super::{Health, clocks, rotation};
use crate::lifetimes::Lifetimes;
use crate::rotation::decide::next_rotation;
use crate::store::hosts::HostState;
use crate::store::servers::ServerCertificate;

/// Hosts with a series of their own, of each kind of trouble.
pub(crate) const WORST: usize = 10;

type Seconds = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Certificate {
    kind: String,
    id: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Renewal {
    pub(crate) kind: &'static str,
    pub(crate) result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Leaves {
    kind: &'static str,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfKind {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct InState {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Which {
    which: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfHost {
    host: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfDomain {
    trust_domain: String,
}

#[derive(Default)]
pub(crate) struct HealthMetrics {
    pub(crate) renewals: Family<Renewal, Counter>,
    not_after: Family<Certificate, Gauge>,
    leaves: Family<Leaves, Gauge>,
    leaves_earliest: Family<OfKind, Gauge>,
    hosts: Family<InState, Gauge>,
    hosts_overdue: Gauge,
    host_not_after: Family<OfHost, Gauge>,
    hosts_behind: Gauge,
    blocked: Family<Reason, Gauge>,
    rotation_due: Gauge,
    roots: Gauge,
    clock_offset: Family<Which, Seconds>,
    host_clock_offset: Family<OfHost, Seconds>,
    clone_alarms: Gauge,
    looked_at: Gauge,
    pub(crate) web_certificate_refused: Gauge,
    federation_good: Family<OfDomain, Gauge>,
    federation_due: Family<OfDomain, Gauge>,
    federation_roots: Family<OfDomain, Gauge>,
}

impl HealthMetrics {
    pub(crate) fn register(registry: &mut Registry) -> HealthMetrics {
        let m = HealthMetrics::default();
        registry.register("renewals", "Certificates asked for, by whose they are and the result", m.renewals.clone());
        let text = "Unix time at which a certificate or JWT key of the PKI itself ends";
        registry.register("certificate_not_after_seconds", text, m.not_after.clone());
        let text = "Newest certificates of hosts and workloads; overdue is past half of the life";
        registry.register("leaves", text, m.leaves.clone());
        let text = "Unix time at which the first certificate ends of those that have not";
        registry.register("leaves_earliest_not_after_seconds", text, m.leaves_earliest.clone());
        registry.register("hosts", "Enrolled hosts", m.hosts.clone());
        let text = "Hosts past half of their certificate's life that have not renewed";
        registry.register("hosts_overdue", text, m.hosts_overdue.clone());
        let text = "Unix time at which the certificate ends of the hosts longest overdue, at most 10";
        registry.register("host_not_after_seconds", text, m.host_not_after.clone());
        let text = "Hosts heard in 10 minutes that have not acknowledged the bundle in force";
        registry.register("hosts_behind_bundle", text, m.hosts_behind.clone());
        let text = "1 while the rotation of roots is held up by what time alone does not cure";
        registry.register("rotation_blocked", text, m.blocked.clone());
        let text = "Unix time at which the calendar wants the next root";
        registry.register("rotation_due_timestamp_seconds", text, m.rotation_due.clone());
        registry.register("bundle_roots", "Roots in the bundle", m.roots.clone());
        let text = "Clocks of hosts heard in 10 minutes, ahead of this one";
        registry.register("clock_offset_seconds", text, m.clock_offset.clone());
        let text = "Clocks of the hosts furthest off, at most 10, from 60 s on";
        registry.register("host_clock_offset_seconds", text, m.host_clock_offset.clone());
        let text = "Hosts whose key two machines use, until they enrol anew or are banned";
        registry.register("clone_alarms", text, m.clone_alarms.clone());
        let text = "Unix time of the last look at all this";
        registry.register("health_timestamp_seconds", text, m.looked_at.clone());
        let text = "1 while the files of --bundle-cert cannot be used and the last ones stay";
        registry.register("web_certificate_refused", text, m.web_certificate_refused.clone());
        let text = "Unix time at which the bundle of a federated domain was last fetched and found good";
        registry.register("federation_last_good_timestamp_seconds", text, m.federation_good.clone());
        let text = "Unix time at which it is asked for next";
        registry.register("federation_next_timestamp_seconds", text, m.federation_due.clone());
        registry.register("federation_roots", "Roots in the bundle held of it", m.federation_roots.clone());
        // Counters that alerts ask for must be there before the first event.
        for kind in Kind::ALL {
            for result in ["ok", "refused"] {
                _ = m.renewals.get_or_create(&Renewal { kind: kind.name(), result });
            }
        }
        m
    }

    pub(crate) fn show(&self, health: &Health, servers: &[ServerCertificate], lifetimes: &Lifetimes) {
        let mut own = own(health);
        // The end of a root that nobody trusts any more is of no interest.
        own.retain(|one| one.kind != "root" || health.trust.in_bundle().any(|root| root.id == one.id));
        self.show_certificates(&own, servers);
        self.show_leaves(health);
        self.show_hosts(health);
        self.show_clocks(health);
        let blocks = health.blocks();
        for reason in rotation::REASONS {
            let is_blocked = blocks.iter().any(|block| block.reason == reason);
            self.blocked.get_or_create(&Reason { reason }).set(i64::from(is_blocked));
        }
        self.roots.set(count(health.trust.in_bundle().count()));
        if let Some(active) = health.trust.active() {
            self.rotation_due.set(next_rotation(&health.trust, active, lifetimes));
        }
        self.show_federation(health);
        self.clone_alarms.set(count(health.clones.len()));
        self.looked_at.set(health.now);
    }

    fn show_certificates(&self, own: &[Own], servers: &[ServerCertificate]) {
        self.not_after.clear();
        let own = own.iter().map(|one| (one.kind, &one.id, one.state, one.not_after));
        let servers = servers.iter().map(|one| (one.kind.as_str(), &one.serial, "active", one.not_after));
        for (kind, id, state, not_after) in own.chain(servers) {
            let labels = Certificate { kind: kind.to_owned(), id: id.clone(), state };
            self.not_after.get_or_create(&labels).set(not_after);
        }
    }

    fn show_leaves(&self, health: &Health) {
        self.leaves_earliest.clear();
        for kind in Kind::ALL {
            let of_kind = || health.leaves.iter().filter(move |held| held.kind == kind);
            for state in LeafState::ALL {
                let number = of_kind().filter(|held| held.state == state).count();
                let labels = Leaves { kind: kind.name(), state: state.name() };
                self.leaves.get_or_create(&labels).set(count(number));
            }
            // They are in the order of their ends.
            if let Some(first) = of_kind().find(|held| held.state != LeafState::Ended) {
                self.leaves_earliest.get_or_create(&OfKind { kind: kind.name() }).set(first.leaf.not_after);
            }
        }
    }

    fn show_hosts(&self, health: &Health) {
        for (state, name) in
            [HostState::Active, HostState::Evicted, HostState::Banned].map(|state| (state, state.name()))
        {
            let number = health.hosts.iter().filter(|host| host.state == state).count();
            self.hosts.get_or_create(&InState { state: name }).set(count(number));
        }
        let overdue = health.overdue();
        self.hosts_overdue.set(count(overdue.len()));
        self.host_not_after.clear();
        for held in overdue.into_iter().take(WORST) {
            let labels = OfHost { host: held.host.clone() };
            self.host_not_after.get_or_create(&labels).set(held.leaf.not_after);
        }
        let since = health.now - clocks::HEARD_LATELY_S;
        let heard = health.hosts.iter().filter(|host| host.state == HostState::Active && host.last_seen >= since);
        let behind = heard.filter(|host| host.acked_sequence < health.trust.sequence);
        self.hosts_behind.set(count(behind.count()));
    }

    fn show_federation(&self, health: &Health) {
        for family in [&self.federation_good, &self.federation_due, &self.federation_roots] {
            family.clear();
        }
        for one in &health.federation {
            let domain = &one.relationship.trust_domain;
            let labels = OfDomain { trust_domain: domain.to_string() };
            self.federation_good.get_or_create(&labels).set(one.polled.last_good_at);
            self.federation_due.get_or_create(&labels).set(one.polled.next_at);
            let bundle =
                one.held.as_ref().and_then(|held| Bundle::from_jwks(domain.clone(), held.jwks.as_bytes()).ok());
            self.federation_roots.get_or_create(&labels).set(count(bundle.map_or(0, |bundle| bundle.roots.len())));
        }
    }

    fn show_clocks(&self, health: &Health) {
        self.clock_offset.clear();
        if let Some(spread) = clocks::spread(&health.hosts, health.now) {
            let which = [("lowest", spread.lowest_ms), ("median", spread.median_ms), ("highest", spread.highest_ms)];
            for (which, offset_ms) in which {
                self.clock_offset.get_or_create(&Which { which }).set(seconds(offset_ms));
            }
        }
        self.host_clock_offset.clear();
        for host in clocks::far_off(&health.hosts, health.now).into_iter().take(WORST) {
            let labels = OfHost { host: host.id.clone() };
            self.host_clock_offset.get_or_create(&labels).set(seconds(host.clock_offset_ms));
        }
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn seconds(milliseconds: i64) -> f64 {
    milliseconds as f64 / 1000.0
}
