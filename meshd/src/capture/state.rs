//! What was done to this host's kernel, and what operators decided about it; `state_file` keeps it on disk.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::backend::BackendKind;
use super::timer::{BootClock, Timer};
use super::wanted::{Caller, Wanted};
use crate::unix_time::unix_now;

pub(super) const SCHEMA: u32 = 1;
/// Plans that do not arm a revert timer again: enough for going back and forth during a rollout.
const CONFIRMED_MAX: usize = 16;

/// `capture/state.json` in the state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CaptureState {
    pub(super) schema: u32,
    /// In the kernel now, unless somebody else removed it: what a revert must undo.
    pub applied: Option<Applied>,
    /// What the configuration asked for when the daemon last put it in force.
    pub intent: Option<Wanted>,
    /// Hashes of confirmed plans, newest last.
    pub confirmed: Vec<String>,
    /// What is gone back to when a plan is not confirmed in time.
    pub last_confirmed: Option<Wanted>,
    pub timer: Option<Timer>,
    pub held: Option<Held>,
    pub reverted: Option<Reverted>,
    pub bypass: Bypass,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub backend: BackendKind,
    pub wanted: Wanted,
}

impl Applied {
    /// Whether applying `target` leaves nothing of it behind; otherwise it must be reverted first.
    pub(super) fn is_replaced_by(&self, backend: BackendKind, target: &Wanted) -> bool {
        let routes = |wanted: &Wanted| (wanted.vip4, wanted.vip6, wanted.table, wanted.mark, wanted.mark_mask);
        self.backend == backend && routes(&self.wanted) == routes(target)
    }
}

/// A plan that was not confirmed in time: not put in force again until an operator says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub hash: String,
    /// Unix time.
    pub since: u64,
    pub why: String,
}

/// All rules were removed on purpose: nobody heals that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reverted {
    /// Unix time.
    pub since: u64,
    pub by_uid: u32,
    pub why: String,
}

/// Whom meshd gets out of the way of, and since when (Unix time).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bypass {
    pub everybody: Option<u64>,
    /// By label: `payments.service`, `uid:1001`.
    pub units: BTreeMap<String, u64>,
}

impl Bypass {
    pub fn is_on(&self) -> bool {
        self.everybody.is_some() || !self.units.is_empty()
    }

    pub fn covers(&self, caller: &Caller) -> bool {
        self.everybody.is_some() || self.units.contains_key(&caller.label())
    }

    /// Everybody is `*`.
    pub fn labels(&self) -> Vec<&str> {
        let everybody = self.everybody.map(|_| "*");
        everybody.into_iter().chain(self.units.keys().map(String::as_str)).collect()
    }

    /// `unit` None: for everybody; switching that off switches it off for each unit, too.
    pub fn switch(&mut self, unit: Option<&str>, on: bool, now: u64) {
        match (unit, on) {
            (None, true) => self.everybody = Some(self.everybody.unwrap_or(now)),
            (None, false) => *self = Bypass::default(),
            (Some(unit), true) => drop(self.units.entry(unit.to_owned()).or_insert(now)),
            (Some(unit), false) => drop(self.units.remove(unit)),
        }
    }
}

impl Default for CaptureState {
    fn default() -> CaptureState {
        CaptureState {
            schema: SCHEMA,
            applied: None,
            intent: None,
            confirmed: Vec::new(),
            last_confirmed: None,
            timer: None,
            held: None,
            reverted: None,
            bypass: Bypass::default(),
        }
    }
}

impl CaptureState {
    /// From now on nobody puts rules in force.
    pub(super) fn forbid(&mut self, why: &str) {
        let known = self.reverted.as_ref().is_some_and(|reverted| reverted.why == why);
        if !known {
            self.reverted = Some(Reverted { since: unix_now(), by_uid: own_uid(), why: why.to_owned() });
        }
        self.timer = None;
    }

    pub fn is_confirmed(&self, hash: &str) -> bool {
        self.confirmed.iter().any(|confirmed| confirmed == hash)
    }

    /// Whether this plan was given up because nobody confirmed it.
    pub fn holds(&self, hash: &str) -> bool {
        self.held_as(hash).is_some()
    }

    pub fn held_as(&self, hash: &str) -> Option<&Held> {
        self.held.as_ref().filter(|held| held.hash == hash)
    }

    /// Remembers a plan as one that locks nobody out.
    pub fn confirm(&mut self, plan: Wanted) {
        let hash = plan.hash();
        self.confirmed.retain(|confirmed| *confirmed != hash);
        self.confirmed.push(hash);
        let superfluous = self.confirmed.len().saturating_sub(CONFIRMED_MAX);
        self.confirmed.drain(..superfluous);
        self.last_confirmed = Some(plan);
        self.timer = None;
    }

    /// Nobody confirmed the plan in time: back to the last confirmed one, or to no rules at all.
    pub(super) fn hold(&mut self, hash: String, now: u64) {
        let why = format!("plan {hash} was not confirmed in time");
        if self.last_confirmed.is_none() {
            self.reverted = Some(Reverted { since: now, by_uid: own_uid(), why: why.clone() });
        }
        self.held = Some(Held { hash, since: now, why });
        self.timer = None;
    }

    /// Whether the timer has run out on what is in force.
    pub(super) fn give_up_unconfirmed(&mut self, clock: &BootClock) -> bool {
        let Some(timer) = self.timer.take_if(|timer| timer.left(clock).is_none()) else { return false };
        // What is in force now decides, also if it came by a reload while the timer ran.
        let hash = self.intent.as_ref().map_or(timer.hash, Wanted::hash);
        if self.is_confirmed(&hash) {
            return false;
        }
        self.hold(hash, unix_now());
        true
    }
}

pub(super) fn own_uid() -> u32 {
    nix::unistd::getuid().as_raw()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn the_oldest_confirmations_are_forgotten() {
        let mut state = CaptureState::default();
        let plan = |table| Wanted { table, ..wanted() };
        for table in 1..=20 {
            state.confirm(plan(table));
        }
        assert_eq!(state.confirmed.len(), CONFIRMED_MAX);
        assert!(!state.is_confirmed(&plan(4).hash()) && state.is_confirmed(&plan(5).hash()));
        state.confirm(plan(5));
        assert_eq!(state.confirmed.last(), Some(&plan(5).hash()));
    }

    #[test]
    fn time_runs_out_on_what_is_in_force_unless_that_is_confirmed() {
        let over = || Some(Timer::armed("applied".into(), Duration::ZERO, &BootClock::now()));
        let mut state = CaptureState { intent: Some(wanted()), timer: over(), ..CaptureState::default() };
        assert!(state.give_up_unconfirmed(&BootClock::now()));
        assert!(state.holds(&wanted().hash()) && state.reverted.is_some() && state.timer.is_none());
        let mut state = CaptureState { intent: Some(wanted()), ..CaptureState::default() };
        state.confirm(wanted());
        state.timer = over();
        assert!(!state.give_up_unconfirmed(&BootClock::now()) && state.held.is_none());
    }

    #[test]
    fn a_bypass_of_everybody_ends_with_those_of_units() {
        let mut bypass = Bypass::default();
        bypass.switch(Some("payments.service"), true, 1);
        assert!(bypass.covers(&Caller::Unit("payments.service".into())) && !bypass.covers(&Caller::Uid(1001)));
        bypass.switch(None, true, 2);
        assert!(bypass.covers(&Caller::Uid(1001)));
        assert_eq!(bypass.labels(), ["*", "payments.service"]);
        bypass.switch(None, false, 3);
        assert!(!bypass.is_on());
    }
}
