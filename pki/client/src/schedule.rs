//! When to renew and when to try again. Pure: `now` and chance are passed in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use meshd_identity::{SpiffeId, sha256};

use crate::inventory::{Settled, authorities_of};
use crate::{Credentials, Svid};

/// Renewal falls between these shares of a certificate's life. What is left, 55 %, is the time the PKI may be away.
const EARLIEST: f64 = 0.30;
const LATEST: f64 = 0.45;

/// No timer is trusted for longer: monotonic timers stop while a machine sleeps, so the wall clock is read again.
pub(crate) const TICK: Duration = Duration::from_secs(15);

const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(300);
/// After which a connection that was there already is doubted.
const PATIENCE: Duration = Duration::from_secs(10);
/// With something missing or expired the host cannot serve, so it asks more often.
const RETRY_CAP_URGENT: Duration = Duration::from_secs(60);
/// A retry must never cost a relevant part of what is left of a certificate's life.
const RETRY_SHARE_OF_REMAINING: f64 = 0.02;

/// Certificates under a tainted root or intermediate are replaced within this time, or a quarter of what is left of them.
const TAINT_SPLAY: Duration = Duration::from_secs(600);

/// When to renew a certificate: drawn once for each, from who holds it and its serial, so that a fleet enrolled
/// in one minute does not come back in one minute, and a restart does not draw again.
pub(crate) fn renew_at(host_id: &str, svid: &Svid) -> SystemTime {
    let life = svid.not_after.duration_since(svid.issued_at).unwrap_or_default();
    svid.issued_at + life.mul_f64(renewal_share(host_id, &svid.serial))
}

fn renewal_share(host_id: &str, serial: &str) -> f64 {
    EARLIEST + (LATEST - EARLIEST) * draw(host_id, serial)
}

/// Uniform in 0..1, the same for the same certificate.
fn draw(host_id: &str, serial: &str) -> f64 {
    let hash = sha256(format!("{host_id}\0{serial}").as_bytes());
    u64::from_be_bytes(hash[..8].try_into().expect("a hash has 32 bytes")) as f64 / u64::MAX as f64
}

/// Decorrelated jitter: the next delay is drawn between the base and three times the previous one. `chance` is
/// uniform in 0..1; `remaining` is what is left of the certificate that ends first, `None` when one is missing.
pub(crate) fn retry_delay(previous: Duration, remaining: Option<Duration>, chance: f64) -> Duration {
    let cap = match remaining {
        Some(left) if !left.is_zero() => left.mul_f64(RETRY_SHARE_OF_REMAINING).min(RETRY_CAP),
        _ => RETRY_CAP_URGENT,
    };
    let ceiling = (previous * 3).max(RETRY_BASE);
    let drawn = RETRY_BASE + (ceiling - RETRY_BASE).mul_f64(chance.clamp(0.0, 1.0));
    drawn.min(cap).max(RETRY_BASE)
}

/// How long an answer may take over a connection that was there already, before its server must prove to live; `remaining`
/// as above.
pub(crate) fn patience(remaining: Option<Duration>) -> Duration {
    remaining.map_or(PATIENCE, |left| (left / 4).min(PATIENCE))
}

/// A refused identity is asked for again after 30 to 60 s: the operator may have permitted it meanwhile.
pub(crate) fn refusal_delay(chance: f64) -> Duration {
    Duration::from_secs(30) + Duration::from_secs(30).mul_f64(chance.clamp(0.0, 1.0))
}

/// What the PKI has told that moves renewals.
#[derive(Debug, Clone, Default)]
pub(crate) struct Circumstances {
    /// Identities the PKI refused, with the time to ask again.
    pub(crate) waiting: BTreeMap<SpiffeId, SystemTime>,
    /// Roots and intermediates whose key may be known to others, and since when this host knows.
    pub(crate) tainted: BTreeMap<String, SystemTime>,
}

