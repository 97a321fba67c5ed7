//! Leases of hosts that register: which slices are those of a dead host. Pure; takes `now`.
//!
//! As in leader election, a Lease is over once it was not renewed for its time, measured here from when it was seen to
//! change: clocks of hosts do not matter. It is believed only when a list that was asked for after that time still says
//! the same, so that a server that stands still ends nobody; and each connection to the server begins the time anew, so
//! that hosts which could not reach it either have their turn first.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::feed::Feed;
use super::objects::{Kind, LEASE, Lease, NOTES};
use super::pick::MOST_NAMED;
use super::remote::Collection;
use super::work::Task;
use crate::Scope;
use crate::register::TTL;

/// A Lease by name, and who must hold it for a slice to live.
pub(super) type Keeper = (String, String);

#[derive(Debug)]
pub(super) struct Leases {
    /// Where they lie.
    namespace: String,
    /// By slices that are known.
    used: BTreeSet<Keeper>,
    seen: HashMap<String, Seen>,
    over: BTreeSet<Keeper>,
    pub(super) feed: Feed,
    pub(super) due: bool,
    pub(super) listing: Option<Task>,
    /// Until when it may not be read, or not now.
    pub(super) put_off: Option<Instant>,
    /// Why, as it was told.
    pub(super) trouble: Option<String>,
}

#[derive(Debug)]
struct Seen {
    lease: Lease,
    /// When it was seen to be renewed.
    since: Instant,
    held_since: Instant,
}

impl Leases {
    pub(super) fn new(namespace: String) -> Leases {
        Leases {
            namespace,
            used: BTreeSet::new(),
            seen: HashMap::new(),
            over: BTreeSet::new(),
            feed: Feed::default(),
            due: false,
            listing: None,
            put_off: None,
            trouble: None,
        }
    }

    /// Those of hosts that are dead.
    pub(super) fn over(&self) -> &BTreeSet<Keeper> {
        &self.over
    }

    pub(super) fn use_by(&mut self, used: BTreeSet<Keeper>) {
        let names =
            |keepers: &BTreeSet<Keeper>| keepers.iter().map(|(lease, _)| lease.clone()).collect::<BTreeSet<_>>();
        let (before, now) = (names(&self.used), names(&used));
        self.over.retain(|keeper| used.contains(keeper));
        self.seen.retain(|name, _| now.contains(name));
        self.used = used;
        if now.is_empty() {
            (self.feed, self.due, self.listing) = (Feed::default(), false, None);
        } else if !now.is_subset(&before) {
            (self.feed, self.due, self.listing) = (Feed::default(), true, None);
        }
    }

    /// What is to be followed, if anything.
    pub(super) fn collection(&self) -> Option<Collection> {
        let names: BTreeSet<&str> = self.used.iter().map(|(lease, _)| lease.as_str()).collect();
        if names.is_empty() {
            return None;
        }
        let label = format!("{NOTES}{LEASE}");
        let labels = match names.len() <= MOST_NAMED {
            true => format!("{label} in ({})", names.into_iter().collect::<Vec<_>>().join(",")),
            false => label,
        };
        let area = Scope::Namespace(self.namespace.clone());
        Some(Collection { kind: Kind::Lease, area, labels, is_little: false })
    }

    /// Hosts may have been unable to renew for as long as nothing was heard here.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        (self.feed, self.due, self.listing, self.put_off) = (Feed::default(), true, None, None);
        for seen in self.seen.values_mut() {
            (seen.since, seen.held_since) = (now, now);
        }
    }

    pub(super) fn set(&mut self, lease: Lease, now: Instant) {
        let before = self.seen.get(&lease.name);
        if before.is_some_and(|seen| seen.lease == lease) || !self.used.iter().any(|(name, _)| *name == lease.name) {
            return;
        }
        let same = before.filter(|seen| seen.lease.holder == lease.holder);
        let held_since = same.map_or(now, |seen| seen.held_since);
        self.seen.insert(lease.name.clone(), Seen { lease, since: now, held_since });
        let ends: BTreeSet<Keeper> =
            self.over.iter().filter(|keeper| self.ends(keeper) <= Some(now)).cloned().collect();
        self.over = ends;
    }

    /// It is not there: as one that nobody renews.
    pub(super) fn remove(&mut self, name: &str, now: Instant) {
        let lease = Lease { name: name.to_owned(), holder: String::new(), renewed: String::new(), lasts: TTL };
        self.set(lease, now);
    }

    /// All there is, asked for at `asked`.
    pub(super) fn replace(&mut self, listed: Vec<Lease>, asked: Instant, now: Instant) {
        let missing: Vec<String> = self.used.iter().map(|(name, _)| name.clone()).collect();
        let missing = missing.into_iter().filter(|name| !listed.iter().any(|lease| lease.name == *name));
        missing.for_each(|name| self.remove(&name, now));
        listed.into_iter().for_each(|lease| self.set(lease, now));
        self.due = false;
        let over = self.used.iter().filter(|keeper| self.ends(keeper).is_some_and(|end| end <= asked));
        self.over = over.cloned().collect();
    }

    /// When a keeper is dead if nothing changes. One whose Lease another life took over is given as long to write its
    /// slices again.
    fn ends(&self, (name, holder): &Keeper) -> Option<Instant> {
        let seen = self.seen.get(name)?;
        let since = if seen.lease.holder == *holder { seen.since } else { seen.since.min(seen.held_since) };
        Some(since + seen.lease.lasts)
    }

    /// When to ask next whether somebody is dead, unless that is asked already.
    pub(super) fn look_at(&self) -> Option<Instant> {
        if self.due || self.listing.is_some() {
            return self.put_off.filter(|_| self.listing.is_none());
        }
        let alive = self.used.iter().filter(|keeper| !self.over.contains(*keeper));
        let next = alive.filter_map(|keeper| self.ends(keeper)).min()?;
        Some(self.put_off.map_or(next, |until| next.max(until)))
    }
}

