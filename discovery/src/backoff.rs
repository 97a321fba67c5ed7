//! How long a source waits before it tries a backend again.

use std::time::Duration;

use tokio::time::{Instant, sleep};

const FIRST: Duration = Duration::from_millis(100);
/// A backend that comes back is noticed within this, and a thousand hosts ask it 200 times a second meanwhile.
const LONGEST: Duration = Duration::from_secs(5);
/// Who was served for so long is not what keeps the backend from working.
const WELL_AFTER: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Backoff {
    full: Duration,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { full: FIRST }
    }
}

impl Backoff {
    /// After an attempt that ended in failure. `chance` is drawn from 0..1: half of the pause is jitter, so that hosts
    /// which lost a backend together do not come back together.
    pub(crate) fn pause(&mut self, lasted: Duration, chance: f64) -> Duration {
        self.full = if lasted >= WELL_AFTER { FIRST } else { doubled(self.full, LONGEST) };
        self.full.mul_f64(0.5 + chance / 2.0)
    }

    /// Waits so long after an attempt that began then.
    pub(crate) async fn rest(&mut self, began: Instant) {
        sleep(self.pause(began.elapsed(), fastrand::f64())).await;
    }
}

pub(crate) fn doubled(pause: Duration, longest: Duration) -> Duration {
    (pause * 2).min(longest)
}

/// `period`, up to a fifth shorter or longer. `chance` is drawn from 0..1.
pub(crate) fn jittered(period: Duration, chance: f64) -> Duration {
    period.mul_f64(0.8 + 0.4 * chance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_a_time_that_went_well() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..8).map(|_| backoff.pause(Duration::ZERO, 1.0).as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(backoff.pause(WELL_AFTER, 1.0), FIRST);
        assert_eq!(backoff.pause(Duration::ZERO, 0.0), FIRST);
    }
}
