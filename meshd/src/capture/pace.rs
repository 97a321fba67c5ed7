//! How often to look whether rules are still there, and when to stop fighting over them. Pure: time is passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Healing must take less than two seconds; a busy host changes routes many times a second.
const USUAL: Duration = Duration::from_secs(1);
/// Beyond this many heals within the span somebody keeps removing what we put back.
const FIGHT: usize = 6;
const FIGHT_SPAN: Duration = Duration::from_secs(60);
/// Between heals then: two tools in a loop would cost the host more than closed strict ports are worth.
const FIGHTING: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct Pace {
    looked: Option<Instant>,
    heals: VecDeque<Heal>,
    /// The last try to put things right did not.
    failing: bool,
}

/// Rules or routes that were put back.
#[derive(Debug)]
struct Heal {
    at: Instant,
    /// Who had removed them, where the kernel named somebody.
    by: Option<String>,
}

impl Pace {
    /// What rules depend on has moved: to be followed at once, unless that just failed.
    pub(super) fn due_for_news(&self, now: Instant) -> bool {
        !self.failing || self.due(now)
    }

    /// Whether it is time to look again.
    pub(super) fn due(&self, now: Instant) -> bool {
        let interval = if self.fighting(now) { FIGHTING } else { USUAL };
        self.looked.is_none_or(|looked| now.duration_since(looked) >= interval)
    }

    pub(super) fn looked(&mut self, now: Instant, failed: bool) {
        self.looked = Some(now);
        self.failing = failed;
    }

    pub(super) fn healed(&mut self, now: Instant, by: Option<String>) {
        self.heals.push_back(Heal { at: now, by });
        while self.heals.len() > FIGHT + 1 {
            self.heals.pop_front();
        }
    }

    /// Somebody removes them again and again.
    pub(super) fn fighting(&self, now: Instant) -> bool {
        self.recent(now).count() > FIGHT
    }

    /// Whoever was named last. Who removes what was put back a moment ago is taken for ourselves and not named, so one
    /// heal alone may not know.
    pub(super) fn opponent(&self, now: Instant) -> Option<&str> {
        self.recent(now).rev().find_map(|heal| heal.by.as_deref())
    }

    fn recent(&self, now: Instant) -> impl DoubleEndedIterator<Item = &Heal> {
        self.heals.iter().filter(move |heal| now.duration_since(heal.at) < FIGHT_SPAN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_of_changes_is_looked_at_once_a_second() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        assert!(pace.due(start));
        pace.looked(start, false);
        assert!(!pace.due(start + Duration::from_millis(500)) && pace.due(start + USUAL));
    }

    #[test]
    fn news_are_followed_at_once_but_a_failure_is_not_repeated_at_every_tick() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let tick = Duration::from_millis(500);
        pace.looked(start, false);
        assert!(pace.due_for_news(start + tick));
        pace.looked(start + tick, true);
        assert!(!pace.due_for_news(start + 2 * tick) && pace.due_for_news(start + 3 * tick));
        pace.looked(start + 3 * tick, false);
        assert!(pace.due_for_news(start + 4 * tick));
    }

    #[test]
    fn whoever_keeps_removing_rules_is_answered_every_half_minute_until_it_gives_up() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let second = |number: u64| start + Duration::from_secs(number);
        for heal in 0..=FIGHT as u64 {
            assert!(pace.due(second(heal)) && !pace.fighting(second(heal)), "{heal}");
            pace.looked(second(heal), false);
            pace.healed(second(heal), (heal == 3).then(|| "firewalld (pid 712)".to_owned()));
        }
        assert!(pace.fighting(second(7)) && !pace.due(second(7)));
        assert_eq!(pace.opponent(second(7)), Some("firewalld (pid 712)"));
        assert!(pace.due(second(36)));
        assert!(!pace.fighting(second(70)) && pace.opponent(second(70)).is_none());
    }
}
