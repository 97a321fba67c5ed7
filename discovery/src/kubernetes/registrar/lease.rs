//! The Lease that says that a host is there, as the host itself knows it. Pure.

use std::collections::BTreeSet;
use std::time::SystemTime;

use tokio::time::Instant;

use crate::register::{Key, TTL};

/// Several registrations of one host keep it in turn.
const FRESH: u32 = 6;

#[derive(Debug, Default)]
pub(super) struct HostLease {
    /// Which life of the host this is; 0: it has not tried to take the lease yet.
    born: u64,
    /// What was written last: its version, since when it is held, and when it was kept.
    kept: Option<Kept>,
    /// Of another life: its version, and since when it is known.
    seen: Option<(String, Instant)>,
    pub(super) users: BTreeSet<Key>,
}

#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) version: String,
    pub(super) acquired: SystemTime,
    pub(super) at: Instant,
}

/// What the cluster has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) holder: String,
    pub(super) version: String,
}

impl Found {
    fn born(&self) -> u64 {
        self.holder.rsplit_once('/').and_then(|(_, born)| born.parse().ok()).unwrap_or(0)
    }
}

impl HostLease {
    pub(super) fn holder(&self, instance: &str) -> String {
        format!("{instance}/{}", self.born)
    }

    pub(super) fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        self.kept.as_ref().is_some_and(|kept| now.saturating_duration_since(kept.at) < TTL / FRESH)
    }

    /// Whether it may be taken, of nobody or of what was found. A life that begins takes it from whomever; one that goes on
    /// from an earlier one, or from one that ended.
    pub(super) fn takes(&mut self, found: Option<&Found>, unix_ms: u64, now: Instant) -> bool {
        self.kept = None;
        let theirs = found.map_or(0, Found::born);
        if let Some(found) = found {
            let since = match &self.seen {
                Some((version, since)) if *version == found.version => *since,
                _ => self.seen.insert((found.version.clone(), now)).1,
            };
            let has_ended = now.saturating_duration_since(since) > TTL;
            if self.born > 0 && theirs > self.born && !has_ended {
                return false;
            }
        }
        if self.born == 0 || theirs > self.born {
            self.born = unix_ms.max(theirs.saturating_add(1));
        }
        self.seen = None;
        true
    }

    pub(super) fn was_kept(&mut self, version: String, acquired: SystemTime, began: Instant) {
        self.kept = Some(Kept { version, acquired, at: began });
    }

    pub(super) fn was_lost(&mut self) {
        self.kept = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn of(born: u64, version: &str) -> Found {
        Found { holder: format!("api-1/{born}"), version: version.to_owned() }
    }

    #[test]
    fn a_life_that_begins_takes_the_lease_from_whomever_and_is_later() {
        let now = Instant::now();
        let mut lease = HostLease::default();
        assert!(lease.takes(Some(&of(500, "1")), 100, now));
        assert_eq!(lease.holder("api-1"), "api-1/501");
        // Its answer may have been lost: what it finds is its own.
        assert!(lease.takes(Some(&of(501, "2")), 200, now));
        assert_eq!(lease.holder("api-1"), "api-1/501");
        lease.was_kept("2".to_owned(), SystemTime::now(), now);
        assert!(lease.is_fresh(now + Duration::from_secs(1)) && !lease.is_fresh(now + TTL / 3));
    }

    #[test]
    fn one_that_goes_on_leaves_it_to_a_later_one_until_that_one_stands_still_for_its_whole_time() {
        let now = Instant::now();
        let mut lease = HostLease::default();
        assert!(lease.takes(None, 100, now));
        assert!(!lease.takes(Some(&of(300, "5")), 400, now));
        assert!(!lease.takes(Some(&of(300, "6")), 400, now + TTL), "it was renewed");
        assert!(!lease.takes(Some(&of(300, "6")), 400, now + TTL * 2));
        assert!(lease.takes(Some(&of(300, "6")), 400, now + TTL * 2 + Duration::from_secs(1)));
        assert_eq!(lease.holder("api-1"), "api-1/400");
    }
}