impl Circumstances {
    /// When a certificate is to be replaced: by the calendar, or soon when it hangs on a tainted authority.
    fn renew_at(&self, held: &Credentials, svid: &Svid) -> SystemTime {
        let host_id = &held.host_id;
        let planned = renew_at(host_id, svid);
        if self.tainted.is_empty() {
            return planned;
        }
        let above = authorities_of(svid, &held.bundle);
        let since = above.iter().filter_map(|authority| self.tainted.get(authority).copied()).min();
        let Some(since) = since else { return planned };
        // A PKI whose next one does not sign yet issues under the tainted one again: then it is asked again.
        let since = since.max(svid.issued_at);
        let left = svid.not_after.duration_since(since).unwrap_or_default();
        let splay = (left / 4).min(TAINT_SPLAY).mul_f64(draw(host_id, &svid.serial));
        planned.min(since + splay)
    }
}

/// Which identities to ask for now.
pub(crate) fn due(
    held: &Credentials,
    wanted: &BTreeSet<SpiffeId>,
    told: &Circumstances,
    now: SystemTime,
) -> Vec<SpiffeId> {
    if held.banned {
        // It would be refused; the conversation tells when that has ended.
        return Vec::new();
    }
    let settled = Settled::by(&held.bundle);
    let is_due = |svid| told.renew_at(held, svid) <= now || !settled.is(svid);
    let mut due = Vec::new();
    if is_due(&held.host) {
        due.push(held.host.id.clone());
    }
    // The host's own identity is renewed above whether or not somebody lists it.
    for id in wanted.iter().filter(|id| **id != held.host.id) {
        let may_ask = told.waiting.get(id).is_none_or(|until| *until <= now);
        if may_ask && held.workloads.get(id).is_none_or(|svid| is_due(svid)) {
            due.push(id.clone());
        }
    }
    due
}

/// How long to sleep until something may be due; never more than a tick.
pub(crate) fn next_wake(
    held: &Credentials,
    wanted: &BTreeSet<SpiffeId>,
    told: &Circumstances,
    now: SystemTime,
) -> Duration {
    let renewals = wanted.iter().filter_map(|id| held.workloads.get(id)).chain([&held.host]);
    let times = renewals.map(|svid| told.renew_at(held, svid)).chain(told.waiting.values().copied());
    times.filter_map(|at| at.duration_since(now).ok()).min().unwrap_or(TICK).min(TICK)
}

