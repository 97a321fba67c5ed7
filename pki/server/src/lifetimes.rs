//! How long certificates live and how often they are replaced.

use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Every end is clamped this far before the end of what it depends on: clocks differ that much.
pub const SKEW: Duration = Duration::from_secs(5 * 60);
/// Leaf certificates start this long ago, for hosts whose clock is behind.
pub const LEAF_BACKDATE: Duration = HOUR;
/// Authorities start this long ago, so that no leaf ever starts before its issuer.
pub const AUTHORITY_BACKDATE: Duration = Duration::from_secs(48 * 3600);
/// The PKI's own server certificate, held in memory only.
pub const ENDPOINT: Duration = DAY;
pub const ENDPOINT_EVERY: Duration = Duration::from_secs(8 * 3600);

/// Each life is several times the time between replacements, so that missed ones are an alarm and not an outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    pub root: Duration,
    pub intermediate: Duration,
    pub intermediate_every: Duration,
    pub leaf: Duration,
}

impl Default for Lifetimes {
    fn default() -> Lifetimes {
        Lifetimes { root: 365 * DAY, intermediate: 14 * DAY, intermediate_every: 3 * DAY, leaf: DAY }
    }
}

impl Lifetimes {
    pub fn check(&self) -> Result<(), String> {
        let seconds = Duration::as_secs;
        if self.leaf < Duration::from_secs(2) {
            return Err("the leaf lifetime is below 2 s; give --leaf-ttl at least 2 s".to_owned());
        }
        let longest_leaf = self.intermediate.saturating_sub(self.intermediate_every) / 2;
        if self.leaf > longest_leaf {
            return Err(format!(
                "the leaf lifetime of {} s is too long: with intermediates of {} s replaced every {} s it may be at \
                 most {} s; lower --leaf-ttl",
                seconds(&self.leaf),
                seconds(&self.intermediate),
                seconds(&self.intermediate_every),
                seconds(&longest_leaf)
            ));
        }
        if self.intermediate < self.intermediate_every * 4 {
            return Err("an intermediate must live at least 4 times as long as its replacement interval".to_owned());
        }
        if self.root < self.intermediate * 4 {
            return Err("the root must live at least 4 times as long as an intermediate".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_hold_their_own_ratios() {
        Lifetimes::default().check().unwrap();
    }

    #[test]
    fn a_leaf_that_outlives_missed_rotations_is_refused_with_the_limit() {
        let long = Lifetimes { leaf: 6 * DAY, ..Lifetimes::default() };
        let error = long.check().unwrap_err();
        assert!(error.contains("at most 475200 s") && error.contains("--leaf-ttl"), "{error}");
        assert!(Lifetimes { leaf: Duration::from_secs(1), ..Lifetimes::default() }.check().is_err());
        assert!(Lifetimes { intermediate_every: 4 * DAY, ..Lifetimes::default() }.check().is_err());
        assert!(Lifetimes { root: 30 * DAY, ..Lifetimes::default() }.check().is_err());
    }
}
