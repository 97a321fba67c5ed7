//! `meshd intercept plan` and `status`: as tables and as JSON.

use std::fmt;

use serde::Serialize;

use super::show::{duration, section};
use crate::capture::flows::{Effect, LiveFlow, classify};
use crate::capture::plan::reduced;
use crate::capture::timer::{BootClock, Timer};
use crate::capture::{Bypass, CaptureState, Chosen, Facts, Held, KeeperView, Live, PassedOver, Reverted, Wanted};
use crate::enrol::PortMemory;
use crate::unix_time::unix_now;

/// `meshd intercept plan`.
#[derive(Debug, Serialize)]
pub struct InterceptPlan {
    /// Its hash.
    pub plan: String,
    pub confirmed: bool,
    /// It was in force before and nobody confirmed it.
    pub held: Option<Held>,
    pub backend: &'static str,
    pub passed_over: Vec<PassedOver>,
    /// Whom meshd is out of the way of; the rules below know it already.
    pub bypass: Vec<String>,
    pub rules: String,
    /// Connections open now that a rule concerns.
    pub flows: Vec<PlannedFlow>,
    /// How many others there are.
    pub unaffected: usize,
}

#[derive(Debug, Serialize)]
pub struct PlannedFlow {
    #[serde(flatten)]
    pub flow: LiveFlow,
    #[serde(flatten)]
    pub effect: Effect,
}

impl InterceptPlan {
    pub fn new(
        wanted: &Wanted,
        live: &Live,
        state: &CaptureState,
        memory: &PortMemory,
        chosen: &Chosen,
    ) -> InterceptPlan {
        let in_force = reduced(wanted, &state.bypass);
        let facts = Facts::find(&in_force, memory);
        let hash = wanted.hash();
        let all = live
            .flows
            .iter()
            .map(|flow| PlannedFlow { flow: flow.clone(), effect: classify(&in_force, &facts, &live.lifeline, flow) });
        let (unaffected, mut flows): (Vec<PlannedFlow>, Vec<PlannedFlow>) =
            all.partition(|planned| planned.effect == Effect::Unaffected);
        flows.sort_by_key(|planned| (urgency(&planned.effect), planned.flow.server, planned.flow.client));
        InterceptPlan {
            confirmed: state.is_confirmed(&hash),
            held: state.held_as(&hash).cloned(),
            plan: hash,
            backend: chosen.backend.kind().label(),
            passed_over: chosen.passed_over.clone(),
            bypass: state.bypass.labels().into_iter().map(str::to_owned).collect(),
            rules: chosen.backend.render(&in_force, &facts),
            flows,
            unaffected: unaffected.len(),
        }
    }
}

/// What an operator must see comes first.
fn urgency(effect: &Effect) -> u8 {
    match effect {
        Effect::WouldBreak(_) => 0,
        Effect::Captured => 1,
        Effect::Counted => 2,
        Effect::Excluded(_) => 3,
        Effect::Unaffected => 4,
    }
}

fn words(effect: &Effect) -> (&'static str, &str) {
    match effect {
        Effect::WouldBreak(reason) => ("WOULD BREAK", reason),
        Effect::Captured => ("captured", "goes through the mesh"),
        Effect::Counted => ("counted", "plaintext at a permissive port"),
        Effect::Excluded(reason) => ("excluded", reason),
        Effect::Unaffected => ("unaffected", ""),
    }
}

impl fmt::Display for InterceptPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.rules.trim_end())?;
        let standing = match (&self.held, self.confirmed) {
            (Some(held), _) => format!("held back since {}: {}", ago(held.since), held.why),
            (None, true) => "confirmed".to_owned(),
            (None, false) => "never confirmed: `apply` arms a revert timer".to_owned(),
        };
        writeln!(f, "\nplan {} ({standing})", self.plan)?;
        write_backend(f, self.backend, &self.passed_over)?;
        if !self.bypass.is_empty() {
            writeln!(f, "bypass: on for {}", self.bypass.join(", "))?;
        }
        let rows = self.flows.iter().map(|planned| {
            let LiveFlow { client, server, caller, .. } = &planned.flow;
            let (effect, reason) = words(&planned.effect);
            let unit = caller.as_ref().map(|process| process.unit.clone().unwrap_or(format!("uid:{}", process.uid)));
            let unit = unit.unwrap_or_else(|| "-".to_owned());
            vec![effect.to_owned(), client.to_string(), server.to_string(), unit, reason.to_owned()]
        });
        f.write_str(&section("open connections", &["EFFECT", "CLIENT", "SERVER", "CALLER", "WHY"], rows.collect()))?;
        writeln!(f, "  and {} that no rule concerns", self.unaffected)
    }
}

