//! How long certificates live and how often they are replaced.

use std::time::Duration;

use serde::{Deserialize, Serialize};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Leaf certificates start this long ago, for hosts whose clock is behind.
pub const LEAF_BACKDATE: Duration = HOUR;
/// Authorities start this long ago, so that no leaf ever starts before its issuer.
pub const AUTHORITY_BACKDATE: Duration = Duration::from_secs(48 * 3600);

/// Each life is several times the time between replacements, so that missed ones are an alarm and not an outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifetimes {
    pub root: Duration,
    pub root_every: Duration,
    /// The first root is replaced this early: a rehearsal on the real fleet, while everybody remembers the setup.
    pub first_root: Duration,
    pub intermediate: Duration,
    pub intermediate_every: Duration,
    pub leaf: Duration,
    /// The PKI's own server certificate, held in memory only.
    pub endpoint: Duration,
    pub endpoint_every: Duration,
    pub jwt_key: Duration,
    pub jwt_key_every: Duration,
    /// Between the first bundle with a JWT key and the first token under it: consumers cache bundles.
    pub jwt_key_wait: Duration,
    /// The longest life of a JWT-SVID.
    pub jwt: Duration,
    /// Every end is clamped this far before the end of what it depends on: clocks differ that much.
    pub skew: Duration,
    /// An old root stays in the bundle this much longer than any proof asks for.
    pub hold: Duration,
    /// Of the certificate by which the root before vouches for the one that signs; zero for none.
    pub bridge: Duration,
    /// A prepared root is activated, acknowledged or not, when the active one has only this left.
    pub last_call: Duration,
    /// What followers of the bundle are told about when to ask again.
    pub refresh_hint: Duration,
}

impl Default for Lifetimes {
    fn default() -> Lifetimes {
        Lifetimes {
            root: 365 * DAY,
            root_every: 90 * DAY,
            first_root: 7 * DAY,
            intermediate: 14 * DAY,
            intermediate_every: 3 * DAY,
            leaf: DAY,
            endpoint: DAY,
            endpoint_every: 8 * HOUR,
            jwt_key: 30 * DAY,
            jwt_key_every: 7 * DAY,
            jwt_key_wait: DAY,
            jwt: HOUR,
            skew: Duration::from_secs(5 * 60),
            hold: 30 * DAY,
            // As long as the root before stays.
            bridge: 31 * DAY,
            last_call: 8 * DAY,
            refresh_hint: Duration::from_secs(5 * 60),
        }
    }
}

impl Lifetimes {
    /// The whole life of a PKI in minutes, for rehearsals and tests: everything follows from the life of a leaf, roots are
    /// replaced as fast as that allows, a bundle never holds more than three.
    pub fn rehearsal(leaf: Duration) -> Lifetimes {
        let least = Duration::from_secs(1);
        Lifetimes {
            root: leaf * 24,
            root_every: leaf * 2,
            first_root: leaf,
            intermediate: leaf * 4,
            intermediate_every: leaf,
            leaf,
            endpoint: leaf,
            endpoint_every: (leaf / 3).max(least),
            jwt_key: leaf * 6,
            jwt_key_every: leaf * 3,
            jwt_key_wait: leaf,
            jwt: (leaf / 2).max(least),
            skew: least,
            hold: leaf,
            bridge: leaf * 2,
            last_call: leaf * 4,
            refresh_hint: least,
        }
    }

    /// How often to look whether a step is due. Every 10 s unless a leaf lives for less than 200 s.
    pub(crate) fn look_every(&self) -> Duration {
        (self.leaf / 20).clamp(Duration::from_millis(200), Duration::from_secs(10))
    }

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
        if self.root < self.root_every * 4 {
            return Err("a root must live at least 4 times as long as its replacement interval".to_owned());
        }
        if !self.bridge.is_zero() && self.bridge < self.leaf * 2 {
            return Err("a bridge must live at least twice as long as a leaf, or no chain has it for long".to_owned());
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
    fn a_rehearsal_holds_the_same_ratios() {
        for leaf in [2, 5, 20, 3600] {
            Lifetimes::rehearsal(Duration::from_secs(leaf)).check().unwrap();
        }
        assert_eq!(Lifetimes::default().look_every(), Duration::from_secs(10));
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
