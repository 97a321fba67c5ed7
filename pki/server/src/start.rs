//! Whether the clock that a PKI starts with may be believed.
//!
//! The last time that was good is on record. A clock behind it is wrong. One far ahead of it may be right, after a long
//! time off, or wrong: nobody can tell from here. So what cannot be undone (a root leaves, a key is destroyed, a record
//! is forgotten) waits until hosts agree with the clock, or until it ran for a leaf's life without anybody who
//! disagrees: every host that holds a valid certificate has been heard by then, and without one there is nobody to ask.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use crate::clock::{QUORUM, median};
use crate::lifetimes::Lifetimes;
use crate::store::hosts::{Host, HostState};
use crate::times::{from_unix, seconds, signed_ms};

/// The good time on record is at most this old while the PKI runs.
const RECORD_EVERY_S: i64 = 60;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It was later than this already.
    Behind {
        seconds: i64,
    },
    Unconfirmed,
    Confirmed,
}

#[derive(Debug)]
pub(crate) struct Start {
    is_confirmed: bool,
    /// Seconds since 1970; `None` when none is on record, or the one on record is wrong.
    last_good: Option<i64>,
    /// Time since boot at the start.
    boot: Duration,
    /// When each host was last seen before the start.
    seen_before: HashMap<String, i64>,
}

impl Start {
    pub(crate) fn new(last_good: Option<i64>, boot: Duration, hosts: &[Host]) -> Start {
        let seen_before = hosts.iter().map(|host| (host.id.clone(), host.last_seen)).collect();
        Start { is_confirmed: false, last_good, boot, seen_before }
    }

    /// Hosts or the operator vouch for the clock, whatever is on record.
    pub(crate) fn confirm(&mut self) {
        self.is_confirmed = true;
        self.last_good = None;
    }

    pub(crate) fn is_confirmed(&self) -> bool {
        self.is_confirmed
    }

    pub(crate) fn judge(&mut self, now: i64, boot: Duration, hosts: &[Host], lifetimes: &Lifetimes) -> Standing {
        if !self.is_confirmed {
            match self.of_fleet(hosts, lifetimes.skew) {
                Some(true) => self.confirm(),
                said => self.is_confirmed = self.is_plausible(now, boot, said.is_some(), lifetimes),
            }
        }
        match self.last_good {
            _ if self.is_confirmed => Standing::Confirmed,
            Some(last) if now < last - seconds(lifetimes.skew) => Standing::Behind { seconds: last - now },
            _ => Standing::Unconfirmed,
        }
    }

    /// What the hosts heard since the start say, when it counts: that the clock is right, or that it is not.
    fn of_fleet(&self, hosts: &[Host], skew: Duration) -> Option<bool> {
        // An adopted host was heard by another PKI.
        let is_ours = |host: &&Host| host.state == HostState::Active && host.adopted_until.is_none();
        let active: Vec<&Host> = hosts.iter().filter(is_ours).collect();
        let heard = active.iter().filter(|host| self.seen_before.get(&host.id) != Some(&host.last_seen));
        let offsets: Vec<i64> = heard.map(|host| host.clock_offset_ms).collect();
        let is_right = median(&offsets)?.abs() <= signed_ms(skew);
        // Few of many hosts may contradict, but not confirm.
        let is_enough = active.len() < QUORUM || offsets.len() >= QUORUM;
        (is_enough || !is_right).then_some(is_right)
    }

    fn is_plausible(&self, now: i64, boot: Duration, is_contradicted: bool, lifetimes: &Lifetimes) -> bool {
        let skew = seconds(lifetimes.skew);
        let is_behind = self.last_good.is_some_and(|last| now < last - skew);
        let is_soon_after = self.last_good.is_some_and(|last| now <= last + skew + RECORD_EVERY_S);
        let ran_for_long = boot.saturating_sub(self.boot) >= lifetimes.leaf;
        !is_behind && (is_soon_after || (ran_for_long && !is_contradicted))
    }

    /// The good time to put on record, when it is due.
    pub(crate) fn record(&mut self, now: i64) -> Option<i64> {
        let is_due = self.is_confirmed && self.last_good.is_none_or(|last| (now - last).abs() >= RECORD_EVERY_S);
        is_due.then(|| *self.last_good.insert(now))
    }

    /// When the PKI's own certificates are made: never before a time that was good already.
    pub(crate) fn not_before_last(&self, now: SystemTime) -> SystemTime {
        self.last_good.map_or(now, |last| now.max(from_unix(last)))
    }

