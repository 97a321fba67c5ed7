//! The whole fleet in a model: replicas that hand out what they last read, hosts that come when they like. Whatever
//! happens in whatever order, nobody who holds a valid leaf meets a valid leaf whose root it lacks.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::bridge::{Bridge, planned};
use super::decide::{Decision, Despite, Gate, Step, Surroundings, decide};
use super::{Root, RootState, Trust};
use crate::lifetimes::Lifetimes;
use crate::rotation::trust::Urgency;
use crate::store::hosts::{Host, HostState};
use crate::store::intermediates::Intermediate;
use crate::times::seconds;

const MINUTE: i64 = 60;
const HOUR: i64 = 3600;
const DAY: i64 = 86_400;
const START: i64 = 1_790_000_000;

struct Verifier {
    roots: BTreeSet<String>,
    leaf_root: String,
    leaf_end: i64,
    bridge: Option<Bridge>,
}

struct World {
    now: i64,
    lifetimes: Lifetimes,
    trust: Trust,
    /// What each replica last read.
    replicas: Vec<Trust>,
    intermediates: Vec<Intermediate>,
    records: Vec<Host>,
    hosts: Vec<Verifier>,
    made: u32,
    activations: u32,
    despite: Vec<Despite>,
    /// Roots whose keys the deny set has.
    denied: BTreeSet<String>,
}

impl World {
    fn new(replicas: usize, hosts: usize) -> World {
        let lifetimes = Lifetimes::default();
        let mut world = World {
            now: START,
            lifetimes,
            trust: Trust::default(),
            replicas: Vec::new(),
            intermediates: Vec::new(),
            records: Vec::new(),
            hosts: Vec::new(),
            made: 0,
            activations: 0,
            despite: Vec::new(),
            denied: BTreeSet::new(),
        };
        world.add_root();
        world.publish();
        world.trust.activate("r1", START);
        for replica in 0..replicas {
            world.replicas.push(world.trust.clone());
            world.refresh(replica);
        }
        for id in 0..hosts {
            world.records.push(record(id));
            world.hosts.push(Verifier { roots: BTreeSet::new(), leaf_root: String::new(), leaf_end: 0, bridge: None });
            world.renew(id, 0);
        }
        world
    }

    fn add_root(&mut self) {
        self.made += 1;
        self.trust.roots.push(Root {
            id: format!("r{}", self.made),
            state: RootState::Prepared,
            certificate: vec![],
            wrapped_key: vec![1],
            published_sequence: 0,
            published_at: self.now,
            activated_at: None,
            removed_at: None,
            tainted_at: None,
            upstream: None,
            bridge: None,
            not_after: self.now + seconds(self.lifetimes.root),
        });
    }

    fn publish(&mut self) {
        self.trust.sequence += 1;
        for root in self.trust.roots.iter_mut().filter(|root| root.published_sequence == 0) {
            root.published_sequence = self.trust.sequence;
        }
    }

    fn decide(&self) -> Decision {
        let world = Surroundings {
            hosts: &self.records,
            intermediates: &self.intermediates,
            lifetimes: &self.lifetimes,
            clock_is_good: true,
            now: self.now,
        };
        decide(&self.trust, &world)
    }

    /// One step of the leader.
    fn lead(&mut self) {
        let before: Vec<String> = self.trust.in_bundle().map(|root| root.id.clone()).collect();
        match self.decide().step {
            Some(Step::Prepare) => self.add_root(),
            Some(Step::Activate { root, despite }) => {
                let bridge = self.bridge_to(&root);
                self.trust.activate(&root, self.now);
                self.trust.roots.iter_mut().filter(|one| one.id == root).for_each(|one| one.bridge = bridge.clone());
                self.activations += 1;
                self.despite.extend(despite);
            }
            Some(Step::Speak { root }) => self.trust.speak(&root),
            Some(Step::Remove { root }) => {
                self.trust.remove(&root, self.now);
                let keys = self.trust.believed_on(seconds(self.lifetimes.skew), self.now);
                self.denied.extend(keys.map(|(left, _)| left.id.clone()).filter(|left| *left == root));
            }
            Some(Step::Retire { root }) => self.trust.retire(&root),
            None => {}
        }
        if before != self.trust.in_bundle().map(|root| root.id.clone()).collect::<Vec<_>>() {
            self.publish();
        }
        assert!(self.trust.roots.iter().filter(|root| root.state == RootState::Active).count() == 1);
        assert!((1..=5).contains(&self.trust.in_bundle().count()));
    }

