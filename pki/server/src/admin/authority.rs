//! Roots and intermediates: what there is, what each waits for, and the steps an operator may hasten.

use data_encoding::HEXLOWER;
use meshd_identity::sha256;
use meshd_pki_api::admin as wire;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::gates::{explain, refusal};
use super::{AdminError, Desk, done, time};
use crate::audit::Event;
use crate::rotation::ask::{Verdict, Wish, judge};
use crate::rotation::bridge::Bridge;
use crate::rotation::decide::{Gate, Surroundings, activate_gates, decide, laggards};
use crate::rotation::trust::Urgency;
use crate::rotation::{Root, RootState, Trust};
use crate::store::intermediates::{self, Intermediate};
use crate::store::{Records, View, hosts, replicas, tainted, trust};
use crate::times::unix;

/// A step by an operator leads to a few more; a loop without an end would be a defect.
const MOST_STEPS: u32 = 8;

impl Desk<'_> {
    pub(super) fn authority_list(&self) -> Result<wire::Authorities, AdminError> {
        self.state.database.read(|view| {
            let trust = trust::trust(view)?;
            let intermediates = intermediates::all(view)?;
            let decision = self.look_around(view, |world| {
                let decision = decide(&trust, world);
                let explained = decision.waiting.into_iter().map(|(root, gates)| (root, self.explain(&gates, world)));
                explained.collect::<Vec<_>>()
            })?;
            let waiting = |id: Option<&str>| {
                let found = decision.iter().find(|(root, _)| root.as_deref() == id);
                found.map(|(_, gates)| gates.clone()).unwrap_or_default()
            };
            let mut roots = Vec::new();
            for root in &trust.roots {
                let bridge = trust.carried_to(&root.id, view, self.lifetimes)?;
                let bridge = bridge.filter(|bridge| bridge.not_after > unix(self.now));
                roots.push(wire_root(root, bridge, waiting(Some(&root.id))));
            }
            let intermediates = intermediates.iter().map(wire_intermediate);
            Ok(wire::Authorities {
                authorities: roots.into_iter().chain(intermediates).collect(),
                next_root: waiting(None),
                urgent_since: trust.urgent.map(|urgent| time(urgent.since)),
                forced: trust.urgent.is_some_and(|urgent| urgent.force),
                clock_distrust: self.clock_doubt.clone(),
                bundle_sequence: trust.sequence,
            })
        })
    }

    pub(super) fn authority_prepare(&self) -> Result<wire::Done, AdminError> {
        let id = self.grant("root_prepare", &Wish::Prepare)?;
        let follows = self.what_activation_waits_for()?;
        Ok(done(format!("root {id} is in the bundle, and signs nothing yet"), follows))
    }

    pub(super) fn authority_activate(&self) -> Result<wire::Done, AdminError> {
        let id = self.grant("root_activate", &Wish::Activate)?;
        let follows = "every server of the PKI makes a new intermediate under it within a second; the root before it \
                       leaves by itself when nobody depends on it any more";
        Ok(done(format!("root {id} signs from now on"), vec![follows.to_owned()]))
    }

    pub(super) fn authority_remove(&self, id: &str) -> Result<wire::Done, AdminError> {
        let id = self.grant("root_remove", &Wish::Remove(id.to_owned()))?;
        let follows = "its key has signed the bundle without it and is destroyed".to_owned();
        Ok(done(format!("root {id} has left the bundle"), vec![follows]))
    }

    /// Takes the step, or refuses it with all that it waits for. Returns the root it was about.
    fn grant(&self, asked: &'static str, wish: &Wish) -> Result<String, AdminError> {
        let granted = self.with_rotator(|rotator| {
            self.lead(|records, told| {
                let trust = trust::trust(records)?;
                let step = self.look_around(records, |world| match judge(wish, &trust, world) {
                    Verdict::Take(step) => Ok(step),
                    Verdict::Never(why) => Err(AdminError::NotNow(why)),
                    Verdict::Waits { root, gates } => {
                        let what = format!(
                            "{}{}",
                            step_name(wish),
                            root.map(|id| format!(" of root {id}")).unwrap_or_default()
                        );
                        Err(AdminError::NotNow(refusal(&what, &self.explain(&gates, world))))
                    }
                })??;
                let event = rotator.take_wished(records, step)?;
                let id = event.authority.clone().unwrap_or_default();
                told.push(event);
                Ok(id)
            })?
            .map_or_else(|| Err(AdminError::NotNow(self.who_leads()?)), Ok)
        });
        if let Err(AdminError::NotNow(why)) = &granted {
            let detail = Some(why.clone());
            self.record(Event { event: asked, result: "refused", detail, ..Event::default() })?;
        }
        let id = granted?;
        self.follow_up()?;
        Ok(id)
    }

    /// Steps that the one just taken made possible: they are due, and nothing is gained by waiting for the server. Says
    /// who takes them if another server leads.
    fn follow_up(&self) -> Result<Option<String>, AdminError> {
        self.with_rotator(|rotator| {
            for _ in 0..MOST_STEPS {
                let taken = self.lead(|records, told| {
                    told.extend(rotator.advance(records)?);
                    Ok(!told.is_empty())
                })?;
                match taken {
                    Some(true) => {}
                    Some(false) => break,
                    None => return Ok(Some(self.who_leads()?)),
                }
            }
            Ok(None)
        })
    }

    pub(super) fn authority_rotate(&self, force: bool) -> Result<wire::Done, AdminError> {
        let since = unix(self.now);
        self.change(|records, told| {
            let mut trust = trust::trust(records)?;
            if force && trust.in_state(RootState::Prepared).is_none_or(|root| root.tainted_at.is_some()) {
                let why = "no root is prepared, so --force would cut off every host; run `meshd-pki authority rotate \
                           --now` first, see in `meshd-pki authority list` who lacks the new root, then force";
                return Err(AdminError::NotNow(why.to_owned()));
            }
            let since = trust.urgent.map_or(since, |urgent| urgent.since);
            trust.urgent = Some(Urgency { since, force });
            trust::put_trust(records, &trust)?;
            let cut_off = match trust.in_state(RootState::Prepared).filter(|_| force) {
                Some(root) => self.look_around(records, |world| laggards(root, world))?,
                None => Vec::new(),
            };
            let detail = match force {
                true => format!("forced; hosts without the new root: {}", listed(&cut_off)),
                false => "as soon as every live host has the new root".to_owned(),
            };
            told.push(Event { event: "root_rotate_now", result: "ok", detail: Some(detail), ..Event::default() });
            Ok(())
        })?;
        let elsewhere = self.follow_up()?;
        let what = if force { "the prepared root is to sign now, whoever lacks it" } else { "emergency rotation" };
        let follows = elsewhere.into_iter().chain(self.what_activation_waits_for()?);
        Ok(done(what.to_owned(), follows.collect()))
    }

    pub(super) fn authority_taint(&self, id: &str) -> Result<wire::Done, AdminError> {
        let now = unix(self.now);
        let tainted = self.change(|records, told| {
            let mut trust = trust::trust(records)?;
            let what = match trust.roots.iter_mut().find(|root| root.id == id) {
                Some(root) => taint_root(root, now)?,
                None => return self.replace_intermediate(records, told, id).map(|what| (what, None)),
            };
            if let Some(urgent) = trust.urgent.as_mut().filter(|_| what == RootState::Prepared) {
                // It was this root that was to sign whoever lacked it, not the next, which everybody lacks.
                urgent.force = false;
            }
            if what == RootState::Active {
                // Not forced: hosts that lack the new root would be cut off, and the operator has not said so.
                trust.urgent.get_or_insert(Urgency { since: now, force: false });
            }
            trust::put_trust(records, &trust)?;
            let (authority, detail) = (Some(id.to_owned()), Some(format!("it was {}", what.name())));
            told.push(Event { event: "root_taint", result: "ok", authority, detail, ..Event::default() });
            Ok((format!("root {id} is tainted"), Some(what)))
        })?;
        let (what, state) = tainted;
        let Some(state) = state else {
            let follows = format!(
                "the server it belonged to makes a new one within a second; hosts replace what it has signed, spread over \
                 10 min or a quarter of what is left of it. Then, to cut off what others may have signed with the key: \
                 `meshd-pki deny add --authority {id}`"
            );
            return Ok(done(what, vec![follows]));
        };
        let elsewhere = self.follow_up()?;
        let moves = "hosts replace at once what they hold under it, and it leaves the bundle when no live host reports \
                     a certificate under it";
        let mut follows = match state {
            RootState::Active => self.what_activation_waits_for()?,
            _ => Vec::new(),
        };
        match elsewhere {
            Some(who) => follows.push(who),
            None if state == RootState::Prepared => follows.push("it has left the bundle".to_owned()),
            None => {}
        }
        follows.extend((state != RootState::Prepared).then(|| moves.to_owned()));
        follows.extend(self.what_a_taint_means_for_the_bridge(id)?);
        Ok(done(what, follows))
    }

    /// The root that vouched for a tainted one would have it believed on.
    fn what_a_taint_means_for_the_bridge(&self, id: &str) -> Result<Option<String>, AdminError> {
        let trust = self.state.database.read(trust::trust)?;
        let bridge = trust.roots.iter().find(|root| root.id == id).and_then(|root| root.bridge.as_ref());
        let end = bridge.map(|bridge| (&bridge.by, bridge.not_after + self.skew()));
        Ok(end.filter(|(_, end)| *end > unix(self.now)).map(|(by, end)| {
            format!(
                "root {by} has vouched for it, so that root leaves without its hold; once {id} has left, its key is \
                 denied until {}",
                time(end)
            )
        }))
    }

    /// An intermediate needs no distribution: without it, its server makes another.
    fn replace_intermediate(
        &self,
        records: &mut dyn Records,
        told: &mut Vec<Event>,
        id: &str,
    ) -> Result<String, AdminError> {
        let Some(mut one) = intermediates::all(records)?.into_iter().find(|one| one.id == id) else {
            let why = format!("there is no authority {id}; see `meshd-pki authority list`");
            return Err(AdminError::NotFound(why));
        };
        if tainted::intermediates(records)?.iter().any(|known| known == id) {
            let why = format!(
                "intermediate {id} is tainted already, and hosts replace what it has signed; to cut that off: `meshd-pki \
                 deny add --authority {id}`"
            );
            return Err(AdminError::NotNow(why));
        }
        if one.from_outside && one.replaced_at.is_none() {
            let why = format!(
                "intermediate {id} is from outside: bring the next by `meshd-pki import` or --upstream-chain; to cut \
                 off what it has signed: `meshd-pki deny add --authority {id}`"
            );
            return Err(AdminError::NotNow(why));
        }
        tainted::taint(records, id, one.not_after)?;
        one.replaced_at.get_or_insert(unix(self.now));
        one.wrapped_key.clear();
        intermediates::put_intermediate(records, &one)?;
        let authority = Some(id.to_owned());
        let detail = Some(format!("of server `{}`; its key is destroyed", one.replica));
        told.push(Event { event: "intermediate_taint", result: "ok", authority, detail, ..Event::default() });
        Ok(format!("intermediate {id} signs no more"))
    }

    fn what_activation_waits_for(&self) -> Result<Vec<String>, AdminError> {
        self.state.database.read(|view| {
            let trust = trust::trust(view)?;
            let Some(root) = trust.in_state(RootState::Prepared).filter(|root| root.tainted_at.is_none()) else {
                return self.without_prepared(view, &trust);
            };
            let gates = self.look_around(view, |world| {
                let mut gates = activate_gates(root, &trust, world);
                gates.extend((!world.clock_is_good).then_some(Gate::Clock));
                self.explain(&gates, world)
            })?;
            Ok(match gates.is_empty() {
                true => vec![format!("root {} signs within 10 s", root.id)],
                false => vec![refusal(&format!("activation of root {}", root.id), &gates)],
            })
        })
    }

    fn without_prepared(&self, view: &mut dyn View, trust: &Trust) -> Result<Vec<String>, AdminError> {
        let stopped = self.look_around(view, |world| match judge(&Wish::Prepare, trust, world) {
            Verdict::Waits { gates, .. } if trust.urgent.is_some() => {
                Some(refusal("a new root", &self.explain(&gates, world)))
            }
            _ => None,
        })?;
        let signs = trust.active().map(|root| format!("root {} signs", root.id));
        Ok(stopped.or(signs).into_iter().collect())
    }

    /// Steps of authorities are taken by one server of several, so that none is taken twice.
    fn who_leads(&self) -> Result<String, AdminError> {
        let engine = self.state.database.engine();
        if let Some(trouble) = engine.trouble() {
            return Ok(format!("no step is taken now, for etcd cannot be written: {trouble}"));
        }
        let Some(leader) = engine.leader() else {
            return Ok(
                "no server of this PKI leads now, and only a leader takes this step; one that runs takes the lead \
                       within a few seconds"
                    .to_owned(),
            );
        };
        let known = self.state.database.read(|view| replicas::replica(view, &leader))?;
        let addresses = known.map(|replica| replica.addresses.join(" or ")).unwrap_or_default();
        Ok(format!(
            "replica `{leader}` leads and takes the steps that are due within 10 s; ask it for one that is not, at \
             {addresses} (--server) or on its machine"
        ))
    }

    fn explain(&self, gates: &[Gate], world: &Surroundings<'_>) -> Vec<wire::Gate> {
        gates.iter().map(|gate| explain(gate, world, self.clock_doubt.as_deref())).collect()
    }

    fn look_around<T>(&self, view: &mut dyn View, judge: impl FnOnce(&Surroundings<'_>) -> T) -> Result<T, AdminError> {
        Ok(judge(&Surroundings {
            hosts: &hosts::hosts(view)?,
            intermediates: &intermediates::all(view)?,
            lifetimes: self.lifetimes,
            clock_is_good: self.clock_doubt.is_none(),
            now: unix(self.now),
        }))
    }
}

