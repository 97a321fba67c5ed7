//! Bridges: the root before certifies the key of the root that signs, and chains carry that. Whoever knows only the root
//! before believes what the new one signs; whoever knows the new one never looks at it.

use serde::{Deserialize, Serialize};

use super::trust::{Root, Trust};
use crate::admin::key_sha256;
use crate::lifetimes::Lifetimes;
use crate::store::{DbError, View, base64, deny};
use crate::times::seconds;

/// A root's key, certified by the one before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bridge {
    /// The root that vouches.
    pub(crate) by: String,
    #[serde(with = "base64")]
    pub(crate) certificate: Vec<u8>,
    pub(crate) not_after: i64,
}

impl Bridge {
    /// Whether a leaf of this end may have it in its chain: a chain ends with the first of its certificates, and never
    /// with this one.
    pub(crate) fn outlives(&self, leaf_end: i64) -> bool {
        leaf_end <= self.not_after
    }
}

/// The root that is to vouch for another that is about to sign, and until when. Nobody in an emergency, nor between our
/// roots and others'.
pub(crate) fn planned<'t>(trust: &'t Trust, next: &Root, lifetimes: &Lifetimes, now: i64) -> Option<(&'t Root, i64)> {
    let by = trust.active()?;
    if lifetimes.bridge.is_zero() || trust.urgent.is_some() || !vouches(by) || !vouches(next) {
        return None;
    }
    let end = (now + seconds(lifetimes.bridge)).min(by.not_after.min(next.not_after) - seconds(lifetimes.skew));
    (end > now).then_some((by, end))
}

fn vouches(root: &Root) -> bool {
    stands(root) && root.upstream.is_none() && !root.wrapped_key.is_empty()
}

fn stands(root: &Root) -> bool {
    root.state.is_in_bundle() && root.tainted_at.is_none()
}

impl Trust {
    /// What chains under this root carry: nothing once it or the root that vouches is tainted or has left.
    pub(crate) fn bridge_to(&self, id: &str) -> Option<&Bridge> {
        let standing = |id: &str| self.roots.iter().find(|root| root.id == id).filter(|root| stands(root));
        let bridge = standing(id)?.bridge.as_ref()?;
        standing(&bridge.by).map(|_| bridge)
    }

    /// The same as this server carries it: none if that is switched off, nor with either key denied. Hosts from before there
    /// were bridges count whoever signed a certificate of a chain.
    pub(crate) fn carried_to(
        &self,
        id: &str,
        view: &mut dyn View,
        lifetimes: &Lifetimes,
    ) -> Result<Option<&Bridge>, DbError> {
        let Some(bridge) = self.bridge_to(id).filter(|_| !lifetimes.bridge.is_zero()) else { return Ok(None) };
        let denied = deny::deny(view)?;
        let mut ends = self.roots.iter().filter(|root| root.id == id || root.id == bridge.by);
        let is_denied = ends.any(|root| denied.names_authority(&key_sha256(&root.certificate)));
        Ok(Some(bridge).filter(|_| !is_denied))
    }

    /// The root that this one vouched for, by a bridge that may be shown yet, and whose key others may have since.
    pub(crate) fn vouched_in_vain(&self, by: &str, skew: i64, now: i64) -> Option<&Root> {
        let is_bad = |root: &&Root| root.tainted_at.is_some() && shown_until(root, Some(by), skew) > Some(now);
        self.roots.iter().find(is_bad)
    }

    /// Roots that left because others may have their key, and until when whoever has the root that vouched for them
    /// would believe that key on.
    pub(crate) fn believed_on(&self, skew: i64, now: i64) -> impl Iterator<Item = (&Root, i64)> {
        let left = self.roots.iter().filter(|root| root.tainted_at.is_some() && !root.state.is_in_bundle());
        left.filter_map(move |root| Some((root, shown_until(root, None, skew)?))).filter(move |(_, until)| *until > now)
    }
}

