//! WHEN a source reads all again, and which services before that. Outlives its connections, so that what was asked for while
//! it was away is done after.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::jittered;
use crate::{ServiceName, Wanted};

/// A watch that lost an event would keep it lost; a full read per host every five minutes costs a store little.
pub(crate) const RESYNC_EVERY: Duration = Duration::from_secs(300);
/// Who asks may ask again and again; it takes a question per service.
pub(crate) const RESYNC_AT_MOST: Duration = Duration::from_secs(1);

/// Within so long all hosts have read a store again that was away.
pub(crate) const RESYNC_AFTER_A_BREAK: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(crate) struct Resync {
    at: Option<Instant>,
    /// Somebody waits for it.
    is_asked_for: bool,
    last: Option<Instant>,
    answered: u64,
    /// The highest number of a question for a single service that was heard.
    heard: u64,
}

impl Resync {
    pub(crate) fn at(&mut self) -> Instant {
        *self.at.get_or_insert_with(|| Instant::now() + jittered(RESYNC_EVERY, fastrand::f64()))
    }

    /// Sooner, if it is asked for. Returns the services that are asked for by themselves now.
    pub(crate) fn heed(&mut self, wanted: &Wanted) -> Vec<ServiceName> {
        if wanted.resync != self.answered {
            self.answered = wanted.resync;
            let soon = self.last.map_or_else(Instant::now, |last| last + RESYNC_AT_MOST);
            (self.at, self.is_asked_for) = (Some(self.at().min(soon)), true);
        }
        let before = self.heard;
        self.heard = wanted.reread.values().copied().max().unwrap_or(before);
        let new = wanted.reread.iter().filter(|(_, number)| **number > before);
        new.map(|(service, _)| service.clone()).collect()
    }

    /// Its backend is back after it was away. A store may have been put back meanwhile and written to until it was further
    /// on than before, which no watch from there tells; and all hosts are back at the same moment.
    pub(crate) fn is_back(&mut self, chance: f64) {
        if !self.is_asked_for {
            self.at = Some(Instant::now() + RESYNC_AFTER_A_BREAK.mul_f64(chance));
        }
    }

    /// It is done, or under way.
    pub(crate) fn begins(&mut self) {
        (self.at, self.is_asked_for, self.last) = (None, false, Some(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_question_for_a_service_is_heard_once() {
        let (mut resync, mut wanted) = (Resync::default(), Wanted::default());
        let name = |name: &str| name.parse::<ServiceName>().unwrap();
        wanted.reread.insert(name("a.shop"), 1);
        assert_eq!(resync.heed(&wanted), [name("a.shop")]);
        wanted.reread.insert(name("b.shop"), 2);
        assert_eq!(resync.heed(&wanted), [name("b.shop")]);
        assert!(resync.heed(&wanted).is_empty());
        wanted.reread.insert(name("a.shop"), 3);
        assert_eq!(resync.heed(&wanted), [name("a.shop")]);
        wanted.reread.clear();
        assert!(resync.heed(&wanted).is_empty());
    }
}