fn write_backend(f: &mut fmt::Formatter<'_>, backend: &str, passed_over: &[PassedOver]) -> fmt::Result {
    writeln!(f, "backend: {backend}")?;
    passed_over.iter().try_for_each(|passed| writeln!(f, "  not {}: {}", passed.backend.label(), passed.reason))
}

fn ago(since: u64) -> String {
    format!("{} ago", duration(unix_now().saturating_sub(since) as i64))
}

/// `meshd intercept status`.
#[derive(Debug, Serialize)]
pub struct InterceptStatus {
    /// The plan of the configuration the daemon last read.
    pub plan: Option<String>,
    pub confirmed: bool,
    pub backend: Option<&'static str>,
    /// Something of ours is in the kernel, unless somebody else removed it.
    pub in_force: bool,
    /// A revert timer waits for `confirm`.
    pub timer: Option<TimerView>,
    pub held: Option<Held>,
    pub reverted: Option<Reverted>,
    pub bypass: Bypass,
    /// None: it does not run.
    pub daemon: Option<KeeperView>,
}

#[derive(Debug, Serialize)]
pub struct TimerView {
    pub plan: String,
    /// Unix time.
    pub until: u64,
    pub left_s: u64,
}

impl InterceptStatus {
    pub fn new(state: &CaptureState, daemon: Option<KeeperView>) -> InterceptStatus {
        let plan = state.intent.as_ref().map(Wanted::hash);
        let clock = BootClock::now();
        let view = |timer: &Timer| TimerView {
            plan: timer.hash.clone(),
            until: timer.until,
            left_s: timer.left(&clock).unwrap_or_default().as_secs(),
        };
        InterceptStatus {
            confirmed: plan.as_ref().is_some_and(|hash| state.is_confirmed(hash)),
            held: plan.as_ref().and_then(|hash| state.held_as(hash)).cloned(),
            plan,
            backend: state.applied.as_ref().map(|applied| applied.backend.label()),
            in_force: state.applied.is_some(),
            timer: state.timer.as_ref().map(view),
            reverted: state.reverted.clone(),
            bypass: state.bypass.clone(),
            daemon,
        }
    }
}

impl fmt::Display for InterceptStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.plan.as_deref().unwrap_or("none yet");
        writeln!(f, "plan: {plan} ({})", if self.confirmed { "confirmed" } else { "not confirmed" })?;
        writeln!(f, "rules: {}", if self.in_force { "in force" } else { "none" })?;
        if let Some(timer) = &self.timer {
            writeln!(f, "  ‼ taken back in {} s unless you run `meshd intercept confirm`", timer.left_s)?;
        }
        if let Some(held) = &self.held {
            writeln!(f, "  × held back since {}: {}", ago(held.since), held.why)?;
        }
        if let Some(reverted) = &self.reverted {
            let Reverted { since, by_uid, why } = reverted;
            writeln!(f, "  ‼ reverted {} by uid {by_uid}: {why}; `meshd intercept apply` ends it", ago(*since))?;
        }
        if self.bypass.is_on() {
            writeln!(f, "  ‼ bypass is on for {}; `meshd bypass off` ends it", self.bypass.labels().join(", "))?;
        }
        let Some(daemon) = &self.daemon else { return writeln!(f, "daemon: does not run") };
        write_backend(f, daemon.backend.label(), &daemon.passed_over)?;
        writeln!(f, "healed: {} times, {} attempts failed", daemon.healed, daemon.heal_failed)?;
        if daemon.fighting {
            writeln!(f, "  × another tool removes the rules again and again; meshd's log names it")?;
        }
        Ok(())
    }
}
