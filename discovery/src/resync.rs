//! WHEN a source reads all again. Outlives its connections, so that what was asked for while it was away is done after.

use std::time::Duration;

use tokio::time::Instant;

use crate::Wanted;
use crate::backoff::jittered;

/// A watch that lost an event would keep it lost; a full read per host every five minutes costs a store little.
pub(crate) const RESYNC_EVERY: Duration = Duration::from_secs(300);
/// Who asks may ask again and again; it takes a question per service.
pub(crate) const RESYNC_AT_MOST: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(crate) struct Resync {
    at: Option<Instant>,
    last: Option<Instant>,
    answered: u64,
}

impl Resync {
    pub(crate) fn at(&mut self) -> Instant {
        *self.at.get_or_insert_with(|| Instant::now() + jittered(RESYNC_EVERY, fastrand::f64()))
    }

    /// Sooner, if it is asked for.
    pub(crate) fn heed(&mut self, wanted: &Wanted) {
        if wanted.resync != self.answered {
            self.answered = wanted.resync;
            let soon = self.last.map_or_else(Instant::now, |last| last + RESYNC_AT_MOST);
            self.at = Some(self.at().min(soon));
        }
    }

    /// It is done, or under way.
    pub(crate) fn begins(&mut self) {
        (self.at, self.last) = (None, Some(Instant::now()));
    }
}
