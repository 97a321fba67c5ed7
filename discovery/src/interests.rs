//! WHICH services this host uses, learned from what it looks up. Pure; takes `now`.
//!
//! A name is followed from the first time somebody here asks for it. One that no source knows goes a minute after it was
//! asked for last, so that a scan of names leaves nothing behind; one that is known goes when nobody used it for a month.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::ServiceName;

/// A host that uses more declares them: each is a watch or two in every source.
const MOST: usize = 1000;
/// Of names that no source knows.
const MOST_UNKNOWN: usize = 100;
const UNKNOWN_FOR: Duration = Duration::from_secs(60);
/// What has connections is seen in use every few seconds, so this spares it.
const IN_USE: Duration = Duration::from_secs(60);
/// Longer than a job that runs once a month is away.
const UNUSED_FOR_DAYS: u64 = 32;
/// Readers take up to this one; there was none before.
const SCHEMA: u32 = 1;

/// A moment, by the clock that never jumps and as a day since 1970, which outlives restarts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) at: Instant,
    pub(crate) day: u64,
}

/// What the sources say of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    Known,
    /// All of them have answered.
    Nowhere,
    /// Some of them cannot be asked now.
    Unsure,
    /// Some of them have been asked.
    Awaited,
}

#[derive(Debug, Default)]
pub(crate) struct Interests(BTreeMap<ServiceName, Interest>);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Interest {
    /// When it was asked for or used last.
    used: Now,
    /// A source knows it, or did.
    known: bool,
}

impl Interest {
    pub(crate) fn is_known(&self) -> bool {
        self.known
    }

    pub(crate) fn last_day(&self) -> u64 {
        self.used.day
    }

    fn rank(&self) -> (u64, Instant) {
        (self.used.day, self.used.at)
    }

    fn stays(&self, presence: Presence, now: Now) -> bool {
        let asked_lately = now.at.saturating_duration_since(self.used.at) < UNKNOWN_FOR;
        let used_lately = now.day.saturating_sub(self.used.day) < UNUSED_FOR_DAYS;
        match presence {
            Presence::Known => used_lately,
            // What was known stays while nobody can say that it is gone.
            Presence::Unsure | Presence::Awaited if self.known => used_lately,
            Presence::Nowhere | Presence::Unsure | Presence::Awaited => asked_lately,
        }
    }
}

impl Interests {
    /// Follows a name from now on. False: there are too many, all of them in use.
    pub(crate) fn ask(&mut self, service: &ServiceName, now: Now) -> bool {
        if let Some(interest) = self.0.get_mut(service) {
            interest.used = now;
            return true;
        }
        if self.0.values().filter(|interest| !interest.known).count() >= MOST_UNKNOWN {
            self.evict(|interest| !interest.known);
        }
        if self.0.len() >= MOST {
            self.evict(|interest| now.at.saturating_duration_since(interest.used.at) >= IN_USE);
        }
        let fits = self.0.len() < MOST;
        if fits {
            self.0.insert(service.clone(), Interest { used: now, known: false });
        }
        fits
    }

    /// Takes out the one that was used least recently.
    fn evict(&mut self, may_go: impl Fn(&Interest) -> bool) {
        let least = self.0.iter().filter(|(_, interest)| may_go(interest)).min_by_key(|(_, interest)| interest.rank());
        if let Some(name) = least.map(|(name, _)| name.clone()) {
            self.0.remove(&name);
        }
    }

    pub(crate) fn note_use(&mut self, service: &ServiceName, now: Now) {
        if let Some(interest) = self.0.get_mut(service) {
            interest.used = now;
        }
    }

    pub(crate) fn note_known(&mut self, service: &ServiceName) {
        if let Some(interest) = self.0.get_mut(service) {
            interest.known = true;
        }
    }

    /// Forgets what nobody knows or uses.
    pub(crate) fn settle(&mut self, now: Now, presence: impl Fn(&ServiceName) -> Presence) {
        self.0.retain(|name, interest| {
            let presence = presence(name);
            interest.known |= presence == Presence::Known;
            interest.stays(presence, now)
        });
    }

    pub(crate) fn names(&self) -> BTreeSet<ServiceName> {
        self.0.keys().cloned().collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&ServiceName, &Interest)> {
        self.0.iter()
    }

    /// What outlives a restart.
    pub(crate) fn to_text(&self) -> String {
        let known = self.0.iter().filter(|(_, interest)| interest.known);
        let services = known.map(|(name, interest)| (name.clone(), Saved { last_day: interest.used.day })).collect();
        // Maps of texts and numbers always can be written.
        serde_json::to_string_pretty(&Document { schema: SCHEMA, services }).unwrap_or_default()
    }