fn taint_root(root: &mut Root, now: i64) -> Result<RootState, AdminError> {
    let id = &root.id;
    if !root.state.is_in_bundle() {
        let why = format!("root {id} has left the bundle; nobody who follows it trusts the root any more");
        return Err(AdminError::NotNow(why));
    }
    if let Some(since) = root.tainted_at {
        return Err(AdminError::NotNow(format!("root {id} is tainted since {}", time(since))));
    }
    root.tainted_at = Some(now);
    Ok(root.state)
}

fn step_name(wish: &Wish) -> &'static str {
    match wish {
        Wish::Prepare => "a new root",
        Wish::Activate => "activation",
        Wish::Remove(_) => "removal",
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// SHA-256 of the key in a certificate, as the deny set has it.
pub(crate) fn key_sha256(certificate: &[u8]) -> String {
    let parsed = X509Certificate::from_der(certificate);
    parsed.map(|(_, parsed)| HEXLOWER.encode(&sha256(parsed.public_key().raw))).unwrap_or_default()
}

fn wire_root(root: &Root, bridge: Option<&Bridge>, waits_for: Vec<wire::Gate>) -> wire::Authority {
    let next_step = match root.state {
        RootState::Prepared if root.tainted_at.is_none() => "activate",
        RootState::Prepared | RootState::Old => "remove",
        RootState::Removed => "retire",
        RootState::Active | RootState::Retired => "",
    };
    wire::Authority {
        id: root.id.clone(),
        kind: "root".to_owned(),
        state: root.state.name().to_owned(),
        root: None,
        replica: None,
        key_sha256: key_sha256(&root.certificate),
        since: time(root.published_at),
        active_since: root.activated_at.map(time),
        ended: root.removed_at.map(time),
        not_after: time(root.not_after),
        tainted: root.tainted_at.map(time),
        next_step: next_step.to_owned(),
        waits_for,
        vouched_by: bridge.map(|bridge| bridge.by.clone()),
        vouched_until: bridge.map(|bridge| time(bridge.not_after)),
    }
}

fn wire_intermediate(one: &Intermediate) -> wire::Authority {
    wire::Authority {
        id: one.id.clone(),
        kind: "intermediate".to_owned(),
        state: if one.replaced_at.is_none() { "active" } else { "old" }.to_owned(),
        root: Some(one.root.clone()),
        replica: Some(one.replica.clone()),
        key_sha256: key_sha256(&one.certificate),
        since: time(one.activated_at),
        active_since: Some(time(one.activated_at)),
        ended: one.replaced_at.map(time),
        not_after: time(one.not_after),
        tainted: None,
        next_step: String::new(),
        waits_for: Vec::new(),
        vouched_by: None,
        vouched_until: None,
    }
}
