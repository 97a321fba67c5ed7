//! WHICH endpoint: power of two choices by peak-EWMA cost (as Linkerd and Finagle do). Pure; takes `now`.
//!
//! Considered are the healthy endpoints of the first source of which any works, as far away as needed (`locality`); and
//! all there are when none works, for nothing is as sure to fail as no endpoint at all.
//!
//! The cost of an endpoint is the recent peak of its time from CONNECT to 200, times the streams in
//! flight on it + 1, divided by its weight. A failed dial counts as the connect timeout. Such a penalty
//! takes a minute to decay below what a healthy endpoint costs, so whoever probes a failed endpoint
//! (`probe`) clears it as soon as the endpoint answers.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use meshd_discovery::{Endpoint, Health, Service};

use super::locality::{Distance, Locality, Reach, Weights};

/// How fast a peak is forgotten (Linkerd's default for its peak-EWMA).
const DECAY: Duration = Duration::from_secs(10);
/// Cost of an endpoint nobody has tried, unless a sibling is cheaper: a LAN connect, in seconds.
const UNTRIED: f64 = 1e-3;
/// Failed endpoints are probed after this, then after twice as long, up to the limit.
const PROBE_FIRST: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(30);
/// Choices compared per pick.
const CHOICES: usize = 2;

/// The endpoints of one service port on one worker, with what connecting to them cost.
#[derive(Debug, Default)]
pub(super) struct Balancer {
    members: RefCell<Vec<Rc<Member>>>,
    service: RefCell<Option<Arc<Service>>>,
    reach: Reach,
    /// Any endpoint is nearer than others may be: without a zone none is, and each pick is spared the look.
    has_near: Cell<bool>,
    /// Since that was asked last.
    used: Cell<bool>,
}

#[derive(Debug)]
struct Member {
    endpoint: Arc<Endpoint>,
    distance: Distance,
    cost: Cell<Option<Peak>>,
    in_flight: Cell<u32>,
    /// Failures since the last success.
    failures: Cell<u32>,
    probed: Cell<bool>,
}

impl Member {
    fn new(endpoint: &Arc<Endpoint>, locality: &Locality) -> Member {
        Member {
            endpoint: endpoint.clone(),
            distance: locality.distance(endpoint),
            cost: Cell::default(),
            in_flight: Cell::default(),
            failures: Cell::default(),
            probed: Cell::default(),
        }
    }
}

/// An exponentially weighted moving average that jumps to peaks and decays from them.
#[derive(Clone, Copy, Debug)]
struct Peak {
    seconds: f64,
    at: Instant,
}

impl Peak {
    fn at(self, now: Instant) -> f64 {
        self.seconds * decay(now.saturating_duration_since(self.at))
    }

    fn observe(previous: Option<Peak>, sample: f64, now: Instant) -> Peak {
        let Some(previous) = previous else { return Peak { seconds: sample, at: now } };
        let seconds = if sample >= previous.seconds {
            sample
        } else {
            let old = decay(now.saturating_duration_since(previous.at));
            previous.seconds * old + sample * (1.0 - old)
        };
        Peak { seconds, at: now }
    }
}

