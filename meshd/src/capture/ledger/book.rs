//! What the kernel's counts add up to over restarts of meshd, replaced rules and reboots. Pure: `now` is passed in.
//!
//! How long a port has been clean is counted in observed time only: while nobody counted, nobody can say who called.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::tally::{PlainCaller, Tally};
use crate::unix_time::unix_seconds;

const SCHEMA: u32 = 1;
/// Callers remembered in all. The kernel's sets hold fewer, so one that is counted now is never forgotten.
const MAX_CALLERS: usize = 10_000;
/// The kernel forgets a caller after a day without calls (see `nft/ledger.rs`): a longer silence of ours is a gap.
const KERNEL_MEMORY: Duration = Duration::from_secs(24 * 3600);

/// `capture/ledger.json` in the state directory. Times are Unix seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Book {
    schema: u32,
    /// The boot and the life of the rules that the `counted` fields below belong to.
    boot: String,
    rules: u64,
    /// When the kernel was last asked.
    pub entered: Option<u64>,
    pub ports: BTreeMap<u16, PortRecord>,
    pub refused: BTreeMap<u16, RefusedRecord>,
    /// Callers forgotten because there were too many.
    pub dropped: u64,
}

/// A permissive port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRecord {
    pub observed_since: u64,
    /// Within the time since then, how long nobody counted.
    pub unobserved_s: u64,
    /// Observed time since the last plaintext call, or since observation began.
    pub clean_s: u64,
    /// The last plaintext call, at the latest.
    pub last_seen: Option<u64>,
    pub connections: u64,
    pub callers: BTreeMap<PlainCaller, CallerRecord>,
    /// Where the kernel counts apart from who called: its count when last asked, and how many calls were known by
    /// then that it had not counted yet.
    #[serde(default, skip_serializing_if = "is_zero")]
    total: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    ahead: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerRecord {
    pub first_seen: u64,
    pub last_seen: u64,
    pub connections: u64,
    /// The kernel's count when last asked.
    counted: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedRecord {
    pub connections: u64,
    counted: u64,
}

/// Why what is on disk cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("schema {0} was written by a newer meshd; this one reads up to {SCHEMA}")]
    Newer(u32),
    #[error(transparent)]
    Damaged(#[from] serde_json::Error),
}

#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}

impl Default for Book {
    fn default() -> Book {
        Book {
            schema: SCHEMA,
            boot: String::new(),
            rules: 0,
            entered: None,
            ports: BTreeMap::new(),
            refused: BTreeMap::new(),
            dropped: 0,
        }
    }
}

impl Book {
    pub(super) fn from_json(text: &[u8]) -> Result<Book, Unreadable> {
        // First of all: what else is in a newer one is not known.
        let SchemaOnly { schema } = serde_json::from_slice(text)?;
        if schema > SCHEMA {
            return Err(Unreadable::Newer(schema));
        }
        Ok(serde_json::from_slice(text)?)
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Adds what the kernel counted since it was last asked.
    pub(super) fn enter(&mut self, tally: &Tally, boot: &str, now: SystemTime) {
        let now = unix_seconds(now);
        // A clock that was set back must not make anything look observed.
        let elapsed = self.entered.map_or(0, |entered| now.saturating_sub(entered));
        let same_rules = self.boot == boot && self.rules == tally.rules;
        if !same_rules {
            self.begin_counting_anew(boot, tally.rules);
        }
        let observed = same_rules && elapsed <= KERNEL_MEMORY.as_secs();
        self.ports.retain(|port, _| tally.ports.contains_key(port));
        for (port, counts) in &tally.ports {
            let record = self.ports.entry(*port).or_insert_with(|| PortRecord::from(now));
            // What was not there when we last looked has no time that passed since.
            let elapsed = elapsed.min(now.saturating_sub(record.observed_since));
            let total = tally.totals.as_ref().and_then(|totals| totals.get(port));
            let told_apart = total.map(|total| record.told_apart(counts, *total));
            record.enter(told_apart.as_ref().unwrap_or(counts), now, elapsed, observed);
        }
        self.refused.retain(|port, _| tally.refused.contains_key(port));
        for (port, count) in &tally.refused {
            let record = self.refused.entry(*port).or_default();
            record.connections += since(record.counted, *count);
            record.counted = *count;
        }
        self.entered = Some(now);
        self.forget_the_oldest(tally);
    }

    fn begin_counting_anew(&mut self, boot: &str, rules: u64) {
        (self.boot, self.rules) = (boot.to_owned(), rules);
        self.ports.values_mut().for_each(|port| (port.total, port.ahead) = (0, 0));
        let callers = self.ports.values_mut().flat_map(|port| port.callers.values_mut());
        callers.for_each(|caller| caller.counted = 0);
        self.refused.values_mut().for_each(|refused| refused.counted = 0);
    }

    fn forget_the_oldest(&mut self, tally: &Tally) {
        let remembered: usize = self.ports.values().map(|port| port.callers.len()).sum();
        let Some(excess) = remembered.checked_sub(MAX_CALLERS).filter(|excess| *excess > 0) else { return };
        let counted_now = |port: &u16, caller: &PlainCaller| tally.ports[port].contains_key(caller);
        let mut candidates: Vec<(u64, u16, PlainCaller)> = self
            .ports
            .iter()
            .flat_map(|(port, record)| record.callers.iter().map(move |(caller, seen)| (port, caller, seen)))
            .filter(|(port, caller, _)| !counted_now(port, caller))
            .map(|(port, caller, seen)| (seen.last_seen, *port, *caller))
            .collect();
        candidates.sort_unstable();
        for (_, port, caller) in candidates.into_iter().take(excess) {
            if let Some(record) = self.ports.get_mut(&port) {
                record.callers.remove(&caller);
                self.dropped += 1;
            }
        }
    }
}

impl PortRecord {
    fn from(now: u64) -> PortRecord {
        PortRecord {
            observed_since: now,
            unobserved_s: 0,
            clean_s: 0,
            last_seen: None,
            connections: 0,
            callers: BTreeMap::new(),
            total: 0,
            ahead: 0,
        }
    }

    /// What is new of each caller out of what became known of them, and of nobody known out of the kernel's total.
    fn told_apart(&mut self, named: &BTreeMap<PlainCaller, u64>, total: u64) -> BTreeMap<PlainCaller, u64> {
        self.callers.values_mut().for_each(|seen| seen.counted = 0);
        let known = self.ahead + named.values().sum::<u64>();
        let counted = since(self.total, total);
        (self.total, self.ahead) = (total, known.saturating_sub(counted));
        let mut new = named.clone();
        *new.entry(PlainCaller::Others).or_default() += counted.saturating_sub(known);
        new
    }

    fn enter(&mut self, counts: &BTreeMap<PlainCaller, u64>, now: u64, elapsed: u64, observed: bool) {
        let mut new = 0;
        for (caller, count) in counts.iter().filter(|(_, count)| **count > 0) {
            let seen = self.callers.entry(*caller).or_insert(CallerRecord {
                first_seen: now,
                last_seen: now,
                connections: 0,
                counted: 0,
            });
            let calls = since(seen.counted, *count);
            seen.counted = *count;
            if calls > 0 {
                seen.last_seen = now;
                seen.connections += calls;
                new += calls;
            }
        }
        // The kernel has forgotten these, and would count them from zero.
        let forgotten = self.callers.iter_mut().filter(|(caller, _)| !counts.contains_key(caller));
        forgotten.for_each(|(_, seen)| seen.counted = 0);
        if !observed {
            self.unobserved_s += elapsed;
        }
        if new > 0 {
            self.connections += new;
            (self.last_seen, self.clean_s) = (Some(now), 0);
        } else if observed {
            self.clean_s += elapsed;
        }
    }
}

/// Calls since the kernel had counted `before`; it may have begun again.
fn since(before: u64, count: u64) -> u64 {
    count.checked_sub(before).unwrap_or(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3600;
    const STRANGER: PlainCaller = PlainCaller::Uid(1000);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn tally(rules: u64, calls: u64) -> Tally {
        let callers = if calls > 0 { BTreeMap::from([(STRANGER, calls)]) } else { BTreeMap::new() };
        Tally {
            rules,
            ports: BTreeMap::from([(8080, callers)]),
            totals: None,
            refused: BTreeMap::from([(9090, calls)]),
        }
    }

    /// As a backend tells it whose kernel counts apart from who called.
    fn told(rules: u64, named: u64, total: u64) -> Tally {
        Tally { totals: Some([(8080, total)].into()), ..tally(rules, named) }
    }

    fn callers(book: &Book) -> (u64, u64) {
        let of = |caller| book.ports[&8080].callers.get(&caller).map_or(0, |seen| seen.connections);
        (of(STRANGER), of(PlainCaller::Others))
    }

    fn observed(steps: &[(Tally, &str, u64)]) -> Book {
        let mut book = Book::default();
        steps.iter().for_each(|(tally, boot, now)| book.enter(tally, boot, at(*now)));
        book
    }

    #[test]
    fn calls_are_counted_once_each() {
        let book = observed(&[(tally(1, 2), "b", 100), (tally(1, 2), "b", 110), (tally(1, 5), "b", 120)]);
        let port = &book.ports[&8080];
        assert_eq!((port.connections, port.last_seen, book.refused[&9090].connections), (5, Some(120), 5));
        let caller = &port.callers[&STRANGER];
        assert_eq!((caller.first_seen, caller.last_seen, caller.connections), (100, 120, 5));
    }

    #[test]
    fn a_port_is_clean_since_the_last_call() {
        let book = observed(&[(tally(1, 0), "b", 0), (tally(1, 1), "b", HOUR), (tally(1, 1), "b", 3 * HOUR)]);
        assert_eq!(book.ports[&8080].clean_s, 2 * HOUR);
        assert_eq!(book.ports[&8080].observed_since, 0);
    }

    #[test]
    fn calls_after_the_rules_were_replaced_or_the_host_rebooted_are_added() {
        for (rules, boot) in [(2, "b"), (1, "c")] {
            let book = observed(&[(tally(1, 3), "b", 0), (tally(rules, 3), boot, 10)]);
            assert_eq!(book.ports[&8080].connections, 6);
        }
    }

    #[test]
    fn a_restart_of_meshd_alone_is_no_gap() {
        let before = observed(&[(tally(1, 0), "b", 0), (tally(1, 1), "b", 10)]);
        let mut after = Book::from_json(&before.to_json()).unwrap();
        assert_eq!(after, before);
        after.enter(&tally(1, 1), "b", at(HOUR));
        let port = &after.ports[&8080];
        assert_eq!((port.connections, port.unobserved_s, port.clean_s), (1, 0, HOUR - 10));
    }

    #[test]
    fn time_in_which_nobody_counted_does_not_make_a_port_clean() {
        let away = 5 * HOUR;
        let book = observed(&[(tally(1, 0), "b", 0), (tally(1, 0), "b", HOUR), (tally(2, 0), "b", HOUR + away)]);
        let port = &book.ports[&8080];
        assert_eq!((port.clean_s, port.unobserved_s), (HOUR, away));
        let silent = observed(&[(tally(1, 0), "b", 0), (tally(1, 0), "b", 25 * HOUR)]);
        assert_eq!(silent.ports[&8080].clean_s, 0);
    }

    #[test]
    fn a_clock_set_back_makes_nothing_clean() {
        let book = observed(&[(tally(1, 0), "b", 10 * HOUR), (tally(1, 0), "b", HOUR)]);
        assert_eq!(book.ports[&8080].clean_s, 0);
    }

    #[test]
    fn a_caller_the_kernel_forgot_is_counted_from_zero() {
        let book = observed(&[(tally(1, 3), "b", 0), (tally(1, 0), "b", 10), (tally(1, 3), "b", 20)]);
        assert_eq!(book.ports[&8080].connections, 6);
    }

    #[test]
    fn a_port_that_is_observed_later_is_clean_since_then_only() {
        let book = observed(&[(Tally { rules: 1, ..Tally::default() }, "b", 0), (tally(1, 0), "b", HOUR)]);
        assert_eq!((book.ports[&8080].observed_since, book.ports[&8080].clean_s), (HOUR, 0));
        let gone = observed(&[(tally(1, 1), "b", 0), (Tally { rules: 1, ..Tally::default() }, "b", HOUR)]);
        assert!(gone.ports.is_empty() && gone.refused.is_empty());
    }

    #[test]
    fn calls_nobody_told_of_are_entered_as_others() {
        // Five calls while meshd was away or messages were lost, then two that were told of.
        let book = observed(&[(told(1, 0, 0), "b", 0), (told(1, 1, 6), "b", 10), (told(1, 1, 7), "b", HOUR)]);
        assert_eq!((callers(&book), book.ports[&8080].connections), ((2, 5), 7));
        assert_eq!((book.ports[&8080].clean_s, book.ports[&8080].last_seen), (0, Some(HOUR)));
    }

    #[test]
    fn a_restart_of_meshd_enters_what_was_counted_meanwhile_and_nothing_twice() {
        let mut book = observed(&[(told(1, 3, 3), "b", 0)]);
        book = Book::from_json(&book.to_json()).unwrap();
        book.enter(&told(1, 0, 5), "b", at(10));
        book.enter(&told(1, 0, 5), "b", at(20));
        assert_eq!((callers(&book), book.ports[&8080].clean_s), ((3, 2), 10));
        book.enter(&told(2, 1, 2), "b", at(30));
        assert_eq!(callers(&book), (4, 3), "replaced rules count from zero");
    }

    #[test]
    fn a_call_that_is_told_of_before_it_is_counted_is_entered_once() {
        let book = observed(&[(told(1, 2, 1), "b", 0), (told(1, 0, 2), "b", 10), (told(1, 0, 3), "b", 20)]);
        assert_eq!(callers(&book), (2, 1));
    }

    #[test]
    fn counters_that_somebody_set_to_zero_count_from_there() {
        let book = observed(&[(told(1, 4, 4), "b", 0), (told(1, 1, 1), "b", 10), (told(1, 0, 2), "b", 20)]);
        assert_eq!(callers(&book), (5, 1));
    }

    #[test]
    fn the_callers_not_seen_for_longest_are_forgotten_and_counted() {
        let uids = |from: u32, count: usize| (from..).take(count).map(|uid| (PlainCaller::Uid(uid), 1)).collect();
        let one = |callers| Tally { rules: 1, ports: BTreeMap::from([(8080, callers)]), ..Tally::default() };
        let (old, new) = (one(uids(0, 6000)), one(uids(6000, 6000)));
        let book = observed(&[(old, "b", 0), (new, "b", 10)]);
        let port = &book.ports[&8080];
        assert_eq!((port.callers.len(), book.dropped, port.connections), (MAX_CALLERS, 2000, 12_000));
        assert!((6000..12_000).all(|uid| port.callers.contains_key(&PlainCaller::Uid(uid))));
    }
}
