//! How much one user of this host may ask of us: the socket is open to everybody.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::enrol::Owner;

/// A program has one connection, an Envoy one per worker at most.
const CONNECTIONS: u32 = 64;
/// An Envoy has a stream per secret it names.
const STREAMS: u32 = 256;
/// Of all users together: what descriptors of ours may be spent on.
const CONNECTIONS_OF_ALL: u32 = 2048;
/// Requests at once, and how fast they come back: reading a request costs up to some milliseconds (long headers).
const BURST: f64 = 512.0;
const PER_SECOND: f64 = 64.0;
/// Users remembered; beyond it those who have nothing open and have not asked lately are forgotten.
const REMEMBERED: usize = 1024;

/// Whom it is counted for. What root runs has as many users as units.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    User(u32),
    RootUnit(Option<Arc<str>>),
}

impl Holder {
    pub(super) fn of(owner: &Owner) -> Holder {
        if owner.uid == 0 { Holder::RootUnit(owner.unit.clone()) } else { Holder::User(owner.uid) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Usage {
    connections: u32,
    streams: u32,
    /// Requests that may still be made, at the time beside.
    left: f64,
    at: Instant,
}

impl Usage {
    fn left(&self, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at);
        BURST.min(self.left + since.as_secs_f64() * PER_SECOND)
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Limits(Arc<Mutex<HashMap<Holder, Usage>>>);

/// A connection counted until dropped.
#[derive(Debug)]
pub(super) struct Admission {
    limits: Limits,
    holder: Holder,
}

/// A stream of it, likewise.
#[derive(Debug)]
pub(super) struct StreamSlot(Arc<Admission>);

impl Limits {
    pub(super) fn admit(&self, holder: Holder, now: Instant) -> Option<Admission> {
        let mut users = self.users();
        if users.len() >= REMEMBERED {
            users.retain(|_, usage| usage.connections > 0 || usage.left(now) < BURST);
        }
        let all: u32 = users.values().map(|usage| usage.connections).sum();
        let fresh = Usage { connections: 0, streams: 0, left: BURST, at: now };
        let usage = users.entry(holder.clone()).or_insert(fresh);
        if all >= CONNECTIONS_OF_ALL || usage.connections >= CONNECTIONS || usage.left(now) < 1.0 {
            return None;
        }
        usage.connections += 1;
        drop(users);
        Some(Admission { limits: self.clone(), holder })
    }

    fn users(&self) -> MutexGuard<'_, HashMap<Holder, Usage>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission {
    /// Whether so many requests may be made now.
    pub(super) fn pace(&self, requests: u64, now: Instant) -> bool {
        self.change(|usage| {
            (usage.left, usage.at) = (usage.left(now) - requests as f64, now);
            usage.left >= 0.0
        })
    }

    pub(super) fn stream(self: &Arc<Admission>) -> Option<StreamSlot> {
        let admitted = self.change(|usage| {
            let fits = usage.streams < STREAMS;
            usage.streams += u32::from(fits);
            fits
        });
        admitted.then(|| StreamSlot(self.clone()))
    }

    fn change(&self, change: impl FnOnce(&mut Usage) -> bool) -> bool {
        // It is there as long as this connection is counted.
        self.limits.users().get_mut(&self.holder).is_some_and(change)
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.change(|usage| {
            usage.connections -= 1;
            true
        });
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.change(|usage| {
            usage.streams -= 1;
            true
        });
    }
}

/// How often the same caller is worth a line in the log.
const LOG_PAUSE: Duration = Duration::from_secs(60);
const LOG_CALLERS: usize = 1024;

/// Who was complained about lately.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<HashMap<String, Instant>>);

impl Complaints {
    pub(super) fn is_due(&self, about: &str, now: Instant) -> bool {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.get(about).is_some_and(|last| now.saturating_duration_since(*last) < LOG_PAUSE) {
            return false;
        }
        if told.len() >= LOG_CALLERS {
            told.clear();
        }
        told.insert(about.to_owned(), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_cannot_take_every_connection_nor_every_stream() {
        let (limits, now) = (Limits::default(), Instant::now());
        let greedy = || limits.admit(Holder::User(1000), now);
        let held: Vec<_> = (0..CONNECTIONS).map(|_| Arc::new(greedy().unwrap())).collect();
        assert!(greedy().is_none());
        let streams: Vec<_> = held.iter().cycle().map_while(Admission::stream).collect();
        assert_eq!(streams.len(), STREAMS as usize);
        let other = Arc::new(limits.admit(Holder::User(1001), now).unwrap());
        assert!(other.stream().is_some());
        drop(streams);
        assert!(held[0].stream().is_some());
        drop(held);
        assert!(greedy().is_some());
    }

    #[test]
    fn units_of_root_are_counted_each() {
        let (limits, now) = (Limits::default(), Instant::now());
        let facts = |unit: &str| Owner { unit: Some(unit.into()), has_cgroup: true, uid: 0 };
        let _held: Vec<_> =
            (0..CONNECTIONS).map(|_| limits.admit(Holder::of(&facts("a.service")), now).unwrap()).collect();
        assert!(limits.admit(Holder::of(&facts("a.service")), now).is_none());
        assert!(limits.admit(Holder::of(&facts("b.service")), now).is_some());
    }

    #[test]
    fn requests_beyond_the_pace_wait_also_on_a_new_connection() {
        let (limits, now) = (Limits::default(), Instant::now());
        let admit = |now| limits.admit(Holder::User(1000), now);
        let first = admit(now).unwrap();
        assert!(first.pace(BURST as u64, now));
        assert!(!first.pace(1, now));
        drop(first);
        assert!(admit(now).is_none());
        let later = now + Duration::from_secs(1);
        assert!(admit(later).unwrap().pace(PER_SECOND as u64 - 2, later));
    }

    #[test]
    fn the_same_complaint_is_made_once_a_minute() {
        let (complaints, now) = (Complaints::default(), Instant::now());
        assert!(complaints.is_due("a", now) && complaints.is_due("b", now));
        assert!(!complaints.is_due("a", now));
        assert!(complaints.is_due("a", now + LOG_PAUSE));
    }
}
