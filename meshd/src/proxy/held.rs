//! What peers sent and local applications do not take is held here, within one budget for the process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::fault::Fault;
use crate::telemetry::Telemetry;

/// How often a stream whose application does not read looks at what piled up behind it (at most one window).
pub(super) const LOOK: Duration = Duration::from_secs(1);

/// The budget and what is used of it.
#[derive(Clone)]
pub(super) struct Budget {
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) limit: u64,
}

/// One stream's share; given back when dropped.
pub(super) struct Held {
    budget: Budget,
    bytes: u64,
}

impl Budget {
    pub(super) fn hold_nothing(&self) -> Held {
        Held { budget: self.clone(), bytes: 0 }
    }
}

impl Held {
    /// This stream now holds `bytes`; an error means that it must go, because all together hold too much.
    pub(super) fn update(&mut self, bytes: usize) -> Result<(), Fault> {
        let counter = &self.budget.telemetry.buffered_bytes;
        let bytes = bytes as u64;
        let total = if bytes >= self.bytes {
            counter.fetch_add(bytes - self.bytes, Ordering::Relaxed) + (bytes - self.bytes)
        } else {
            counter.fetch_sub(self.bytes - bytes, Ordering::Relaxed) - (self.bytes - bytes)
        };
        self.bytes = bytes;
        if total > self.budget.limit { Err(Fault::Limit) } else { Ok(()) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.telemetry.buffered_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::AccessLog;

    #[test]
    fn the_stream_that_exceeds_the_budget_is_the_one_to_go() {
        let budget = Budget { telemetry: Telemetry::new(1, AccessLog::off()), limit: 100 };
        let (mut first, mut second) = (budget.hold_nothing(), budget.hold_nothing());
        assert_eq!(first.update(90), Ok(()));
        assert_eq!(second.update(20), Err(Fault::Limit));
        drop(second);
        assert_eq!(first.update(100), Ok(()));
        assert_eq!(first.update(40), Ok(()));
        drop(first);
        assert_eq!(budget.telemetry.buffered_bytes.load(Ordering::Relaxed), 0);
    }
}
