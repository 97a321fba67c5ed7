//! What becomes of one registration. Pure: `now` and chance are passed in.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{Found, Hold, Offer, Over};
use crate::Registration;
use crate::backoff::{Backoff, jittered};

/// Where in its life a registration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nothing was tried yet.
    #[default]
    Absent,
    /// Not there, or not known to be; being written.
    Registering,
    /// There, and kept.
    Held,
    /// Another meshd wrote a later one under the same name: left alone until that one ends.
    Superseded,
    /// There with weight 0, or about to be: nobody should come any more.
    Draining,
    /// Taken away, or given up when it was to be.
    Gone,
}

/// What is wanted of a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Aim {
    Serve,
    Drain,
    Withdraw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Write,
    Keep,
    Withdraw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Do(Step),
    Wait(Instant),
    Over,
}

#[derive(Debug)]
pub(super) struct Life {
    ttl: Duration,
    phase: Phase,
    /// The highest asked for; 0: none in this life.
    epoch: u64,
    /// Once known.
    address: Option<IpAddr>,
    own: Option<Own>,
    write_at: Instant,
    backoff: Backoff,
    error: Option<String>,
}

/// What is there, as far as is known.
#[derive(Debug)]
struct Own {
    hold: Hold,
    said: Registration,
    keep_at: Instant,
    /// The backend may have given it up from then on.
    good_until: Instant,
}

impl Life {
    pub(super) fn new(ttl: Duration, now: Instant) -> Life {
        let backoff = Backoff::default();
        Life { ttl, phase: Phase::Absent, epoch: 0, address: None, own: None, write_at: now, backoff, error: None }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(super) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    pub(super) fn hold(&self) -> Option<Hold> {
        self.own.as_ref().map(|own| own.hold)
    }

    /// Whether what is there says what is wanted.
    pub(super) fn says(&self, offer: &Offer, aim: Aim) -> bool {
        let wanted = self.wanted(offer, aim);
        self.own.as_ref().is_some_and(|own| Some(&own.said) == wanted.as_ref())
    }

    pub(super) fn next(&mut self, offer: &Offer, aim: Aim, now: Instant) -> Next {
        let due = |at: Instant, step| if at <= now { Next::Do(step) } else { Next::Wait(at) };
        let Some(own) = &self.own else {
            // Nothing is written only to be taken away.
            if aim > Aim::Serve {
                self.phase = Phase::Gone;
                return Next::Over;
            }
            if self.phase == Phase::Absent {
                self.phase = Phase::Registering;
            }
            return due(self.write_at, Step::Write);
        };
        if aim == Aim::Withdraw {
            return due(self.write_at, Step::Withdraw);
        }
        // First of all: what is not kept is lost with everything it says.
        if own.keep_at <= now {
            return Next::Do(Step::Keep);
        }
        if self.says(offer, aim) {
            return Next::Wait(own.keep_at);
        }
        if self.write_at <= now { Next::Do(Step::Write) } else { Next::Wait(self.write_at.min(own.keep_at)) }
    }

    pub(super) fn found_address(&mut self, address: IpAddr) {
        self.address = Some(address);
    }

    fn wanted(&self, offer: &Offer, aim: Aim) -> Option<Registration> {
        Some(offer.registration(offer.address.or(self.address)?, self.epoch, aim == Aim::Serve))
    }

    /// What a write says, now that it is known what is there. None: it is another's, and later. A new life takes over
    /// from whomever it finds, and one that goes on only from what is not later than itself.
    pub(super) fn claim(
        &mut self,
        offer: &Offer,
        found: Option<&Found>,
        unix_ms: u64,
        (now, chance): (Instant, f64),
    ) -> Option<(Registration, Over)> {
        let (theirs, version) = found.map_or((0, 0), |found| (found.epoch, found.version));
        let later = found.and_then(|found| found.later_than(self.epoch));
        if let Some(owner) = later.filter(|_| self.epoch > 0) {
            self.phase = Phase::Superseded;
            self.error = Some(format!(
                "another meshd registered it later under this host's name, at {}; if that host is a copy of this one, give it \
                 an identity of its own (meshd join)",
                owner.address
            ));
            self.write_at = now + jittered(self.ttl / 2, chance);
            return None;
        }
        // Also an attempt whose answer never comes may have been carried out.
        self.epoch = unix_ms.max(theirs.max(self.epoch).saturating_add(1));
        Some((self.wanted(offer, Aim::Serve)?, Over::Version(version)))
    }

    /// What a write says that replaces our own.
    pub(super) fn update(&self, offer: &Offer, aim: Aim) -> Option<(Registration, Over)> {
        Some((self.wanted(offer, aim)?, Over::Own(self.own.as_ref()?.hold)))
    }

    /// `began`: when the backend was asked; the lease counts from there.
    pub(super) fn written(&mut self, said: Registration, hold: Hold, aim: Aim, (began, chance): (Instant, f64)) {
        let renewed = (began + jittered(self.ttl / 3, chance), began + self.ttl);
        let (keep_at, good_until) = match &self.own {
            Some(own) => (own.keep_at, own.good_until),
            None => renewed,
        };
        self.own = Some(Own { hold, said, keep_at, good_until });
        self.phase = if aim == Aim::Serve { Phase::Held } else { Phase::Draining };
        self.went_well();
    }

    pub(super) fn kept(&mut self, (began, chance): (Instant, f64)) {
        if let Some(own) = &mut self.own {
            own.keep_at = began + jittered(self.ttl / 3, chance);
            own.good_until = began + self.ttl;
        }
        self.went_well();
    }

    fn went_well(&mut self) {
        self.error = None;
        self.backoff = Backoff::default();
    }

    /// What was written is not there, or another's. All hosts may see that at once.
    pub(super) fn lost(&mut self, (now, chance): (Instant, f64)) {
        self.own = None;
        self.phase = Phase::Registering;
        self.write_at = now + self.backoff.pause(Duration::ZERO, chance);
    }

    pub(super) fn failed(&mut self, error: String, (now, chance): (Instant, f64)) {
        self.error = Some(error);
        let again = now + self.backoff.pause(Duration::ZERO, chance);
        self.write_at = again;
        match &mut self.own {
            Some(own) if now < own.good_until => own.keep_at = own.keep_at.max(again),
            _ => {
                self.own = None;
                self.phase = Phase::Registering;
            }
        }
    }

    pub(super) fn withdrawn(&mut self) {
        self.own = None;
        self.phase = Phase::Gone;
        self.error = None;
    }
}

#[cfg(test)]
#[path = "life_tests.rs"]
mod tests;
