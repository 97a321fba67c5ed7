//! Taking a step: keys, bundle, signatures and state in one transaction.

use std::time::SystemTime;

use meshd_identity::signed;
use meshd_identity::statements::{BundleStatement, Denied, Whom};
use meshd_identity::{Bundle, BundleError, JwtKey as PublicJwtKey, TrustDomain};
use rcgen::{KeyPair, PublicKeyData};

use super::bridge::{self, Bridge};
use super::decide::{Decision, Despite, Step, Surroundings, decide};
use super::jwt_keys::{self, JwtStep};
use super::{JwtKey, Root, RootState, Trust};
use crate::admin::key_sha256;
use crate::audit::Event;
use crate::authority::{Authority, AuthorityError, new_id};
use crate::keys::Kek;
use crate::lifetimes::Lifetimes;
use crate::state_dir::StateError;
use crate::store::bundles::{self, Signature, StoredBundle};
use crate::store::{DbError, Records, View, deny, hosts, intermediates, trust};
use crate::times::{from_unix, rfc3339, seconds, unix, unix_ms};

/// What taking steps needs besides the records.
pub(crate) struct Rotator<'a> {
    pub(crate) domain: &'a TrustDomain,
    pub(crate) kek: &'a Kek,
    pub(crate) lifetimes: &'a Lifetimes,
    pub(crate) clock_is_good: bool,
    /// The highest sequence of a deny set there ever was.
    pub(crate) deny_floor: u64,
    pub(crate) now: SystemTime,
}

