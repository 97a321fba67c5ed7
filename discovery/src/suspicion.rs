//! WHAT of a source is read again because endpoints it names cannot be reached, and when: they may have moved, and the source
//! may have been deaf to that. Pure; takes `now` and `chance`, which is drawn from 0..1.
//!
//! A service is asked for by itself, unless the source says something new of it first. Where many are in doubt, it is the
//! source that is, and all of it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::doubled;
use crate::{Scope, ServiceName};

/// All hosts find an endpoint gone at the same moment; their questions come within this. By then the source has mostly told
/// where it went, and nobody asks.
const SPREAD: Duration = Duration::from_secs(5);
/// Between two questions for the same, at least; doubled while there is reason for more of them.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// All is read again every few minutes in any case.
const LONGEST_PAUSE: Duration = Duration::from_secs(320);
/// So many services are asked for by themselves within [`LATELY`].
pub(crate) const MOST_SERVICES: usize = 16;
const LATELY: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Suspicion {
    services: BTreeMap<ServiceName, Suspect>,
    everything: Suspect,
}

/// What is to be read now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Again {
    Services(BTreeSet<ServiceName>),
    Everything,
}

#[derive(Debug, Default)]
struct Suspect {
    due: Option<Instant>,
    asked: Option<Asked>,
}

/// When it was asked for last, and for how long not again.
#[derive(Debug)]
struct Asked {
    at: Instant,
    pause: Duration,
}

impl Suspicion {
    /// An endpoint of the service cannot be reached.
    pub(crate) fn raise(&mut self, service: ServiceName, now: Instant, chance: f64) {
        self.services.entry(service).or_default().raise(now, chance);
    }

    /// The source said something new of it, so it is not deaf.
    pub(crate) fn told(&mut self, service: &ServiceName) {
        if let Some(suspect) = self.services.get_mut(service) {
            suspect.due = None;
        }
    }

    /// A list of that was read.
    pub(crate) fn read(&mut self, scope: &Scope) {
        self.services
            .iter_mut()
            .filter(|(service, _)| scope.holds(service))
            .for_each(|(_, suspect)| suspect.due = None);
    }

    pub(crate) fn due(&self) -> Option<Instant> {
        self.services.values().chain([&self.everything]).filter_map(|suspect| suspect.due).min()
    }

    pub(crate) fn take(&mut self, now: Instant) -> Option<Again> {
        let mut due = BTreeSet::new();
        for (service, suspect) in &mut self.services {
            due.extend(suspect.take(now).then(|| service.clone()));
        }
        self.services.retain(|_, suspect| suspect.matters(now));
        if self.services.values().filter(|suspect| suspect.was_asked_lately(now)).count() > MOST_SERVICES {
            self.everything.raise(now, 0.0);
            due.clear();
        }
        if self.everything.take(now) {
            self.services.values_mut().for_each(|suspect| suspect.due = None);
            return Some(Again::Everything);
        }
        (!due.is_empty()).then_some(Again::Services(due))
    }
}