    pub(crate) fn from_text(text: &str, now: Instant) -> Result<Interests, String> {
        let document: Document = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if document.schema > SCHEMA {
            return Err(format!("it has schema {}, and this version reads up to {SCHEMA}", document.schema));
        }
        let interest = |saved: Saved| Interest { used: Now { at: now, day: saved.last_day }, known: true };
        Ok(Interests(document.services.into_iter().map(|(name, saved)| (name, interest(saved))).collect()))
    }
}

#[derive(Serialize, Deserialize)]
struct Document {
    schema: u32,
    services: BTreeMap<ServiceName, Saved>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    /// Since 1970.
    last_day: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize) -> ServiceName {
        format!("s{n}.shop").parse().unwrap()
    }

    fn start() -> Now {
        Now { at: Instant::now(), day: 20_000 }
    }

    impl Now {
        fn after(self, seconds: u64) -> Now {
            Now { at: self.at + Duration::from_secs(seconds), day: self.day + seconds / 86_400 }
        }
    }

    fn known(count: usize, now: Now) -> Interests {
        let mut interests = Interests::default();
        for n in 0..count {
            assert!(interests.ask(&name(n), now));
            interests.settle(now, |_| Presence::Known);
        }
        interests
    }

    #[test]
    fn a_scan_of_names_leaves_nothing_behind_and_takes_nothing_away() {
        let now = start();
        let mut interests = known(50, now);
        for n in 100..10_000 {
            assert!(interests.ask(&name(n), now.after(1)));
        }
        assert_eq!(interests.0.len(), 50 + MOST_UNKNOWN);
        let presence =
            |service: &ServiceName| if service.as_str().len() < 9 { Presence::Known } else { Presence::Nowhere };
        interests.settle(now.after(60), presence);
        assert_eq!(interests.0.len(), 50 + MOST_UNKNOWN);
        interests.settle(now.after(61), presence);
        assert_eq!(interests.0.len(), 50);
    }

    #[test]
    fn a_name_that_is_asked_for_again_and_again_stays_also_while_nobody_knows_it() {
        let now = start();
        let mut interests = Interests::default();
        for second in (0..600).step_by(30) {
            interests.ask(&name(1), now.after(second));
            interests.settle(now.after(second), |_| Presence::Nowhere);
            assert_eq!(interests.0.len(), 1);
        }
    }

    #[test]
    fn what_was_known_is_forgotten_when_all_sources_say_it_is_gone_and_not_while_one_is_away() {
        let now = start();
        let mut interests = known(1, now);
        interests.settle(now.after(3600), |_| Presence::Unsure);
        interests.settle(now.after(3600), |_| Presence::Awaited);
        assert_eq!(interests.0.len(), 1);
        interests.settle(now.after(3600), |_| Presence::Nowhere);
        assert_eq!(interests.0.len(), 0);
    }

    #[test]
    fn what_nobody_used_for_a_month_is_forgotten() {
        let now = start();
        let mut interests = known(2, now);
        interests.note_use(&name(1), now.after(10 * 86_400));
        interests.settle(now.after(32 * 86_400), |_| Presence::Known);
        assert_eq!(interests.names(), [name(1)].into());
        interests.settle(now.after(42 * 86_400), |_| Presence::Known);
        assert!(interests.names().is_empty());
    }

    #[test]
    fn the_least_recently_used_makes_room_and_what_is_in_use_never_does() {
        let now = start();
        let mut interests = known(MOST, now);
        assert!(!interests.ask(&name(MOST), now.after(1)), "all were used a moment ago");
        for n in 1..MOST {
            interests.note_use(&name(n), now.after(100));
        }
        assert!(interests.ask(&name(MOST), now.after(101)));
        let names = interests.names();
        assert!(names.len() == MOST && names.contains(&name(MOST)) && !names.contains(&name(0)));
    }

    #[test]
    fn what_is_known_outlives_a_restart_and_a_file_of_the_future_is_refused() {
        let now = start();
        let mut interests = known(2, now);
        interests.ask(&name(7), now);
        let again = Interests::from_text(&interests.to_text(), now.at).unwrap();
        assert_eq!(again.names(), [name(0), name(1)].into());
        assert!(again.iter().all(|(_, interest)| interest.is_known() && interest.last_day() == now.day));
        let newer = interests.to_text().replace("\"schema\": 1", "\"schema\": 2");
        assert!(Interests::from_text(&newer, now.at).unwrap_err().contains("schema 2"));
        assert!(Interests::from_text("{", now.at).is_err());
    }
}