impl Rotator<'_> {
    /// What the rotation would do, and what it waits for.
    pub(crate) fn outlook(&self, view: &mut dyn View) -> Result<(Trust, Decision), DbError> {
        let trust = trust::trust(view)?;
        let decision = self.decide(view, &trust)?;
        Ok((trust, decision))
    }

    pub(crate) fn is_due(&self, view: &mut dyn View) -> Result<bool, DbError> {
        let (trust, decision) = self.outlook(view)?;
        let jwt = jwt_keys::next(&trust.jwt_keys, self.lifetimes, unix(self.now));
        Ok(decision.step.is_some() || (jwt.is_some() && self.clock_is_good))
    }

    fn decide(&self, view: &mut dyn View, trust: &Trust) -> Result<Decision, DbError> {
        // Nothing else waits for hosts.
        let waits = trust.roots.iter().any(|root| matches!(root.state, RootState::Prepared | RootState::Old));
        let world = Surroundings {
            hosts: &if waits { hosts::hosts(view)? } else { Vec::new() },
            intermediates: &intermediates::all(view)?,
            lifetimes: self.lifetimes,
            clock_is_good: self.clock_is_good,
            now: unix(self.now),
        };
        Ok(decide(trust, &world))
    }

    /// The first state of a new PKI: one root, active at once, for there is nobody yet who could lack it.
    pub(crate) fn found(&self, records: &mut dyn Records) -> Result<(Root, Bundle), StateError> {
        let mut trust = Trust { refresh_hint_s: self.lifetimes.refresh_hint.as_secs(), ..Trust::default() };
        self.add_root(&mut trust)?;
        let now = unix(self.now);
        self.add_jwt_key(&mut trust, now)?;
        trust.roots[0].state = RootState::Active;
        trust.roots[0].activated_at = Some(now);
        let bundle = self.publish(records, &mut trust)?;
        trust::put_trust(records, &trust)?;
        Ok((trust.roots.remove(0), bundle))
    }

    /// Takes the step that is due, if any, and says what was done.
    pub(crate) fn advance(&self, records: &mut dyn Records) -> Result<Option<Event>, StateError> {
        let (trust, decision) = self.outlook(records)?;
        if let Some(step) = decision.step {
            return self.commit(records, trust, |trust| self.take(trust, step)).map(Some);
        }
        match jwt_keys::next(&trust.jwt_keys, self.lifetimes, unix(self.now)) {
            Some(step) if self.clock_is_good => {
                self.commit(records, trust, |trust| self.take_jwt(trust, step)).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Takes a step that [`super::ask::judge`] allowed.
    pub(crate) fn take_wished(&self, records: &mut dyn Records, step: Step) -> Result<Event, StateError> {
        let trust = trust::trust(records)?;
        self.commit(records, trust, |trust| self.take(trust, step))
    }

    fn commit(
        &self,
        records: &mut dyn Records,
        mut trust: Trust,
        act: impl FnOnce(&mut Trust) -> Result<Event, StateError>,
    ) -> Result<Event, StateError> {
        let before = trust.clone();
        let mut event = act(&mut trust)?;
        self.deny_bridged(records, (&before, &trust), &mut event)?;
        if in_bundle(&before) != in_bundle(&trust) {
            self.publish(records, &mut trust)?;
        }
        trust::put_trust(records, &trust)?;
        Ok(event)
    }

    /// The key of a root that leaves for its taint is denied while a bridge to it may be shown: the root that vouched
    /// may be in the bundle for a day more, and with hosts that were away.
    fn deny_bridged(
        &self,
        records: &mut dyn Records,
        (before, after): (&Trust, &Trust),
        event: &mut Event,
    ) -> Result<(), StateError> {
        let had = |id: &str| before.in_bundle().any(|root| root.id == id);
        let mut left = keys_to_deny(after, self.lifetimes, unix(self.now));
        left.retain(|(id, _)| had(id));
        let Some(until) = left.iter().map(|(_, key)| key.until).max() else { return Ok(()) };
        let said = if self.deny_floor > deny::deny(records)?.sequence {
            // Hosts hold a newer set, which a change now would take the place of.
            "its key is denied as soon as a host has brought the newer deny set".to_owned()
        } else {
            let include = |all: &mut Vec<Denied>| left.into_iter().for_each(|(_, key)| deny::include(all, key));
            deny::change(records, self.deny_floor, unix_ms(self.now), include)?;
            format!("its key is denied until {}, for there is a bridge to it", rfc3339(until))
        };
        event.detail = Some(event.detail.take().into_iter().chain([said]).collect::<Vec<_>>().join("; "));
        Ok(())
    }

    /// Publishes the same bundle under a sequence above this one, for hosts that have a newer one than the database.
    pub(crate) fn republish(&self, records: &mut dyn Records, above: u64) -> Result<Event, StateError> {
        let mut trust = trust::trust(records)?;
        trust.sequence = trust.sequence.max(above);
        self.publish(records, &mut trust)?;
        trust::put_trust(records, &trust)?;
        let detail = Some(format!("sequence {}", trust.sequence));
        Ok(Event { event: "bundle_republish", result: "ok", detail, ..Event::default() })
    }

    fn take(&self, trust: &mut Trust, step: Step) -> Result<Event, StateError> {
        let now = unix(self.now);
        Ok(match step {
            Step::Prepare => {
                let root = self.add_root(trust)?;
                event("root_prepare", &root.id, format!("ends {}", rfc3339(root.not_after)))
            }
            Step::Activate { root, despite } => {
                let bridge = self.bridge_to(trust, &root);
                let vouched = bridge.as_ref().map(vouched_text);
                trust.activate(&root, now);
                for one in trust.roots.iter_mut().filter(|one| one.id == root) {
                    one.bridge.clone_from(&bridge);
                }
                let detail = despite.map(|why| despite_text(why).to_owned()).into_iter().chain(vouched);
                event("root_activate", &root, detail.collect::<Vec<_>>().join("; "))
            }
            Step::Speak { root } => {
                trust.speak(&root);
                event("root_speak", &root, "signs what hosts are told, no certificates".to_owned())
            }
            Step::Remove { root } => {
                let in_vain = trust.vouched_in_vain(&root, seconds(self.lifetimes.skew), now);
                let why = in_vain.map(|other| format!("it vouched for root {}, which is tainted", other.id));
                trust.remove(&root, now);
                event("root_remove", &root, why.unwrap_or_default())
            }
            Step::Retire { root } => {
                trust.retire(&root);
                event("root_retire", &root, "its key is destroyed".to_owned())
            }
        })
    }

    fn take_jwt(&self, trust: &mut Trust, step: JwtStep) -> Result<Event, StateError> {
        Ok(match step {
            JwtStep::Add { usable_at } => {
                let kid = self.add_jwt_key(trust, usable_at)?;
                event("jwt_key_prepare", &kid, format!("signs from {}", rfc3339(usable_at)))
            }
            JwtStep::Remove { kid } => {
                trust.jwt_keys.retain(|key| key.kid != kid);
                event("jwt_key_remove", &kid, String::new())
            }
        })
    }

    /// The root that signs until now vouches for the next. That one is not to wait for it: hosts do not need it.
    fn bridge_to(&self, trust: &Trust, id: &str) -> Option<Bridge> {
        let next = trust.roots.iter().find(|root| root.id == id)?;
        let (by, not_after) = bridge::planned(trust, next, self.lifetimes, unix(self.now))?;
        let made = self.authority(by).and_then(|authority| {
            let root = (next.id.as_str(), next.certificate.as_slice());
            Ok(authority.bridge_to(root, self.domain, from_unix(not_after), self.now)?)
        });
        match made {
            Ok(certificate) => Some(Bridge { by: by.id.clone(), certificate, not_after }),
            Err(error) => {
                tracing::error!(root = id, by = by.id, %error, "there is no bridge to the root that signs now");
                None
            }
        }
    }

    fn authority(&self, root: &Root) -> Result<Authority, StateError> {
        let key = self.kek.unwrap(&root.id, &root.wrapped_key)?;
        let key = KeyPair::try_from(key.as_slice()).map_err(AuthorityError::from)?;
        let (id, end) = (root.id.clone(), from_unix(root.not_after));
        Ok(Authority::from_parts(id, root.certificate.clone(), key, end, self.lifetimes.skew)?)
    }

    pub(super) fn add_root<'t>(&self, trust: &'t mut Trust) -> Result<&'t Root, StateError> {
        let root = Authority::new_root(self.domain, self.lifetimes, self.now)?;
        trust.roots.push(Root {
            wrapped_key: self.kek.wrap(&root.id, &root.pkcs8())?,
            not_after: unix(root.not_after),
            id: root.id,
            certificate: root.certificate,
            state: RootState::Prepared,
            published_sequence: 0,
            published_at: unix(self.now),
            activated_at: None,
            removed_at: None,
            tainted_at: None,
            upstream: None,
            bridge: None,
        });
        Ok(trust.roots.last().expect("it was just pushed"))
    }

    pub(super) fn add_jwt_key(&self, trust: &mut Trust, usable_at: i64) -> Result<String, StateError> {
        let key = KeyPair::generate().map_err(AuthorityError::from)?;
        let (kid, now) = (new_id()?, unix(self.now));
        trust.jwt_keys.push(JwtKey {
            public_key: key.subject_public_key_info(),
            wrapped_key: self.kek.wrap(&kid, &key.serialize_der())?,
            published_at: now,
            usable_at,
            not_after: now + seconds(self.lifetimes.jwt_key),
            kid: kid.clone(),
        });
        Ok(kid)
    }

    /// Puts the bundle of `trust` in force: a higher sequence, signed by every root whose key is here, those that
    /// just left it included. Roots that are in a bundle for the first time learn which.
    pub(crate) fn publish(&self, records: &mut dyn Records, trust: &mut Trust) -> Result<Bundle, StateError> {
        // A time, so that it is higher than that of any backup restored, whatever happened since the backup.
        let sequence = unix_ms(self.now).max(trust.sequence + 1);
        trust.sequence = sequence;
        for root in trust.roots.iter_mut().filter(|root| root.published_sequence == 0) {
            root.published_sequence = sequence;
        }
        let bundle = bundle_of(trust, self.domain)?;
        let statement = BundleStatement::about(&bundle);
        let mut signatures: Vec<Signature> = Vec::new();
        for root in trust.roots.iter().filter(|root| !root.wrapped_key.is_empty()) {
            let key = self.kek.unwrap(&root.id, &root.wrapped_key)?;
            signatures.push(Signature { root: root.id.clone(), jws: signed::sign(&key, &statement)? });
        }
        let jwks = String::from_utf8(bundle.to_jwks()).expect("JSON is text");
        let roots = trust.in_bundle().map(|root| root.id.clone()).collect();
        let stored = StoredBundle { sequence, jwks, roots, signatures, created_at: unix(self.now) };
        bundles::put_bundle(records, &stored)?;
        Ok(bundle)
    }
}