/// Until when the bridge to a root convinces anybody, if there is one (by that root).
fn shown_until(root: &Root, by: Option<&str>, skew: i64) -> Option<i64> {
    let bridge = root.bridge.as_ref().filter(|bridge| by.is_none_or(|by| bridge.by == by))?;
    Some(bridge.not_after + skew)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rotation::RootState;
    use crate::rotation::trust::{Upstream, Urgency};

    const DAY: i64 = 86_400;
    const NOW: i64 = 1_790_000_000;

    fn root(id: &str, state: RootState) -> Root {
        Root {
            id: id.to_owned(),
            state,
            certificate: vec![],
            wrapped_key: vec![1],
            published_sequence: 1,
            published_at: NOW - 10 * DAY,
            activated_at: None,
            removed_at: None,
            tainted_at: None,
            not_after: NOW + 200 * DAY,
            upstream: None,
            bridge: None,
        }
    }

    fn about_to_activate() -> Trust {
        let roots = vec![root("first", RootState::Active), root("second", RootState::Prepared)];
        Trust { roots, ..Trust::default() }
    }

    fn plan(trust: &Trust, lifetimes: &Lifetimes) -> Option<(String, i64)> {
        planned(trust, &trust.roots[1], lifetimes, NOW).map(|(by, end)| (by.id.clone(), end))
    }

    #[test]
    fn the_root_before_vouches_for_a_month_and_never_beyond_its_own_end() {
        let (mut trust, lifetimes) = (about_to_activate(), Lifetimes::default());
        assert_eq!(plan(&trust, &lifetimes), Some(("first".to_owned(), NOW + 31 * DAY)));
        trust.roots[0].not_after = NOW + 8 * DAY;
        assert_eq!(plan(&trust, &lifetimes), Some(("first".to_owned(), NOW + 8 * DAY - seconds(lifetimes.skew))));
        trust.roots[0].not_after = NOW + 1;
        assert_eq!(plan(&trust, &lifetimes), None, "nothing is left of it");
    }

    #[test]
    fn nobody_vouches_in_an_emergency_nor_with_a_key_that_is_elsewhere() {
        let lifetimes = Lifetimes::default();
        let changed = |change: fn(&mut Trust)| {
            let mut trust = about_to_activate();
            change(&mut trust);
            plan(&trust, &lifetimes)
        };
        let outside = |root: &mut Root| {
            root.wrapped_key.clear();
            root.upstream =
                Some(Upstream { id: "i".to_owned(), certificate: vec![], wrapped_key: vec![2], not_after: NOW });
        };
        assert!(changed(|_| {}).is_some());
        assert_eq!(changed(|trust| trust.roots[0].tainted_at = Some(NOW)), None);
        assert_eq!(changed(|trust| trust.urgent = Some(Urgency { since: NOW, force: false })), None);
        assert_eq!(changed(|trust| trust.roots[0].wrapped_key.clear()), None);
        for index in [0, 1] {
            let mut trust = about_to_activate();
            outside(&mut trust.roots[index]);
            assert_eq!(plan(&trust, &lifetimes), None, "from outside: {index}");
        }
        assert_eq!(plan(&about_to_activate(), &Lifetimes { bridge: std::time::Duration::ZERO, ..lifetimes }), None);
    }

    #[test]
    fn a_bridge_falls_with_either_end() {
        let bridged = || {
            let mut trust = about_to_activate();
            trust.activate("second", NOW);
            let bridge = Bridge { by: "first".to_owned(), certificate: vec![], not_after: NOW + 31 * DAY };
            trust.roots[1].bridge = Some(bridge);
            trust
        };
        assert!(bridged().bridge_to("second").is_some());
        assert_eq!(bridged().bridge_to("first"), None);
        for index in [0, 1] {
            let mut trust = bridged();
            trust.roots[index].tainted_at = Some(NOW);
            assert_eq!(trust.bridge_to("second"), None, "tainted: {index}");
        }
        let mut trust = bridged();
        trust.remove("first", NOW);
        assert_eq!(trust.bridge_to("second"), None, "nobody is to believe that root any more");
    }

    #[test]
    fn a_tainted_root_is_believed_on_after_it_left_until_its_bridge_has_ended() {
        let mut trust = about_to_activate();
        trust.activate("second", NOW);
        let (end, skew) = (NOW + 31 * DAY, 300);
        trust.roots[1].bridge = Some(Bridge { by: "first".to_owned(), certificate: vec![], not_after: end });
        let believed = |trust: &Trust, now| trust.believed_on(skew, now).map(|(_, until)| until).collect::<Vec<_>>();
        let in_vain = |trust: &Trust, now| trust.vouched_in_vain("first", skew, now).is_some();
        assert!(!in_vain(&trust, NOW));
        trust.roots[1].tainted_at = Some(NOW);
        assert!(in_vain(&trust, NOW) && trust.vouched_in_vain("second", skew, NOW).is_none());
        assert!(believed(&trust, NOW).is_empty(), "hosts that depend on it are believed by it");
        trust.remove("second", NOW);
        assert_eq!(believed(&trust, NOW), [end + skew]);
        assert!(believed(&trust, end + skew).is_empty());
        assert!(in_vain(&trust, end + skew - 1) && !in_vain(&trust, end + skew));
    }

    #[test]
    fn it_is_carried_by_no_leaf_that_ends_later() {
        let bridge = Bridge { by: String::new(), certificate: vec![], not_after: NOW };
        assert!(bridge.outlives(NOW) && !bridge.outlives(NOW + 1));
    }
}
