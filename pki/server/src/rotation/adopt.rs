//! Roots of a PKI that was lost: without their keys, so that what they have signed is believed until it ends.

use super::step::Rotator;
use super::{Root, RootState};
use crate::audit::Event;
use crate::keeping::roster::KnownRoot;
use crate::state_dir::StateError;
use crate::store::{Records, trust};
use crate::times::unix;

impl Rotator<'_> {
    /// Puts them into the bundle beside our own, as roots that sign nothing any more, under a sequence above `above`.
    pub(crate) fn adopt(
        &self,
        records: &mut dyn Records,
        roots: &[KnownRoot],
        above: u64,
    ) -> Result<Option<Event>, StateError> {
        let mut trust = trust::trust(records)?;
        let now = unix(self.now);
        let is_new = |root: &&KnownRoot| !trust.roots.iter().any(|known| known.certificate == root.certificate);
        let new: Vec<Root> =
            roots.iter().filter(|root| root.not_after > now).filter(is_new).map(|root| old(root, now)).collect();
        if new.is_empty() && trust.sequence > above {
            return Ok(None);
        }
        let ids: Vec<String> = new.iter().map(|root| root.id.clone()).collect();
        trust.roots.splice(0..0, new);
        trust.sequence = trust.sequence.max(above);
        self.publish(records, &mut trust)?;
        trust::put_trust(records, &trust)?;
        let detail = Some(format!("of the PKI before: {}; bundle {}", ids.join(" "), trust.sequence));
        Ok(Some(Event { event: "root_adopt", result: "ok", detail, ..Event::default() }))
    }
}

fn old(root: &KnownRoot, now: i64) -> Root {
    Root {
        id: root.id.clone(),
        state: RootState::Old,
        certificate: root.certificate.clone(),
        wrapped_key: Vec::new(),
        published_sequence: 0,
        published_at: now,
        // Here it never was: the first root of this PKI is still its first.
        activated_at: None,
        removed_at: None,
        tainted_at: None,
        not_after: root.not_after,
        upstream: None,
        bridge: None,
    }
}