/// Of a Lease that says nothing sensible.
pub(super) fn lasts(seconds: Option<u64>) -> Duration {
    seconds.map_or(TTL, |seconds| Duration::from_secs(seconds.clamp(1, 3600)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, renewed: &str) -> Lease {
        Lease { name: "api-1".to_owned(), holder: holder.to_owned(), renewed: renewed.to_owned(), lasts: TTL }
    }

    fn keeper(holder: &str) -> Keeper {
        ("api-1".to_owned(), holder.to_owned())
    }

    fn used(holders: &[&str]) -> Leases {
        let mut leases = Leases::new("meshd-system".to_owned());
        leases.use_by(holders.iter().map(|holder| keeper(holder)).collect());
        leases
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_lease_is_over_when_a_list_asked_for_after_its_time_says_what_was_known() {
        let start = Instant::now();
        let mut leases = used(&["a/1"]);
        assert!(leases.due && leases.look_at().is_none());
        leases.replace(vec![lease("a/1", "x")], start, start);
        assert_eq!(leases.look_at(), Some(start + TTL));
        leases.set(lease("a/1", "y"), start + 3 * SECOND);
        let end = start + 3 * SECOND + TTL;
        assert_eq!(leases.look_at(), Some(end));
        leases.replace(vec![lease("a/1", "y")], end - SECOND, end);
        assert!(leases.over().is_empty(), "what was asked before its end tells nothing");
        leases.replace(vec![lease("a/1", "y")], end, end + SECOND);
        assert_eq!(leases.over(), &[keeper("a/1")].into());
        assert_eq!(leases.look_at(), None);
        leases.set(lease("a/1", "z"), end + 2 * SECOND);
        assert!(leases.over().is_empty(), "it was renewed");
    }

    #[test]
    fn after_a_time_without_a_server_every_host_has_its_time_anew() {
        let start = Instant::now();
        let mut leases = used(&["a/1"]);
        leases.replace(vec![lease("a/1", "x")], start, start);
        let back = start + 10 * TTL;
        leases.begin_anew(back);
        leases.replace(vec![lease("a/1", "x")], back, back);
        assert!(leases.over().is_empty());
        leases.replace(vec![lease("a/1", "x")], back + TTL, back + TTL);
        assert_eq!(leases.over().len(), 1);
    }

    #[test]
    fn slices_of_a_former_life_have_one_lease_to_be_written_again() {
        let start = Instant::now();
        let mut leases = used(&["a/1", "a/2"]);
        leases.replace(vec![lease("a/1", "x")], start, start);
        let taken = start + 5 * SECOND;
        leases.set(lease("a/2", "y"), taken);
        for second in 1..=12 {
            leases.set(lease("a/2", &second.to_string()), taken + second * SECOND);
        }
        assert_eq!(leases.look_at(), Some(taken + TTL));
        leases.replace(vec![lease("a/2", "12")], taken + TTL, taken + TTL);
        assert_eq!(leases.over(), &[keeper("a/1")].into());
    }

    #[test]
    fn one_that_is_not_there_ends_as_well_and_nobody_is_asked_for_what_no_slice_names() {
        let start = Instant::now();
        let mut leases = used(&["a/1"]);
        leases.replace(vec![], start, start);
        leases.replace(vec![], start + TTL, start + TTL);
        assert_eq!(leases.over().len(), 1);
        assert_eq!(leases.collection().unwrap().labels, "meshd.dev/lease in (api-1)");
        leases.use_by((0..65).map(|n| (format!("h{n}"), String::new())).collect());
        assert_eq!(leases.collection().unwrap().labels, "meshd.dev/lease");
        assert!(leases.over().is_empty() && leases.due);
        leases.use_by(BTreeSet::new());
        assert!(leases.collection().is_none() && leases.look_at().is_none() && !leases.due);
    }
}