fn decay(elapsed: Duration) -> f64 {
    (-elapsed.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

/// One endpoint to try; counts as in flight until dropped.
#[derive(Debug)]
pub(super) struct Candidate(Rc<Member>);

impl Candidate {
    pub(super) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0.endpoint
    }

    /// It answered after `elapsed`.
    pub(super) fn answered(&self, elapsed: Duration, now: Instant) {
        self.0.failures.set(0);
        self.observe(elapsed, now);
    }

    /// It failed, which costs as much as `timeout`. Who gets a `Failed` must probe it; None: somebody does.
    pub(super) fn failed(&self, timeout: Duration, now: Instant) -> Option<Failed> {
        self.0.failures.set(self.0.failures.get() + 1);
        self.observe(timeout, now);
        (!self.0.probed.replace(true)).then(|| Failed(Rc::downgrade(&self.0)))
    }

    fn observe(&self, elapsed: Duration, now: Instant) {
        self.0.cost.set(Some(Peak::observe(self.0.cost.get(), elapsed.as_secs_f64(), now)));
    }
}

/// An endpoint that failed, for as long as the balancer has it.
pub(super) struct Failed(Weak<Member>);

impl Failed {
    /// How long to wait before the next probe; None: the endpoint is gone.
    pub(super) fn pause(&self) -> Option<Duration> {
        let doublings = self.0.upgrade()?.failures.get().saturating_sub(1).min(5);
        Some((PROBE_FIRST * 2u32.pow(doublings)).min(PROBE_MAX))
    }

    pub(super) fn endpoint(&self) -> Option<Arc<Endpoint>> {
        Some(self.0.upgrade()?.endpoint.clone())
    }

    /// A probe failed as well.
    pub(super) fn still_failing(&self) {
        if let Some(member) = self.0.upgrade() {
            member.failures.set(member.failures.get() + 1);
        }
    }

    /// The endpoint answers again: its penalty goes, but not its record of failures, which only a
    /// connection to the application clears.
    pub(super) fn recovered(self) {
        if let Some(member) = self.0.upgrade() {
            member.cost.set(None);
            member.probed.set(false);
        }
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
    }
}

/// The candidates of one connection, best first, each at most once.
pub(super) struct Candidates<'a> {
    balancer: &'a Balancer,
    tried: Vec<Rc<Member>>,
}

impl Balancer {
    /// Takes over the endpoints of `service`; those that stay keep their costs.
    pub(super) fn update(&self, service: &Arc<Service>, port: u16, locality: &Locality) {
        if self.service.borrow().as_ref().is_some_and(|current| Arc::ptr_eq(current, service)) {
            return;
        }
        let mut members = self.members.borrow_mut();
        let updated = service
            .endpoints_on(port)
            .map(|endpoint| match members.iter().find(|member| same_place(&member.endpoint, endpoint)) {
                Some(known) if known.endpoint == *endpoint => known.clone(),
                Some(known) => {
                    let member = Member::new(endpoint, locality);
                    // A changed record deserves a try where the old one had failed.
                    member.cost.set(known.cost.get().filter(|_| !known.probed.get()));
                    Rc::new(member)
                }
                None => Rc::new(Member::new(endpoint, locality)),
            })
            .collect();
        *members = updated;
        self.has_near.set(members.iter().any(|member| member.distance != Distance::Elsewhere));
        *self.service.borrow_mut() = Some(service.clone());
    }

    pub(super) fn candidates(&self) -> Candidates<'_> {
        self.used.set(true);
        Candidates { balancer: self, tried: Vec::new() }
    }

    /// Whether it had connections since this was asked last.
    pub(super) fn take_used(&self) -> bool {
        self.used.replace(false) || self.members.borrow().iter().any(|member| member.in_flight.get() > 0)
    }

    fn pick(&self, tried: &[Rc<Member>], now: Instant, draw: &mut impl FnMut(usize) -> usize) -> Option<Rc<Member>> {
        let members = self.members.borrow();
        let untried = |member: &&Rc<Member>| !tried.iter().any(|other| Rc::ptr_eq(other, member));
        let mut left: Vec<&Rc<Member>> = members.iter().filter(|member| member.takes_any()).filter(untried).collect();
        let works = |member: &&&Rc<Member>| member.works();
        if let Some(first) = left.iter().filter(works).map(|member| member.endpoint.rank).min() {
            left.retain(|member| member.is_healthy() && member.endpoint.rank == first);
            if self.has_near.get() {
                self.keep_near(&members, &mut left, first, now);
            }
        }
        let fallback = Balancer::untried_cost(&members, now);
        let mut best: Option<(f64, &Rc<Member>)> = None;
        for _ in 0..CHOICES.min(left.len()) {
            let member = left.swap_remove(draw(left.len()));
            let load = member.load(fallback, now);
            if best.is_none_or(|(lowest, _)| load < lowest) {
                best = Some((load, member));
            }
        }
        best.map(|(_, member)| member.clone())
    }

    /// Those no farther away than needed, of the healthy ones of one source.
    fn keep_near(&self, members: &[Rc<Member>], left: &mut Vec<&Rc<Member>>, rank: u8, now: Instant) {
        let working = left.iter().filter(|member| member.works());
        let nearest = working.map(|member| member.distance).min().unwrap_or_default();
        let farthest = self.look(members, rank, now).max(nearest);
        left.retain(|member| member.distance <= farthest);
    }

    fn look(&self, members: &[Rc<Member>], rank: u8, now: Instant) -> Distance {
        let (mut all, mut working) = (Weights::default(), Weights::default());
        for member in members.iter().filter(|member| member.endpoint.rank == rank) {
            all.add(member.distance, member.endpoint.weight);
            if member.works() {
                working.add(member.distance, member.endpoint.weight);
            }
        }
        self.reach.look(all, working, now)
    }

    /// What an untried endpoint is taken to cost: as much as its cheapest sibling, so that it is neither
    /// flooded nor starved, and never as much as one that only failed.
    fn untried_cost(members: &[Rc<Member>], now: Instant) -> f64 {
        let known = members.iter().filter_map(|member| Some(member.cost.get()?.at(now)));
        known.fold(UNTRIED, f64::min)
    }
}