    fn bridge_to(&self, root: &str) -> Option<Bridge> {
        let next = self.trust.roots.iter().find(|one| one.id == root)?;
        let (by, not_after) = planned(&self.trust, next, &self.lifetimes, self.now)?;
        Some(Bridge { by: by.id.clone(), certificate: vec![], not_after })
    }

    /// A replica reads what is stored, and makes a new intermediate when it is time.
    fn refresh(&mut self, replica: usize) {
        let trust = self.trust.clone();
        let (name, now) = (replica.to_string(), self.now);
        let root = trust.active().unwrap().id.clone();
        let every = seconds(self.lifetimes.intermediate_every);
        let current = self.intermediates.iter_mut().find(|one| one.replica == name && one.replaced_at.is_none());
        match current {
            Some(one) if one.root == root && now < one.activated_at + every => {
                if one.bundle_sequence != trust.sequence {
                    (one.bundle_sequence, one.joined_bundle_at) = (trust.sequence, now);
                }
            }
            other => {
                if let Some(old) = other {
                    old.replaced_at = Some(now);
                }
                self.intermediates.push(Intermediate {
                    id: format!("{name}-{now}"),
                    replica: name,
                    root,
                    certificate: vec![],
                    wrapped_key: vec![],
                    activated_at: now,
                    replaced_at: None,
                    not_after: now + seconds(self.lifetimes.intermediate),
                    longest_leaf_s: seconds(self.lifetimes.leaf),
                    bundle_sequence: trust.sequence,
                    joined_bundle_at: now,
                    from_outside: false,
                });
            }
        }
        self.intermediates.retain(|one| one.not_after > now - 30 * DAY);
        self.replicas[replica] = trust;
    }

    /// A host gets a leaf and the bundle that goes with it, both from one replica, and tells what it had before.
    fn renew(&mut self, host: usize, replica: usize) {
        let name = replica.to_string();
        let signing = self.intermediates.iter().rev().find(|one| one.replica == name && one.replaced_at.is_none());
        let Some(signing) = signing.filter(|one| one.not_after > self.now) else {
            return;
        };
        let trust = &self.replicas[replica];
        let verifier = &mut self.hosts[host];
        let record = &mut self.records[host];
        record.last_seen = self.now;
        if record.acked_sequence > trust.sequence {
            // A host never goes back to an older bundle, and then not to its leaf either.
            return;
        }
        verifier.roots = trust.in_bundle().map(|root| root.id.clone()).collect();
        verifier.leaf_root = signing.root.clone();
        verifier.leaf_end = (self.now + seconds(self.lifetimes.leaf)).min(signing.not_after);
        let bridge = trust.bridge_to(&signing.root).filter(|bridge| bridge.outlives(verifier.leaf_end));
        verifier.bridge = bridge.cloned();
        record.acked_sequence = trust.sequence;
        record.roots_in_use = vec![verifier.leaf_root.clone()];
    }

    fn check(&self) {
        let valid: Vec<&Verifier> = self.hosts.iter().filter(|host| host.leaf_end > self.now).collect();
        for (a, b) in valid.iter().flat_map(|a| valid.iter().map(move |b| (a, b))) {
            assert!(b.roots.contains(&a.leaf_root), "at day {}: {} unknown", (self.now - START) / DAY, a.leaf_root);
            assert!(!self.denied.contains(&a.leaf_root), "{} is denied under who is to be believed", a.leaf_root);
        }
        let left = self.trust.roots.iter().filter(|root| root.tainted_at.is_some() && !root.state.is_in_bundle());
        for (root, bridge) in left.filter_map(|root| Some((root, root.bridge.as_ref()?))) {
            let leads_there = self.now < bridge.not_after && self.known().contains(&bridge.by);
            assert!(!leads_there || self.denied.contains(&root.id), "a thief of the key of {} is believed", root.id);
        }
        for bridge in valid.iter().filter_map(|host| host.bridge.as_ref()) {
            // F16: what is served on must not end before what it is served with.
            assert!(self.now < bridge.not_after, "a valid leaf is shown with an ended bridge");
        }
    }

