//! WHEN a source is read again because an endpoint it names cannot be reached: it may have moved, and the source may have
//! been deaf to that. Pure; takes `now` and `chance`, which is drawn from 0..1.

use std::time::Duration;

use tokio::time::Instant;

/// All hosts find an endpoint gone at the same moment; their questions come within this.
const SPREAD: Duration = Duration::from_secs(1);
/// Between two lists of a source, at least; doubled while there is reason for more of them.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// All is read again every few minutes in any case.
const LONGEST_PAUSE: Duration = Duration::from_secs(320);

#[derive(Debug, Default)]
pub(crate) struct Suspicion {
    due: Option<Instant>,
    /// When it was read for that reason last, and for how long not again.
    last: Option<(Instant, Duration)>,
}

impl Suspicion {
    pub(crate) fn raise(&mut self, now: Instant, chance: f64) {
        if self.due.is_none() {
            let rested = self.last.map_or(now, |(at, pause)| at + pause);
            self.due = Some(now.max(rested) + SPREAD.mul_f64(chance));
        }
    }

    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// True when the source is to be read now.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        self.due = None;
        let pause = match self.last {
            Some((at, pause)) if now.saturating_duration_since(at) <= pause * 2 => (pause * 2).min(LONGEST_PAUSE),
            _ => FIRST_PAUSE,
        };
        self.last = Some((now, pause));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_has_the_source_read_within_a_second_and_many_at_once_are_one() {
        let (mut suspicion, now) = (Suspicion::default(), Instant::now());
        assert!(!suspicion.take(now) && suspicion.due().is_none());
        suspicion.raise(now, 0.5);
        suspicion.raise(now, 0.1);
        let due = now + Duration::from_millis(500);
        assert_eq!(suspicion.due(), Some(due));
        assert!(!suspicion.take(now) && suspicion.take(due) && !suspicion.take(due));
    }

    #[test]
    fn endpoints_that_fail_without_end_have_it_read_ever_more_seldom_and_a_quiet_time_makes_up_for_it() {
        let (mut suspicion, mut now) = (Suspicion::default(), Instant::now());
        let mut gaps = Vec::new();
        for _ in 0..9 {
            suspicion.raise(now, 0.0);
            let due = suspicion.due().unwrap();
            assert!(suspicion.take(due));
            gaps.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(gaps, [0, 5, 10, 20, 40, 80, 160, 320, 320]);
        now += LONGEST_PAUSE * 3;
        suspicion.raise(now, 0.0);
        assert!(suspicion.take(now));
        suspicion.raise(now, 0.0);
        assert_eq!(suspicion.due(), Some(now + FIRST_PAUSE));
    }
}
