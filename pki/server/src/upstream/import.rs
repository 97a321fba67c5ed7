//! What becomes of an intermediate from outside among the roots.

use meshd_identity::statements::Whom;

use super::check::{Checked, Part, Unusable};
use super::commands::UpstreamError;
use crate::admin::{Actor, key_sha256};
use crate::audit::Event;
use crate::rotation::decide::MOST_ROOTS;
use crate::rotation::step::Rotator;
use crate::rotation::trust::Upstream;
use crate::rotation::{Root, RootState};
use crate::state_dir::StateError;
use crate::store::{DbError, Records, View, deny, intermediates, trust};
use crate::times::{rfc3339, unix};

/// Who brings an intermediate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Operator,
    /// Read again at every start, whatever came in between.
    Files,
}

/// What became of an intermediate from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Imported {
    /// Its root is active already: it signs from now on.
    InUse,
    /// Its root is new, or not active yet, and waits until every verifier has it.
    Waiting,
    /// It was there before.
    Known,
}

impl std::fmt::Display for Imported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Imported::InUse => "imported; it signs from now on",
            Imported::Waiting => {
                "imported; its root is in the bundle now and signs when every verifier has it, see `meshd-pki status`"
            }
            Imported::Known => "it was imported before; nothing to do",
        })
    }
}

/// Whether every server that signed with it signs with another now.
fn was_replaced(view: &mut dyn View, id: &str) -> Result<bool, DbError> {
    let known = intermediates::all(view)?.into_iter().filter(|one| one.id == id);
    let standing: Vec<bool> = known.map(|one| one.replaced_at.is_some()).collect();
    Ok(!standing.is_empty() && standing.into_iter().all(|replaced| replaced))
}

fn is_denied(view: &mut dyn View, checked: &Checked) -> Result<bool, DbError> {
    let keys = [&checked.intermediate, &checked.root].map(|part| key_sha256(&part.certificate));
    let mut denied = deny::deny(view)?.entries.into_iter();
    Ok(denied.any(|one| matches!(one.whom, Whom::Authority(key) if keys.contains(&key))))
}

impl Rotator<'_> {
    /// Takes over an intermediate from outside. A root that is new waits as a prepared one of our own does.
    pub(crate) fn import(
        &self,
        records: &mut dyn Records,
        checked: &Checked,
        source: Source,
    ) -> Result<(Imported, Option<Event>), UpstreamError> {
        let mut trust = trust::trust(records)?;
        let (root, new) = (&checked.root, &checked.intermediate);
        let wrapped_key = self.kek.wrap(&new.id, &checked.key).map_err(StateError::from)?;
        let (id, certificate, not_after) = (new.id.clone(), new.certificate.clone(), new.not_after);
        let upstream = Upstream { id, certificate, wrapped_key, not_after };
        let was_replaced = was_replaced(records, &new.id)?;
        let is_denied = is_denied(records, checked)?;
        let known = trust.roots.iter_mut().find(|one| one.id == root.id);
        if let Some((known, since)) = known.as_ref().and_then(|known| known.tainted_at.map(|since| (known, since))) {
            return Err(UpstreamError::Tainted { root: known.id.clone(), since: rfc3339(since) });
        }
        if known.as_ref().is_some_and(|known| known.certificate != root.certificate) {
            let problem = "names itself as another root of this PKI does".to_owned();
            return Err(Unusable::Authority { which: "root", problem }.into());
        }
        let imported = match known.filter(|one| one.state.is_in_bundle()) {
            Some(known)
                if known.state != RootState::Old
                    && known.upstream.as_ref().is_some_and(|held| held.certificate == new.certificate) =>
            {
                return Ok((Imported::Known, None));
            }
            _ if is_denied => return Err(UpstreamError::Denied { id: new.id.clone() }),
            _ if source == Source::Files && was_replaced => {
                return Err(UpstreamError::Replaced { id: new.id.clone() });
            }
            Some(known) => {
                known.upstream = Some(upstream);
                if known.state == RootState::Old {
                    // Every verifier has it still, so that its gates are open.
                    known.state = RootState::Prepared;
                }
                if known.state == RootState::Active { Imported::InUse } else { Imported::Waiting }
            }
            None => {
                // As for one of our own: one more is better than going on with a root that has to be left.
                let has_to_go = trust.active().is_some_and(|active| active.tainted_at.is_some());
                if trust.in_bundle().count() >= MOST_ROOTS + usize::from(has_to_go) {
                    return Err(UpstreamError::TooManyRoots);
                }
                // One that had left begins anew: two records of one root would each be taken for the other.
                trust.roots.retain(|one| one.id != root.id);
                trust.roots.push(self.prepared(root, upstream));
                self.publish(records, &mut trust)?;
                Imported::Waiting
            }
        };
        trust::put_trust(records, &trust)?;
        let detail = Some(format!("intermediate {} from outside, ends {}", new.id, rfc3339(new.not_after)));
        let authority = Some(root.id.clone());
        let by = (source == Source::Operator).then(|| Actor::local().name);
        Ok((imported, Some(Event { event: "upstream", result: "ok", by, authority, detail, ..Event::default() })))
    }

    fn prepared(&self, root: &Part, upstream: Upstream) -> Root {
        Root {
            id: root.id.clone(),
            state: RootState::Prepared,
            certificate: root.certificate.clone(),
            wrapped_key: Vec::new(),
            published_sequence: 0,
            published_at: unix(self.now),
            activated_at: None,
            removed_at: None,
            tainted_at: None,
            not_after: root.not_after,
            upstream: Some(upstream),
            bridge: None,
        }
    }
}
