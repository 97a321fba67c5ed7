//! Whether the PKI's clock may be believed. A wrong one would end certificates early or rotate roots away.

use std::time::{Duration, SystemTime};

use crate::times::signed_ms;

/// Fewer clocks than this are outvoted by chance.
pub(crate) const QUORUM: usize = 5;

/// Why nothing that depends on time is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Distrust {
    /// It was later than this already when the PKI last ran.
    Behind { seconds: i64 },
    /// Wall clock and boot time went different ways between two looks.
    Jumped { seconds: i64 },
    /// The median of the hosts' clocks.
    Outvoted { median_ms: i64, hosts: usize },
}

impl std::fmt::Display for Distrust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Distrust::Behind { seconds } => write!(
                f,
                "the clock of this machine is {seconds} s behind the time at which the PKI last ran; check NTP, or start \
                 meshd-pki with `--clock-is-right` if the clock is right now"
            ),
            Distrust::Jumped { seconds } => write!(
                f,
                "the clock of this machine jumped by {seconds} s while the PKI ran; check NTP, then restart meshd-pki"
            ),
            Distrust::Outvoted { median_ms, hosts } => write!(
                f,
                "the clocks of {hosts} hosts are {:+.0} s from this machine's (median); check NTP here",
                *median_ms as f64 / 1000.0
            ),
        }
    }
}

/// Looks at the clocks again and again. A jump is forgiven when the fleet agrees with the new time, or it is undone.
#[derive(Debug, Default)]
pub(crate) struct ClockGuard {
    /// Wall clock less time since boot at the last look, in milliseconds. Rounded differences would add up.
    last: Option<i64>,
    jumped_ms: i64,
}

impl ClockGuard {
    /// The next look is the first.
    pub(crate) fn forget(&mut self) {
        *self = ClockGuard::default();
    }

    /// `boot` is the time since boot, which no administrator sets; `offsets_ms` are of hosts heard lately.
    pub(crate) fn look(
        &mut self,
        wall: SystemTime,
        boot: Duration,
        offsets_ms: &[i64],
        skew: Duration,
    ) -> Option<Distrust> {
        let ahead = ahead_ms(wall, boot);
        if let Some(last) = self.last.replace(ahead) {
            self.jumped_ms += ahead - last;
        }
        let limit = signed_ms(skew);
        let median = median(offsets_ms).filter(|_| offsets_ms.len() >= QUORUM);
        let agreed = median.is_some_and(|median| median.abs() <= limit);
        if agreed {
            self.jumped_ms = 0;
        }
        match median {
            Some(median_ms) if !agreed => Some(Distrust::Outvoted { median_ms, hosts: offsets_ms.len() }),
            _ if self.jumped_ms.abs() > limit => Some(Distrust::Jumped { seconds: self.jumped_ms / 1000 }),
            _ => None,
        }
    }

    /// A jump since the last look, of which nobody knows yet.
    pub(crate) fn jumped(&self, wall: SystemTime, boot: Duration, skew: Duration) -> Option<Distrust> {
        let jumped_ms = self.jumped_ms + ahead_ms(wall, boot) - self.last?;
        (jumped_ms.abs() > signed_ms(skew)).then_some(Distrust::Jumped { seconds: jumped_ms / 1000 })
    }
}

fn ahead_ms(wall: SystemTime, boot: Duration) -> i64 {
    signed_ms(wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()) - signed_ms(boot)
}

pub(crate) fn median(offsets_ms: &[i64]) -> Option<i64> {
    let mut sorted = offsets_ms.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SKEW: Duration = Duration::from_secs(300);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000 + seconds)
    }

    fn up(seconds: u64) -> Duration {
        Duration::from_secs(1000 + seconds)
    }

    #[test]
    fn a_jump_is_seen_and_forgiven_when_it_is_undone() {
        let mut guard = ClockGuard::default();
        assert_eq!(guard.look(at(0), up(0), &[], SKEW), None);
        assert_eq!(guard.look(at(10), up(10), &[], SKEW), None);
        assert_eq!(guard.jumped(at(11), up(11), SKEW), None);
        assert_eq!(guard.jumped(at(3611), up(11), SKEW), Some(Distrust::Jumped { seconds: 3600 }), "before any look");
        assert_eq!(guard.look(at(3620), up(20), &[], SKEW), Some(Distrust::Jumped { seconds: 3600 }));
        assert!(guard.look(at(3630), up(30), &[], SKEW).is_some(), "it does not wear off");
        assert_eq!(guard.look(at(40), up(40), &[], SKEW), None);
    }

    #[test]
    fn small_steps_that_add_up_are_a_jump() {
        let mut guard = ClockGuard::default();
        let seen: Vec<bool> = (0..10).map(|n| guard.look(at(n * 60), up(n * 10), &[], SKEW).is_some()).collect();
        assert_eq!(seen.iter().filter(|distrusted| **distrusted).count(), 3, "{seen:?}");
    }

    #[test]
    fn fractions_of_seconds_never_add_up_to_a_jump() {
        let mut guard = ClockGuard::default();
        for n in 0..10_000 {
            let fraction = Duration::from_micros(n * 7919 % 2000);
            let found = guard.look(at(n * 10) + fraction, up(n * 10) + fraction, &[], SKEW);
            assert_eq!(found, None, "look {n}");
        }
    }

    #[test]
    fn the_median_of_the_fleet_overrules_and_absolves() {
        let mut guard = ClockGuard::default();
        let wrong = [-3_600_000, -3_600_000, -3_599_000, 0, -3_601_000];
        assert!(matches!(guard.look(at(0), up(0), &wrong, SKEW), Some(Distrust::Outvoted { hosts: 5, .. })));
        assert_eq!(guard.look(at(10), up(10), &wrong[..4], SKEW), None, "four are no quorum");
        assert!(guard.look(at(9999), up(20), &[], SKEW).is_some());
        let right = [0, 10, -10, 2000, 3_600_000];
        assert_eq!(guard.look(at(10_009), up(30), &right, SKEW), None, "the fleet confirms the new time");
        assert_eq!(guard.look(at(10_019), up(40), &[], SKEW), None);
    }
}
