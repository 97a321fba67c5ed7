//! WHETHER what a source no longer says is gone. Pure; takes `now`.
//!
//! Sources lose things by accident: a store that was put back or emptied, a cluster that answers before it has read
//! itself, an operator's slip. What is *there* is always believed. What is *gone* is believed at once only where the
//! store went on from where it was, and most of what it said is still said; else it stays, marked stale, until a list made
//! [`REPEATED_FOR`] later still lacks it, without a break in between, or an operator accepts the loss.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How long a loss that is doubted has to be repeated.
pub const REPEATED_FOR: Duration = Duration::from_secs(60);

/// How what a source no longer says is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Belief {
    /// The operator's own files on this host: what is not there was taken away on purpose.
    Always,
    Guarded,
}

/// What an event would take away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Loss {
    /// Places and definitions the source has, once it is gone.
    pub(crate) left: usize,
    /// Some service would have no place left at this source, or no definition.
    pub(crate) empties_a_service: bool,
    /// The store went on from where it was.
    pub(crate) same_epoch: bool,
}

impl Belief {
    /// `peak`: the most the source had within the last [`REPEATED_FOR`].
    pub(crate) fn accepts(self, loss: Loss, peak: usize) -> bool {
        let most_is_left = if loss.empties_a_service { loss.left * 2 > peak } else { loss.left * 2 >= peak };
        self == Belief::Always || (loss.same_epoch && most_is_left)
    }
}

/// Since when a source was there without a break, in one life of its store: only that can repeat a loss.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Unbroken {
    since: Option<Instant>,
}

impl Unbroken {
    /// It was away, or is of another store now.
    pub(crate) fn breaks(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// Whether what was lost then has been so for long enough.
    pub(crate) fn repeats(&self, lost: Instant, now: Instant) -> bool {
        let since = self.since.map_or(lost, |unbroken| unbroken.max(lost));
        now.saturating_duration_since(since) >= REPEATED_FOR
    }
}

/// The most a source had lately, so that a loss in small steps is seen as what it is.
#[derive(Debug, Default)]
pub(crate) struct Peak {
    /// When there were how many: counts fall from front to back.
    counts: VecDeque<(Instant, usize)>,
}

impl Peak {
    pub(crate) fn note(&mut self, count: usize, now: Instant) {
        while self.counts.back().is_some_and(|(_, older)| *older < count) {
            self.counts.pop_back();
        }
        // Still the same: it has been so since then.
        if self.counts.back().is_none_or(|(_, older)| *older != count) {
            self.counts.push_back((now, count));
        }
    }

    /// The count of the front holds until the one behind it began.
    pub(crate) fn within(&mut self, now: Instant) -> usize {
        while self.counts.get(1).is_some_and(|(since, _)| now.saturating_duration_since(*since) > REPEATED_FOR) {
            self.counts.pop_front();
        }
        self.counts.front().map_or(0, |(_, count)| *count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(left: usize) -> Loss {
        Loss { left, empties_a_service: false, same_epoch: true }
    }

    #[test]
    fn a_loss_is_believed_when_the_store_went_on_and_half_is_left() {
        assert!(Belief::Guarded.accepts(loss(5), 10));
        assert!(!Belief::Guarded.accepts(loss(4), 10));
        assert!(!Belief::Guarded.accepts(Loss { same_epoch: false, ..loss(9) }, 10));
    }

    #[test]
    fn a_service_is_emptied_only_when_more_than_half_of_everything_is_left() {
        let zero = |left| Loss { empties_a_service: true, ..loss(left) };
        assert!(Belief::Guarded.accepts(zero(6), 10));
        assert!(!Belief::Guarded.accepts(zero(5), 10));
        assert!(!Belief::Guarded.accepts(zero(0), 1));
    }

    #[test]
    fn the_operators_own_files_are_always_believed() {
        assert!(Belief::Always.accepts(Loss { left: 0, empties_a_service: true, same_epoch: false }, 100));
    }

    #[test]
    fn a_loss_in_small_steps_is_measured_against_what_there_was_a_minute_ago() {
        let start = Instant::now();
        let mut peak = Peak::default();
        for step in 0..5 {
            peak.note(10 - step, start + Duration::from_secs(step as u64));
        }
        assert_eq!(peak.within(start + Duration::from_secs(60)), 10);
        assert_eq!(peak.within(start + Duration::from_secs(62)), 9);
        assert_eq!(peak.within(start + Duration::from_secs(3600)), 6);
        for second in 0..200 {
            peak.note(4, start + Duration::from_secs(3600 + second));
        }
        assert_eq!(peak.within(start + Duration::from_secs(3800)), 4, "being the same does not make it new");
        peak.note(20, start + Duration::from_secs(3801));
        assert_eq!(peak.within(start + Duration::from_secs(3801)), 20);
    }
}