/// The same application at the same address, whatever else its record says.
fn same_place(a: &Endpoint, b: &Endpoint) -> bool {
    a.dial == b.dial && a.identity == b.identity && a.target == b.target
}

impl Member {
    /// Weight 0 is how an operator, or a host that leaves, takes an endpoint out.
    fn takes_any(&self) -> bool {
        self.endpoint.weight > 0
    }

    fn is_healthy(&self) -> bool {
        self.endpoint.health != Health::Unhealthy
    }

    fn works(&self) -> bool {
        self.takes_any() && self.is_healthy() && !self.probed.get()
    }

    fn load(&self, fallback: f64, now: Instant) -> f64 {
        let cost = self.cost.get().map_or(fallback, |peak| peak.at(now));
        cost * f64::from(self.in_flight.get() + 1) * 100.0 / f64::from(self.endpoint.weight)
    }
}

impl Candidates<'_> {
    pub(super) fn next(&mut self, now: Instant) -> Option<Candidate> {
        let member = self.balancer.pick(&self.tried, now, &mut |bound| fastrand::usize(..bound))?;
        member.in_flight.set(member.in_flight.get() + 1);
        self.tried.push(member.clone());
        Some(Candidate(member))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use meshd_discovery::{HostConfig, Transport};
    use proptest::prelude::*;

    fn endpoint(n: u8, weight: u32) -> Arc<Endpoint> {
        Arc::new(Endpoint { weight, ..endpoint_at(&format!("10.0.0.{n}")) })
    }

    pub(in crate::proxy) fn endpoint_at(address: &str) -> Endpoint {
        Endpoint {
            service: "payments.shop".parse().unwrap(),
            port: 80,
            dial: format!("{address}:15008").parse().unwrap(),
            target: format!("{address}:80").parse().unwrap(),
            transport: Transport::Meshd,
            identity: "spiffe://mesh.example/ns/shop/sa/payments".parse().unwrap(),
            network: "".into(),
            zone: "".into(),
            weight: 100,
            health: Health::Healthy,
            source: "test".into(),
            rank: 0,
            by_authority: true,
            stale: false,
            epoch: 0,
        }
    }

    #[test]
    fn endpoints_of_a_later_source_are_used_only_when_those_of_the_first_fail() {
        let balancer = Balancer::default();
        let later = Arc::new(Endpoint { rank: 1, ..(*endpoint(2, 100)).clone() });
        balancer.update(&service(vec![endpoint(1, 100), later]), 80, &Locality::default());
        let now = Instant::now();
        let pick = |tried: &[Rc<Member>]| balancer.pick(tried, now, &mut |bound| bound - 1).unwrap();
        let first = pick(&[]);
        assert_eq!(first.endpoint.rank, 0);
        assert_eq!(pick(std::slice::from_ref(&first)).endpoint.rank, 1);
        first.probed.set(true);
        assert_eq!(pick(&[]).endpoint.rank, 1);
        for member in balancer.members.borrow().iter() {
            member.probed.set(true);
        }
        // All failed: none is left out.
        pick(&[pick(&[])]);
    }

    #[test]
    fn endpoints_near_by_are_used_alone_and_those_farther_away_when_too_few_of_them_work() {
        let in_zone = |n: u8, zone: &str| Arc::new(Endpoint { zone: zone.into(), ..(*endpoint(n, 100)).clone() });
        let (balancer, now) = (Balancer::default(), Instant::now());
        let site_zones = vec!["b".to_owned()];
        let here = Locality::of(&HostConfig { zone: "a".to_owned(), site_zones, ..HostConfig::default() }).unwrap();
        balancer.update(&service(vec![in_zone(1, "a"), in_zone(2, "b"), in_zone(3, "c")]), 80, &here);
        let pick = |tried: &[Rc<Member>]| balancer.pick(tried, now, &mut |bound| bound - 1).unwrap();
        let near = pick(&[]);
        assert_eq!(&*near.endpoint.zone, "a");
        let next = pick(std::slice::from_ref(&near));
        assert_eq!(&*next.endpoint.zone, "b", "a connection is tried elsewhere before it fails");
        near.probed.set(true);
        near.cost.set(Some(Peak { seconds: 1.0, at: now }));
        assert_eq!(&*pick(&[]).endpoint.zone, "b");
    }

    #[test]
    fn unhealthy_endpoints_are_used_when_there_is_nothing_else() {
        let unhealthy = |n: u8| Arc::new(Endpoint { health: Health::Unhealthy, ..(*endpoint(n, 100)).clone() });
        let (balancer, now) = (Balancer::default(), Instant::now());
        balancer.update(&service(vec![unhealthy(1), endpoint(2, 100)]), 80, &Locality::default());
        assert_eq!(all_in_order(&balancer, now)[0].endpoint().health, Health::Healthy);
        balancer.update(&service(vec![unhealthy(1), unhealthy(2), endpoint(3, 0)]), 80, &Locality::default());
        let offered = all_in_order(&balancer, now);
        assert_eq!(offered.len(), 2, "all of them, and not the one that was taken out");
    }

    fn service(endpoints: Vec<Arc<Endpoint>>) -> Arc<Service> {
        Arc::new(Service {
            name: "payments.shop".parse().unwrap(),
            ports: vec![],
            identities: vec![],
            allow_plaintext: false,
            addresses: vec![],
            source: "test".into(),
            endpoints,
        })
    }

    fn balancer(weights: &[u32]) -> Balancer {
        let balancer = Balancer::default();
        balancer.update(
            &service((1..).zip(weights).map(|(n, weight)| endpoint(n, *weight)).collect()),
            80,
            &Locality::default(),
        );
        balancer
    }

    fn all_in_order(balancer: &Balancer, now: Instant) -> Vec<Candidate> {
        let mut candidates = balancer.candidates();
        std::iter::from_fn(|| candidates.next(now)).collect()
    }

    #[test]
    fn the_cheaper_of_two_comes_first() {
        let balancer = balancer(&[100, 100]);
        let now = Instant::now();
        let both = all_in_order(&balancer, now);
        both[0].answered(Duration::from_millis(1), now);
        both[1].answered(Duration::from_millis(50), now);
        let cheap = both[0].endpoint().clone();
        drop(both);
        for _ in 0..20 {
            assert_eq!(all_in_order(&balancer, now)[0].endpoint(), &cheap);
        }
    }

    #[test]
    fn a_failed_endpoint_is_avoided_and_returns_as_its_peak_decays() {
        let balancer = balancer(&[100, 100]);
        let start = Instant::now();
        let both = all_in_order(&balancer, start);
        both[0].failed(Duration::from_secs(1), start);
        let failed = both[0].endpoint().clone();
        drop(both);
        let later = start + Duration::from_secs(100);
        let other = all_in_order(&balancer, start).remove(0);
        assert_ne!(other.endpoint(), &failed);
        other.answered(Duration::from_millis(1), later);
        drop(other);
        assert_eq!(all_in_order(&balancer, later)[0].endpoint(), &failed);
    }

    #[test]
    fn a_probe_brings_a_failed_endpoint_back_at_once() {
        let balancer = balancer(&[100, 100]);
        let now = Instant::now();
        let both = all_in_order(&balancer, now);
        let failed = both[0].failed(Duration::from_secs(1), now).unwrap();
        assert!(both[0].failed(Duration::from_secs(1), now).is_none(), "one prober is enough");
        both[1].answered(Duration::from_millis(1), now);
        let away = both[0].endpoint().clone();
        drop(both);
        assert_ne!(all_in_order(&balancer, now)[0].endpoint(), &away);
        failed.recovered();
        let busy = all_in_order(&balancer, now).into_iter().find(|candidate| candidate.endpoint() != &away);
        assert_eq!(all_in_order(&balancer, now)[0].endpoint(), &away);
        drop(busy);
    }

    #[test]
    fn probes_back_off_and_end_with_the_endpoint() {
        let balancer = balancer(&[100]);
        let candidate = balancer.candidates().next(Instant::now()).unwrap();
        let failed = candidate.failed(Duration::from_secs(1), Instant::now()).unwrap();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            pauses.push(failed.pause().unwrap().as_secs());
            failed.still_failing();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        drop(candidate);
        balancer.update(&service(vec![]), 80, &Locality::default());
        assert!(failed.pause().is_none() && failed.endpoint().is_none());
    }

    #[test]
    fn streams_in_flight_spread_the_load() {
        let balancer = balancer(&[100, 100]);
        let now = Instant::now();
        let mut held = Vec::new();
        for _ in 0..10 {
            held.push(balancer.candidates().next(now).unwrap());
        }
        let first = held.iter().filter(|candidate| candidate.endpoint().dial.ip().to_string() == "10.0.0.1").count();
        assert_eq!(first, 5);
    }

    #[test]
    fn weight_zero_is_never_chosen() {
        let balancer = balancer(&[0, 100]);
        let chosen = all_in_order(&balancer, Instant::now());
        assert_eq!(chosen.len(), 1);
        assert_eq!(chosen[0].endpoint().weight, 100);
    }

    #[test]
    fn endpoints_that_stay_keep_their_cost() {
        let balancer = balancer(&[100, 100]);
        let now = Instant::now();
        for candidate in all_in_order(&balancer, now) {
            let slow = candidate.endpoint().dial.ip().to_string() == "10.0.0.1";
            candidate.answered(Duration::from_millis(if slow { 500 } else { 1 }), now);
        }
        balancer.update(&service(vec![endpoint(1, 100), endpoint(2, 100)]), 80, &Locality::default());
        assert_eq!(all_in_order(&balancer, now)[0].endpoint().dial.ip().to_string(), "10.0.0.2");
    }

    proptest! {
        #[test]
        fn every_usable_endpoint_is_offered_exactly_once(weights in proptest::collection::vec(0u32..200, 0..12)) {
            let balancer = balancer(&weights);
            let offered = all_in_order(&balancer, Instant::now());
            let mut addresses: Vec<_> = offered.iter().map(|candidate| candidate.endpoint().dial).collect();
            addresses.sort();
            addresses.dedup();
            prop_assert_eq!(addresses.len(), offered.len());
            prop_assert_eq!(offered.len(), weights.iter().filter(|weight| **weight > 0).count());
        }

        #[test]
        fn costs_stay_finite_and_never_exceed_the_highest_sample(samples in proptest::collection::vec((0.0f64..5.0, 0u64..30_000), 1..50)) {
            let mut now = Instant::now();
            let mut peak = None;
            let highest = samples.iter().map(|(sample, _)| *sample).fold(0.0, f64::max);
            for (sample, pause) in samples {
                now += Duration::from_millis(pause);
                let updated = Peak::observe(peak, sample, now);
                prop_assert!(updated.at(now).is_finite() && updated.at(now) <= highest + 1e-9);
                peak = Some(updated);
            }
        }
    }
}
