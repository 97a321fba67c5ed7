//! How much time may go into walking the cgroup hierarchy for ids nobody knows. Pure: `now` is passed in.
//!
//! Whoever may make cgroups, as every login session may, has a walk of all of them made by connecting from a new one.
//! Without a bound ten thousand such cgroups keep a worker from its work.

use std::time::{Duration, Instant};

/// Saved up: some hundred walks of an ordinary host, for when everything starts at once.
const BURST: Duration = Duration::from_millis(200);
/// One part in so many of the time.
const SHARE: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct WalkBudget {
    /// From then on there is something to spend: as far in the past as time was saved up.
    since: Option<Instant>,
}

impl WalkBudget {
    pub(super) fn allows(&self, now: Instant) -> bool {
        self.since.is_none_or(|since| since <= now)
    }

    pub(super) fn spend(&mut self, began: Instant, took: Duration) {
        let most_saved = began.checked_sub(BURST * SHARE).unwrap_or(began);
        let since = self.since.map_or(most_saved, |since| since.max(most_saved));
        self.since = Some(since + took * SHARE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_walked_at_once_and_then_a_tenth_of_the_time() {
        let took = Duration::from_millis(1);
        let mut budget = WalkBudget::default();
        let start = Instant::now() + BURST * SHARE;
        let mut at = |now: Instant| {
            let allowed = budget.allows(now);
            if allowed {
                budget.spend(now, took);
            }
            allowed
        };
        assert!((0..200).all(|_| at(start)), "a burst");
        assert!(at(start) && !at(start), "no more than one walk above it");
        let later = (0..1000).filter(|ms| at(start + Duration::from_millis(*ms))).count();
        assert!((99..=100).contains(&later), "{later} walks of a millisecond within a second");
        let saved = (0..1000).filter(|_| at(start + Duration::from_secs(60))).count();
        assert_eq!(saved, 201, "as much is saved up as before, however long it rested");
    }
}