/// Roots that left for their taint while a bridge to them may be shown, with their keys.
pub(crate) fn keys_to_deny(trust: &Trust, lifetimes: &Lifetimes, now: i64) -> Vec<(String, Denied)> {
    let left = trust.believed_on(seconds(lifetimes.skew), now);
    left.map(|(root, until)| (root.id.clone(), Denied { whom: Whom::Authority(key_sha256(&root.certificate)), until }))
        .collect()
}

/// The bundle that `trust` describes.
pub(crate) fn bundle_of(trust: &Trust, domain: &TrustDomain) -> Result<Bundle, BundleError> {
    let roots = trust.in_bundle().map(|root| root.certificate.clone()).collect();
    let bundle = Bundle::new(domain.clone(), trust.sequence, trust.refresh_hint_s, roots)?;
    let jwt_keys = trust.jwt_keys.iter().filter_map(|key| PublicJwtKey::from_spki(&key.kid, &key.public_key).ok());
    Ok(bundle.with_jwt_keys(jwt_keys.collect()))
}

fn in_bundle(trust: &Trust) -> (Vec<&str>, Vec<&str>) {
    let roots = trust.in_bundle().map(|root| root.id.as_str()).collect();
    (roots, trust.jwt_keys.iter().map(|key| key.kid.as_str()).collect())
}

fn event(event: &'static str, authority: &str, detail: String) -> Event {
    let detail = Some(detail).filter(|text| !text.is_empty());
    Event { event, result: "ok", authority: Some(authority.to_owned()), detail, ..Event::default() }
}

fn vouched_text(bridge: &Bridge) -> String {
    format!("root {} vouches for it until {}", bridge.by, rfc3339(bridge.not_after))
}

fn despite_text(despite: Despite) -> &'static str {
    match despite {
        Despite::NoActiveRoot => "at once: there was no active root",
        Despite::ActiveEnds => "at once: the active root is about to end",
        Despite::Forced => "at once: the operator forced it",
    }
}
