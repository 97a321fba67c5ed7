//! What a PKI cannot serve without, when it is not sure of its clock: no more than that is changed.

use super::step::Rotator;
use super::{Root, RootState, Trust};
use crate::audit::Event;
use crate::state_dir::StateError;
use crate::store::{Records, trust};
use crate::times::{seconds, unix};

impl Rotator<'_> {
    /// Sees to it that a root and a JWT key can sign now. A root that hosts know comes before a new one. `is_latest` when
    /// what is on record of a later time than now was made by a wrong clock.
    pub(crate) fn provide(&self, records: &mut dyn Records, is_latest: bool) -> Result<Vec<Event>, StateError> {
        let mut trust = trust::trust(records)?;
        let now = unix(self.now);
        let mut done = Vec::new();
        // One from outside is the operator's to replace, and its end may be that of a wrong clock.
        if let Some(next) = self.brought(&trust) {
            trust.activate(&next, now);
            done.push(event("root_activate", next, "at once: the intermediate from outside has ended"));
        } else if !trust.active().is_some_and(|root| root.upstream.is_some() || self.can_sign(root, is_latest)) {
            done.push(self.provide_root(&mut trust)?);
        }
        if trust.jwt_signer(now).is_none() {
            let kid = self.add_jwt_key(&mut trust, now)?;
            done.push(event("jwt_key_prepare", kid, "at once: there was none"));
        }
        if !done.is_empty() {
            self.publish(records, &mut trust)?;
            trust::put_trust(records, &trust)?;
        }
        Ok(done)
    }

    /// Of an intermediate from outside that has ended, the root to go on with, if another was brought.
    fn brought(&self, trust: &Trust) -> Option<String> {
        let end = unix(self.now) + 2 * seconds(self.lifetimes.skew);
        let goes_on = |root: &&Root| root.upstream.as_ref().is_some_and(|given| given.not_after > end);
        trust.active().filter(|root| root.upstream.is_some() && !goes_on(root))?;
        let mut prepared =
            trust.roots.iter().filter(|root| root.state == RootState::Prepared && root.tainted_at.is_none());
        prepared.rfind(goes_on).map(|root| root.id.clone())
    }

    fn provide_root(&self, trust: &mut Trust) -> Result<Event, StateError> {
        let others = trust.in_bundle().filter(|root| root.state != RootState::Active && root.tainted_at.is_none());
        let known = others.filter(|root| self.can_sign(root, true)).max_by_key(|root| root.published_at);
        let id = match known {
            Some(root) => root.id.clone(),
            None => self.add_root(trust)?.id.clone(),
        };
        trust.activate(&id, unix(self.now));
        Ok(event("root_activate", id, "at once: there was no root that can sign"))
    }

    /// Whether what it signs is valid now.
    fn can_sign(&self, root: &Root, is_latest: bool) -> bool {
        let (now, skew) = (unix(self.now), seconds(self.lifetimes.skew));
        // An intermediate ends before its root, and a leaf before its intermediate.
        let goes_on = root.not_after - 2 * skew > now;
        let has_begun = !is_latest || root.published_at <= now + skew;
        !root.wrapped_key.is_empty() && goes_on && has_begun
    }
}

fn event(event: &'static str, authority: String, why: &str) -> Event {
    Event { event, result: "ok", authority: Some(authority), detail: Some(why.to_owned()), ..Event::default() }
}
