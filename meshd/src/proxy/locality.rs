//! HOW FAR: endpoints near this host first, farther ones while too little of that works. Pure; takes `now`.
//!
//! ```text
//!            less than half of what the nearest could carry works
//!   Host ---------> Zone ---------> Site ---------> Elsewhere         (at once, as far as is needed)
//!        <--------       <--------       <---------
//!            seven tenths of it have worked without a break for 10 s
//! ```
//! Within what is used, the balancer chooses by cost: a nearer endpoint is mostly the cheaper one anyhow.

use std::cell::Cell;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use meshd_discovery::Endpoint;

/// Of the weight of the nearest endpoints so much must work; Envoy overprovisions a locality by 1.4, so that it is left
/// from below 71 %, in shares. Ours is left in steps.
const TOO_LITTLE: f64 = 0.5;
/// Apart from the above, so that one endpoint that comes and goes moves nothing.
const ENOUGH: f64 = 0.7;
const ENOUGH_FOR: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Distance {
    Host,
    Zone,
    Site,
    #[default]
    Elsewhere,
}

const DISTANCES: [Distance; 4] = [Distance::Host, Distance::Zone, Distance::Site, Distance::Elsewhere];

/// Where this host is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locality {
    /// Empty: unknown, and then all endpoints are equally far.
    zone: String,
    /// Other zones of the same site.
    site: Vec<String>,
    addresses: Vec<IpAddr>,
}

impl Locality {
    pub fn new(zone: &str, site: &[String], addresses: Vec<IpAddr>) -> Locality {
        Locality { zone: zone.to_owned(), site: site.to_vec(), addresses }
    }

    pub(super) fn distance(&self, endpoint: &Endpoint) -> Distance {
        if self.zone.is_empty() {
            Distance::Elsewhere
        } else if self.addresses.contains(&endpoint.dial.ip()) {
            Distance::Host
        } else if *endpoint.zone == *self.zone {
            Distance::Zone
        } else if self.site.iter().any(|zone| **zone == *endpoint.zone) {
            Distance::Site
        } else {
            Distance::Elsewhere
        }
    }
}

/// Weights of a service's endpoints by their distance.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Weights([u64; 4]);

impl Weights {
    pub(super) fn add(&mut self, distance: Distance, weight: u32) {
        self.0[distance as usize] += u64::from(weight);
    }

    fn nearest(&self) -> u64 {
        self.0.into_iter().find(|weight| *weight > 0).unwrap_or(0)
    }

    /// How far one must go for so much.
    fn reaching(&self, needed: f64) -> Distance {
        let mut sum = 0;
        let enough = DISTANCES.into_iter().find(|distance| {
            sum += self.0[*distance as usize];
            sum > 0 && sum as f64 >= needed
        });
        enough.unwrap_or_default()
    }
}

/// How far out the endpoints of one service are used: see the picture above.
#[derive(Debug, Default)]
pub(super) struct Reach {
    /// `None` before the first look.
    farthest: Cell<Option<Distance>>,
    enough_since: Cell<Option<Instant>>,
}

impl Reach {
    pub(super) fn look(&self, all: Weights, working: Weights, now: Instant) -> Distance {
        let capacity = all.nearest() as f64;
        let (least, comfortable) = (working.reaching(capacity * TOO_LITTLE), working.reaching(capacity * ENOUGH));
        let Some(farthest) = self.farthest.get().filter(|farthest| *farthest >= least) else {
            self.enough_since.set(None);
            self.farthest.set(Some(least));
            return least;
        };
        if comfortable >= farthest {
            self.enough_since.set(None);
            return farthest;
        }
        let since = self.enough_since.get().unwrap_or(now);
        if now.saturating_duration_since(since) < ENOUGH_FOR {
            self.enough_since.set(Some(since));
            return farthest;
        }
        self.enough_since.set(None);
        self.farthest.set(Some(comfortable));
        comfortable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(by_distance: [u64; 4]) -> Weights {
        Weights(by_distance)
    }

    const ALL: [u64; 4] = [0, 400, 300, 900];

    #[test]
    fn the_nearest_are_used_alone_while_half_of_them_work() {
        let (reach, now) = (Reach::default(), Instant::now());
        let look = |working: [u64; 4]| reach.look(weights(ALL), weights(working), now);
        assert_eq!(look([0, 400, 300, 900]), Distance::Zone);
        assert_eq!(look([0, 200, 300, 900]), Distance::Zone);
        assert_eq!(look([0, 100, 300, 900]), Distance::Site);
        assert_eq!(look([0, 0, 100, 900]), Distance::Elsewhere);
    }

    #[test]
    fn it_comes_back_when_enough_has_worked_for_long_enough() {
        let (reach, start) = (Reach::default(), Instant::now());
        let look = |near: u64, after: u64| {
            let now = start + Duration::from_secs(after);
            reach.look(weights(ALL), weights([0, near, 300, 900]), now)
        };
        assert_eq!(look(100, 0), Distance::Site);
        assert_eq!(look(200, 100), Distance::Site, "half is not enough to come back");
        assert_eq!(look(300, 101), Distance::Site, "too soon");
        assert_eq!(look(200, 105), Distance::Site, "a break");
        assert_eq!(look(300, 106), Distance::Site);
        assert_eq!(look(300, 115), Distance::Site);
        assert_eq!(look(300, 116), Distance::Zone);
    }

    #[test]
    fn when_nothing_works_everything_is_within_reach() {
        let reach = Reach::default();
        assert_eq!(reach.look(weights(ALL), weights([0; 4]), Instant::now()), Distance::Elsewhere);
        assert_eq!(Reach::default().look(weights([0; 4]), weights([0; 4]), Instant::now()), Distance::Elsewhere);
    }
}