impl Suspect {
    fn raise(&mut self, now: Instant, chance: f64) {
        if self.due.is_none() {
            let rested = self.asked.as_ref().map_or(now, |asked| asked.at + asked.pause);
            self.due = Some(now.max(rested) + SPREAD.mul_f64(chance));
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        self.due = None;
        let goes_on = |asked: &&Asked| now.saturating_duration_since(asked.at) <= asked.pause * 2 + SPREAD;
        let pause = self.asked.as_ref().filter(goes_on).map(|asked| doubled(asked.pause, LONGEST_PAUSE));
        self.asked = Some(Asked { at: now, pause: pause.unwrap_or(FIRST_PAUSE) });
        true
    }

    fn was_asked_lately(&self, now: Instant) -> bool {
        self.asked.as_ref().is_some_and(|asked| now.saturating_duration_since(asked.at) < LATELY)
    }

    fn matters(&self, now: Instant) -> bool {
        let rests = |asked: &Asked| now.saturating_duration_since(asked.at) <= (asked.pause * 2 + SPREAD).max(LATELY);
        self.due.is_some() || self.asked.as_ref().is_some_and(rests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize) -> ServiceName {
        format!("s{n}.shop").parse().unwrap()
    }

    fn only(n: usize) -> Option<Again> {
        Some(Again::Services([name(n)].into()))
    }

    #[test]
    fn the_first_failure_has_its_service_read_within_five_seconds_and_many_at_once_are_one() {
        let (mut suspicion, now) = (Suspicion::default(), Instant::now());
        assert!(suspicion.take(now).is_none() && suspicion.due().is_none());
        suspicion.raise(name(1), now, 0.5);
        suspicion.raise(name(1), now, 0.1);
        let due = now + SPREAD / 2;
        assert_eq!(suspicion.due(), Some(due));
        assert_eq!([now, due, due].map(|at| suspicion.take(at)), [None, only(1), None]);
    }

    #[test]
    fn what_the_source_told_something_new_of_or_read_since_is_not_asked_for() {
        let (mut suspicion, now) = (Suspicion::default(), Instant::now());
        for n in 1..=3 {
            suspicion.raise(name(n), now, 0.0);
        }
        suspicion.told(&name(1));
        suspicion.read(&Scope::Service(name(3)));
        assert_eq!(suspicion.take(now), only(2));
        suspicion.raise(name(1), now, 0.0);
        suspicion.read(&Scope::Everything);
        assert_eq!(suspicion.due(), None);
    }

    #[test]
    fn endpoints_that_fail_without_end_have_it_read_ever_more_seldom_and_a_quiet_time_makes_up_for_it() {
        let (mut suspicion, mut now) = (Suspicion::default(), Instant::now());
        let mut gaps = Vec::new();
        for _ in 0..9 {
            suspicion.raise(name(1), now, 0.0);
            let due = suspicion.due().unwrap();
            assert_eq!(suspicion.take(due), only(1));
            gaps.push((due - now).as_secs());
            now = due;
        }
        assert_eq!(gaps, [0, 5, 10, 20, 40, 80, 160, 320, 320]);
        now += LONGEST_PAUSE * 3;
        suspicion.raise(name(1), now, 0.0);
        assert_eq!(suspicion.take(now), only(1));
        suspicion.raise(name(1), now, 0.0);
        assert_eq!(suspicion.due(), Some(now + FIRST_PAUSE));
    }

    #[test]
    fn of_more_services_than_a_few_within_a_minute_all_of_the_source_is_read_and_that_ever_more_seldom() {
        let (mut suspicion, start) = (Suspicion::default(), Instant::now());
        let mut fail = |services: std::ops::Range<usize>, second: u64| {
            let now = start + Duration::from_secs(second);
            services.for_each(|n| suspicion.raise(name(n), now, 0.0));
            suspicion.take(now)
        };
        let Some(Again::Services(few)) = fail(0..MOST_SERVICES, 0) else { panic!("all") };
        assert_eq!(few.len(), MOST_SERVICES);
        assert_eq!(fail(100..101, 1), Some(Again::Everything));
        assert_eq!(fail(101..110, 2), None, "not again so soon");
        assert_eq!(fail(110..111, 6), Some(Again::Everything));
        assert_eq!(fail(111..112, 15), None);
        assert_eq!(fail(112..113, 16), Some(Again::Everything));
        assert_eq!(fail(113..114, 120), only(113), "a minute later one is one again");
    }

    #[test]
    fn what_is_remembered_of_services_ends() {
        let (mut suspicion, start) = (Suspicion::default(), Instant::now());
        for n in 0..1000 {
            let now = start + LATELY * n;
            suspicion.raise(name(n as usize), now, 0.0);
            assert_eq!(suspicion.take(now), only(n as usize));
            assert!(suspicion.services.len() <= 2);
        }
    }
}