    /// Whether somebody who has these roots, and hears nothing more, believes every host.
    fn is_believed_with(&self, roots: &BTreeSet<String>) -> bool {
        let vouched = |host: &Verifier| host.bridge.as_ref().is_some_and(|bridge| roots.contains(&bridge.by));
        self.hosts.iter().all(|host| roots.contains(&host.leaf_root) || vouched(host))
    }

    fn known(&self) -> BTreeSet<String> {
        self.trust.in_bundle().map(|root| root.id.clone()).collect()
    }

    /// Everybody does what it should for a while.
    fn live(&mut self, days: i64) {
        self.live_but(days, |_| {});
    }

    /// Everybody does, but what is reported is changed afterwards.
    fn live_but(&mut self, days: i64, change: impl Fn(&mut [Host])) {
        for _ in 0..days * 4 {
            self.live_for(6 * HOUR, &change);
        }
    }

    fn live_for(&mut self, seconds: i64, change: impl Fn(&mut [Host])) {
        self.now += seconds;
        self.lead();
        (0..self.replicas.len()).for_each(|replica| self.refresh(replica));
        (0..self.hosts.len()).for_each(|host| self.renew(host, host % self.replicas.len()));
        self.check();
        change(&mut self.records);
    }

    /// Others may have the key of the root that signs.
    fn taint(&mut self) -> String {
        let active = self.trust.roots.iter_mut().find(|root| root.state == RootState::Active).unwrap();
        active.tainted_at = Some(self.now);
        self.trust.urgent = Some(Urgency { since: self.now, force: false });
        active.id.clone()
    }
}

fn record(id: usize) -> Host {
    Host {
        id: id.to_string(),
        state: HostState::Active,
        key_current: vec![],
        public_key: vec![],
        enrolled_key: vec![],
        next: None,
        enrolled_at: START,
        last_seen: START,
        acked_sequence: 0,
        clock_offset_ms: 0,
        labels: Default::default(),
        enrolled_by: String::new(),
        adopted_until: None,
        unrecorded_until: None,
        roots_in_use: vec![],
    }
}

#[derive(Debug, Clone)]
enum Happens {
    Time(i64),
    Lead,
    Refresh(usize),
    Renew(usize, usize),
    Urgent,
    Taint,
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        6 => prop_oneof![MINUTE..HOUR, HOUR..12 * HOUR, DAY..4 * DAY].prop_map(Happens::Time),
        8 => Just(Happens::Lead),
        6 => (0..3_usize).prop_map(Happens::Refresh),
        12 => (0..5_usize, 0..3_usize).prop_map(|(host, replica)| Happens::Renew(host, replica)),
        1 => Just(Happens::Urgent),
        1 => Just(Happens::Taint),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_verifier_ever_sees_a_leaf_whose_root_it_lacks(all in prop::collection::vec(happens(), 1..600)) {
        let mut world = World::new(3, 5);
        for one in all {
            match one {
                // Not so long that a root ends unattended: what is done then is done despite the proof.
                Happens::Time(seconds) => {
                    let active = world.trust.active().unwrap().not_after;
                    world.now = (world.now + seconds).min(active - 10 * DAY);
                }
                Happens::Lead => world.lead(),
                Happens::Refresh(replica) => world.refresh(replica),
                Happens::Renew(host, replica) => world.renew(host, replica),
                Happens::Urgent => world.trust.urgent = Some(Urgency { since: world.now, force: false }),
                Happens::Taint => _ = world.taint(),
            }
            world.check();
        }
        prop_assert!(world.despite.is_empty());
    }
}

#[test]
fn the_first_rotation_is_in_the_second_week_and_then_every_quarter() {
    let mut world = World::new(1, 3);
    world.live(6);
    assert_eq!(world.activations, 0);
    world.live(4);
    assert_eq!(world.activations, 1);
    world.live(80);
    assert_eq!(world.activations, 1);
    world.live(20);
    assert_eq!(world.activations, 2);
    world.live(5 * 365);
    assert!((20..=23).contains(&world.activations), "{}", world.activations);
    assert!(world.trust.roots.len() <= 8 + 3);
    assert!(world.despite.is_empty());
}

