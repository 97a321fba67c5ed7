//! When JWT keys come and go. A key is in the bundle long before it signs and long after: consumers cache bundles.

use super::trust::JwtKey;
use crate::lifetimes::Lifetimes;
use crate::times::seconds;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum JwtStep {
    /// Put a new key into the bundle; it may sign from then on.
    Add {
        usable_at: i64,
    },
    Remove {
        kid: String,
    },
}

pub(crate) fn next(keys: &[JwtKey], lifetimes: &Lifetimes, now: i64) -> Option<JwtStep> {
    if let Some(ended) = keys.iter().find(|key| key.not_after <= now) {
        // Everything it signed has ended before: the life of a token is within that of its key.
        return Some(JwtStep::Remove { kid: ended.kid.clone() });
    }
    // One of a later time was made by a wrong clock, and does not put off the next.
    let Some(newest) = keys.iter().map(|key| key.published_at).filter(|at| *at <= now).max() else {
        // Nobody can have cached anything: the first one signs at once.
        return Some(JwtStep::Add { usable_at: now });
    };
    let due = newest + seconds(lifetimes.jwt_key_every);
    let signs_now = keys.iter().any(|key| key.usable_at <= now);
    let usable_at = if signs_now { now + seconds(lifetimes.jwt_key_wait) } else { now };
    (due <= now).then_some(JwtStep::Add { usable_at })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    fn run(days: i64) -> Vec<JwtKey> {
        let lifetimes = Lifetimes::default();
        let mut keys: Vec<JwtKey> = Vec::new();
        for now in (0..days * DAY).step_by(3600) {
            while let Some(step) = next(&keys, &lifetimes, now) {
                match step {
                    JwtStep::Add { usable_at } => keys.push(JwtKey {
                        kid: now.to_string(),
                        public_key: vec![],
                        wrapped_key: vec![],
                        published_at: now,
                        usable_at,
                        not_after: now + seconds(lifetimes.jwt_key),
                    }),
                    JwtStep::Remove { kid } => keys.retain(|key| key.kid != kid),
                }
            }
            let signs = keys.iter().filter(|key| key.usable_at <= now).max_by_key(|key| key.usable_at).unwrap();
            assert!(signs.not_after > now + DAY, "a key that signs is nowhere near its end");
            assert!(signs.published_at == 0 || signs.usable_at - signs.published_at >= DAY);
        }
        keys
    }

    #[test]
    fn a_year_of_keys_never_lacks_a_signer_and_keeps_few() {
        assert!(run(1).len() == 1, "the first key signs at once");
        assert!((4..=5).contains(&run(365).len()));
    }
}