/// The shortest remaining life among what is due; `None` when something is missing or expired.
pub(crate) fn remaining(held: &Credentials, due: &[SpiffeId], now: SystemTime) -> Option<Duration> {
    let svid = |id: &SpiffeId| if *id == held.host.id { Some(&held.host) } else { held.workloads.get(id) };
    let lives: Option<Vec<Duration>> = due.iter().map(|id| svid(id)?.not_after.duration_since(now).ok()).collect();
    lives?.into_iter().min()
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use meshd_identity::TrustDomain;
    use proptest::prelude::*;

    use super::*;
    use crate::fake::FakeCa;
    use crate::inventory::roots_under;

    fn domain() -> TrustDomain {
        "prod.example.org".parse().unwrap()
    }

    fn workload(name: &str) -> SpiffeId {
        SpiffeId::workload(&domain(), "shop", name).unwrap()
    }

    #[test]
    fn nothing_is_due_right_after_issue_and_everything_at_45_percent() {
        let id = workload("payments");
        let held = FakeCa::new(domain()).credentials("web", from_ref(&id));
        let wanted = BTreeSet::from([id.clone()]);
        let issued = held.host.issued_at;
        let life = held.host.not_after.duration_since(issued).unwrap();
        assert_eq!(due(&held, &wanted, &Circumstances::default(), issued + life.mul_f64(0.29)), vec![]);
        let later = issued + life.mul_f64(0.46);
        assert_eq!(due(&held, &wanted, &Circumstances::default(), later), vec![held.host.id.clone(), id]);
    }

    #[test]
    fn a_newly_wanted_identity_is_due_at_once_unless_it_was_just_refused() {
        let held = FakeCa::new(domain()).credentials("web", &[]);
        let now = held.host.issued_at;
        let id = workload("new");
        let wanted = BTreeSet::from([id.clone()]);
        assert_eq!(due(&held, &wanted, &Circumstances::default(), now), vec![id.clone()]);
        let waiting = BTreeMap::from([(id.clone(), now + Duration::from_secs(40))]);
        let waiting = Circumstances { waiting, ..Circumstances::default() };
        assert_eq!(due(&held, &wanted, &waiting, now), vec![]);
        assert_eq!(due(&held, &wanted, &waiting, now + Duration::from_secs(40)), vec![id]);
    }

    #[test]
    fn what_is_believed_by_a_bridge_alone_is_replaced_at_once() {
        let (signs, before) = (FakeCa::new(domain()), FakeCa::new(domain()));
        let mut held = signs.credentials("web", &[]);
        let mut host = Svid::clone(&held.host);
        host.chain.push(before.svid(&held.host.id).chain[1].clone());
        held.host = std::sync::Arc::new(host);
        let is_due = |held: &Credentials| {
            let due = due(held, &BTreeSet::new(), &Circumstances::default(), held.host.issued_at);
            due.contains(&held.host.id)
        };
        held.bundle.roots.extend(before.bundle().roots);
        assert!(!is_due(&held));
        held.bundle.roots.remove(0);
        assert!(is_due(&held), "the root it is under has left");
    }

    #[test]
    fn what_hangs_on_a_tainted_root_is_replaced_soon_and_again_while_it_still_does() {
        let held = FakeCa::new(domain()).credentials("web", &[]);
        let root = roots_under(&held.host, &held.bundle).remove(0);
        let since = held.host.issued_at + Duration::from_secs(3600);
        let told = Circumstances { tainted: BTreeMap::from([(root, since)]), ..Circumstances::default() };
        let at = told.renew_at(&held, &held.host);
        assert!(at >= since && at <= since + TAINT_SPLAY, "{at:?}");
        assert_eq!(due(&held, &BTreeSet::new(), &told, at), vec![held.host.id.clone()]);
        let issued_at = since + Duration::from_secs(60);
        let replaced = Svid { issued_at, ..Svid::clone(&held.host) };
        let again = told.renew_at(&held, &replaced);
        assert!(again >= issued_at && again <= issued_at + TAINT_SPLAY, "{again:?}");
        let other =
            Circumstances { tainted: BTreeMap::from([("other".to_owned(), since)]), ..Circumstances::default() };
        assert_eq!(other.renew_at(&held, &held.host), renew_at("web", &held.host));
    }

    #[test]
    fn what_a_tainted_intermediate_signed_is_replaced_soon_at_a_moment_of_each_its_own() {
        let held = FakeCa::new(domain()).credentials("web", &[]);
        let [intermediate, root] = &authorities_of(&held.host, &held.bundle)[..] else { panic!("a chain of two") };
        assert_eq!(*root, roots_under(&held.host, &held.bundle)[0]);
        let since = held.host.issued_at + Duration::from_secs(3600);
        let tainted = BTreeMap::from([(intermediate.clone(), since)]);
        let told = Circumstances { tainted, ..Circumstances::default() };
        let moment = |host: &str| {
            let held = Credentials { host_id: host.to_owned(), ..held.clone() };
            told.renew_at(&held, &held.host)
        };
        let moments: BTreeSet<SystemTime> = ["web", "db", "cache"].into_iter().map(moment).collect();
        assert_eq!(moments.len(), 3);
        assert!(moments.iter().all(|at| *at >= since && *at <= since + TAINT_SPLAY), "{moments:?}");
    }

    #[test]
    fn a_chain_to_a_root_that_left_the_bundle_is_due_at_once() {
        let (ca, other) = (FakeCa::new(domain()), FakeCa::new(domain()));
        let mut held = ca.credentials("web", &[]);
        held.bundle = other.bundle();
        let now = held.host.issued_at;
        assert_eq!(due(&held, &BTreeSet::new(), &Circumstances::default(), now), vec![held.host.id.clone()]);
    }

    #[test]
    fn a_banned_host_asks_for_nothing() {
        let mut held = FakeCa::new(domain()).credentials("web", &[]);
        held.banned = true;
        let wanted = BTreeSet::from([workload("payments")]);
        assert_eq!(due(&held, &wanted, &Circumstances::default(), held.host.not_after), vec![]);
    }

    #[test]
    fn an_identity_nobody_wants_is_not_renewed() {
        let id = workload("gone");
        let held = FakeCa::new(domain()).credentials("web", from_ref(&id));
        let end = held.host.not_after;
        assert_eq!(due(&held, &BTreeSet::new(), &Circumstances::default(), end), vec![held.host.id.clone()]);
    }

    #[test]
    fn the_hosts_own_identity_is_asked_for_once_however_often_it_is_wanted() {
        let held = FakeCa::new(domain()).credentials("web", &[]);
        let wanted = BTreeSet::from([held.host.id.clone()]);
        assert_eq!(due(&held, &wanted, &Circumstances::default(), held.host.issued_at), vec![]);
        assert_eq!(due(&held, &wanted, &Circumstances::default(), held.host.not_after), vec![held.host.id.clone()]);
    }

    #[test]
    fn a_missing_or_expired_certificate_has_nothing_remaining() {
        let held = FakeCa::new(domain()).credentials("web", &[]);
        let host = held.host.id.clone();
        let now = held.host.not_after - Duration::from_secs(100);
        assert_eq!(remaining(&held, from_ref(&host), now), Some(Duration::from_secs(100)));
        assert_eq!(remaining(&held, &[host.clone(), workload("new")], now), None);
        assert_eq!(remaining(&held, &[host], now + Duration::from_secs(101)), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn renewal_is_drawn_once_within_30_to_45_percent(host in "[a-z0-9-]{1,20}", serial in "[0-9a-f]{32}") {
            let share = renewal_share(&host, &serial);
            prop_assert!((0.30..=0.45).contains(&share));
            prop_assert_eq!(share, renewal_share(&host, &serial));
        }

        #[test]
        fn retries_stay_between_a_second_and_their_caps(
            previous in 0_u64..400_000,
            remaining in prop::option::of(0_u64..2_000_000),
            chance in 0.0_f64..1.0,
        ) {
            let remaining = remaining.map(Duration::from_secs);
            let delay = retry_delay(Duration::from_millis(previous), remaining, chance);
            prop_assert!(delay >= Duration::from_secs(1) && delay <= Duration::from_secs(300));
            match remaining {
                Some(left) if left >= Duration::from_secs(50) => prop_assert!(delay <= left.mul_f64(0.0201)),
                Some(left) if !left.is_zero() => prop_assert_eq!(delay, Duration::from_secs(1)),
                _ => prop_assert!(delay <= Duration::from_secs(60)),
            }
        }

        #[test]
        fn sleep_never_exceeds_a_tick(offset in 0_u64..200_000) {
            let held = FakeCa::new(domain()).credentials("web", &[]);
            let now = held.host.issued_at + Duration::from_secs(offset);
            prop_assert!(next_wake(&held, &BTreeSet::new(), &Circumstances::default(), now) <= TICK);
        }
    }

    #[test]
    fn a_fleet_spreads_its_renewals() {
        let shares: Vec<f64> = (0..1000).map(|n| renewal_share("web", &format!("{n:032x}"))).collect();
        for slice in 0..5 {
            let from = 0.30 + 0.03 * f64::from(slice);
            let count = shares.iter().filter(|share| (from..from + 0.03).contains(*share)).count();
            assert!((140..=260).contains(&count), "{count} of 1000 renewals between {from} and {}", from + 0.03);
        }
    }
}