#[test]
fn who_misses_a_rotation_believes_everybody_for_a_month_more_and_who_misses_two_does_not() {
    let mut world = World::new(2, 4);
    world.live(6);
    for missed in [1, 2] {
        let known = world.known();
        while world.activations < missed {
            world.live(1);
            assert!(world.is_believed_with(&known));
        }
        for _ in 0..28 {
            world.live(1);
            assert!(world.is_believed_with(&known), "after rotation {missed}");
        }
        world.live(5);
        assert!(!world.is_believed_with(&known), "after rotation {missed}: the bridge has ended");
    }
}

#[test]
fn an_emergency_leaves_behind_who_is_not_told() {
    let mut world = World::new(1, 2);
    world.live(30);
    let known = world.known();
    world.trust.urgent = Some(Urgency { since: world.now, force: false });
    world.live(2);
    assert_eq!(world.activations, 2);
    assert!(!world.is_believed_with(&known));
}

#[test]
fn a_host_that_does_not_acknowledge_holds_the_rotation_and_one_that_is_gone_does_not() {
    let mut world = World::new(1, 3);
    world.live(6);
    let stuck = world.records[0].acked_sequence;
    // It is heard, but keeps what it has: a defect no proof can see.
    world.live_but(20, |records| records[0].acked_sequence = stuck);
    assert_eq!(world.activations, 0);
    let waiting = world.decide().waiting;
    assert!(waiting.iter().any(|(_, gates)| gates.contains(&Gate::Hosts(vec!["0".to_owned()]))), "{waiting:?}");
    world.records.remove(0);
    world.hosts.remove(0);
    world.live(2);
    assert_eq!(world.activations, 1);
}

#[test]
fn a_replica_that_does_not_read_holds_the_rotation() {
    let mut world = World::new(2, 2);
    world.live(6);
    for _ in 0..5 * 4 {
        world.now += 6 * HOUR;
        world.lead();
        world.refresh(0);
        world.renew(0, 0);
        world.renew(1, 0);
        world.check();
    }
    assert_eq!(world.activations, 0);
    let waiting = world.decide().waiting;
    assert!(waiting.iter().any(|(_, gates)| gates.contains(&Gate::Replicas(vec!["1".to_owned()]))), "{waiting:?}");
}

#[test]
fn an_old_root_stays_until_nobody_reports_it() {
    let mut world = World::new(1, 2);
    world.live(10);
    assert_eq!(world.activations, 1);
    world.live_but(60, |records| records[1].roots_in_use = vec!["r1".to_owned()]);
    assert_eq!(world.trust.roots[0].state, RootState::Old);
    world.live(2);
    assert_ne!(world.trust.roots[0].state, RootState::Old);
}

#[test]
fn a_tainted_root_is_replaced_and_gone_as_soon_as_every_host_has_moved() {
    let mut world = World::new(1, 3);
    world.live(30);
    let tainted = world.taint();
    world.live(2);
    assert!(!world.known().contains(&tainted));
    assert!(!world.known().contains("r1"), "nor is the one that vouched for it");
    assert!(world.denied.contains(&tainted));
}

#[test]
fn a_root_that_vouched_for_one_that_is_tainted_stays_for_its_leaves_alone() {
    let mut world = World::new(1, 3);
    while world.activations == 0 {
        world.live_for(6 * HOUR, |_| {});
    }
    let tainted = world.taint();
    while world.known().contains(&tainted) {
        world.live_for(HOUR, |_| {});
    }
    let waiting = world.decide().waiting;
    let last_leaves = |gates: &[Gate]| matches!(gates, [Gate::LastLeaves { until }] if *until <= world.now + DAY);
    assert!(waiting.iter().any(|(id, gates)| id.as_deref() == Some("r1") && last_leaves(gates)), "{waiting:?}");
    assert!(world.denied.contains(&tainted), "it is believed by whoever has the root that vouched");
    world.live(2);
    assert!(!world.known().contains("r1"));
}

#[test]
fn an_active_root_about_to_end_is_replaced_whoever_lags() {
    let mut world = World::new(1, 2);
    world.live(8);
    world.now = world.trust.active().unwrap().not_after - 8 * DAY;
    world.lead();
    assert_eq!(world.despite, [Despite::ActiveEnds]);
}