    /// Whether what is on record of a time after this one was made by a wrong clock.
    pub(crate) fn is_latest(&self) -> bool {
        self.is_confirmed || self.last_good.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;
    const LAST: i64 = 1_790_000_000;

    fn host(id: usize, last_seen: i64, clock_offset_ms: i64) -> Host {
        let record = serde_json::json!({
            "state": "active", "key_current": "", "enrolled_at": 0,
            "last_seen": last_seen, "clock_offset_ms": clock_offset_ms,
        });
        Host { id: id.to_string(), ..serde_json::from_value(record).unwrap() }
    }

    fn up(seconds: i64) -> Duration {
        Duration::from_secs(1000 + seconds.unsigned_abs())
    }

    /// Judged at the start, and `passed` seconds later with `heard` of `size` hosts saying that.
    fn judge(ahead: i64, size: usize, passed: i64, heard: usize, offset_ms: i64) -> (Standing, Standing) {
        let mut hosts: Vec<Host> = (0..size).map(|id| host(id, LAST, 0)).collect();
        let (lifetimes, now) = (Lifetimes::default(), LAST + ahead);
        let mut start = Start::new(Some(LAST), up(0), &hosts);
        let first = start.judge(now, up(0), &hosts, &lifetimes);
        for (id, one) in hosts.iter_mut().enumerate().take(heard) {
            *one = host(id, now + passed, offset_ms);
        }
        (first, start.judge(now + passed, up(passed), &hosts, &lifetimes))
    }

    #[test]
    fn a_restart_is_believed_and_an_unknown_or_distant_time_is_not() {
        assert_eq!(judge(60, 0, 0, 0, 0).0, Standing::Confirmed);
        assert_eq!(judge(-200, 0, 0, 0, 0).0, Standing::Confirmed);
        assert_eq!(judge(365 * DAY, 0, 0, 0, 0).0, Standing::Unconfirmed);
        assert_eq!(judge(-3600, 0, 0, 0, 0).0, Standing::Behind { seconds: 3600 });
        let mut unknown = Start::new(None, up(0), &[]);
        assert_eq!(unknown.judge(LAST, up(0), &[], &Lifetimes::default()), Standing::Unconfirmed);
    }

    #[test]
    fn hosts_heard_since_the_start_confirm_or_contradict() {
        assert_eq!(judge(90 * DAY, 3, 60, 1, 20), (Standing::Unconfirmed, Standing::Confirmed));
        assert_eq!(judge(90 * DAY, 3, DAY, 1, -3_600_000).1, Standing::Unconfirmed, "nor by time");
        assert_eq!(judge(90 * DAY, 9, 60, 4, 20).1, Standing::Unconfirmed, "four of nine are too few");
        assert_eq!(judge(90 * DAY, 9, 60, 5, 20).1, Standing::Confirmed);
        assert_eq!(judge(-3600, 3, 60, 2, 20).1, Standing::Confirmed, "the time on record was wrong");
        assert_eq!(judge(90 * DAY, 3, 60, 0, 0).1, Standing::Unconfirmed, "what they said before the start is old");
    }

    #[test]
    fn a_day_without_contradiction_confirms_a_clock_that_is_not_behind() {
        assert_eq!(judge(90 * DAY, 3, DAY - 1, 0, 0).1, Standing::Unconfirmed);
        assert_eq!(judge(90 * DAY, 3, DAY, 0, 0).1, Standing::Confirmed);
        assert!(matches!(judge(-30 * DAY, 3, DAY, 0, 0).1, Standing::Behind { .. }));
    }

    #[test]
    fn only_a_confirmed_time_goes_on_record_once_a_minute() {
        let lifetimes = Lifetimes::default();
        let mut start = Start::new(Some(LAST), up(0), &[]);
        start.judge(LAST + 90 * DAY, up(0), &[], &lifetimes);
        assert_eq!(start.record(LAST + 90 * DAY), None);
        let mut start = Start::new(Some(LAST), up(0), &[]);
        start.judge(LAST + 30, up(0), &[], &lifetimes);
        let due: Vec<i64> = (30..300).filter_map(|passed| start.record(LAST + passed)).collect();
        assert_eq!(due, [60, 120, 180, 240].map(|passed| LAST + passed));
    }

    #[test]
    fn hosts_taken_over_from_another_pki_vouch_for_no_clock() {
        let mut start = Start::new(Some(LAST), up(0), &[]);
        let adopted = |id| Host { adopted_until: Some(LAST + 99_999), ..host(id, LAST - 500, 0) };
        let hosts: Vec<Host> = (0..QUORUM + 1).map(adopted).collect();
        let now = LAST + 40 * 86_400;
        assert_eq!(start.judge(now, up(60), &hosts, &Lifetimes::default()), Standing::Unconfirmed);
    }
}
