//! What the keeper says in the log: failures, what operators did, and what they may have forgotten.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::super::state::CaptureState;
use super::super::tool::CaptureError;
use super::super::wanted::Wanted;
use super::Keeper;

/// What an operator may have forgotten is said again.
const REMINDER: Duration = Duration::from_secs(3600);

impl Keeper {
    /// The same failure is told once a minute, not every second.
    pub(super) fn tell_failure(&mut self, now: Instant, what: &str, error: &CaptureError) {
        let text = error.to_string();
        let minute = Duration::from_secs(60);
        if self.told.as_ref().is_some_and(|(told, at)| *told == text && now.duration_since(*at) < minute) {
            return;
        }
        tracing::error!(error = text, "{what}");
        self.told = Some((text, now));
    }

    /// What is not as the configuration says is said at start, and after every reload.
    pub(super) fn tell_start(&mut self, state: &CaptureState, intent: &Wanted) {
        self.reminded = Instant::now();
        if let Some(reverted) = &state.reverted {
            tracing::warn!(
                since = reverted.since,
                why = reverted.why,
                "rules stay removed until `meshd intercept apply`"
            );
        } else if let Some(held) = state.held_as(&intent.hash()) {
            let instead = if state.last_confirmed.is_some() { "the last confirmed plan" } else { "only virtual IPs" };
            tracing::error!(
                plan = held.hash,
                why = held.why,
                "the configured plan is held back, {instead} in force instead; change enrol.d, or run `meshd \
                 intercept apply` and then `meshd intercept confirm`"
            );
        }
        tell_bypass(state);
    }

    pub(super) fn remind(&mut self, now: Instant) {
        if now.duration_since(self.reminded) >= REMINDER {
            self.reminded = now;
            tell_bypass(&self.shared.known.lock().unwrap_or_else(PoisonError::into_inner).1);
        }
    }
}

/// What operators did, for the record.
pub(super) fn audit(before: &CaptureState, now: &CaptureState) {
    if let Some(reverted) = now.reverted.as_ref().filter(|_| before.reverted != now.reverted) {
        let (uid, why) = (reverted.by_uid, &reverted.why);
        tracing::warn!(target: "audit", uid, why, "rules and routes were removed; `meshd intercept apply` puts them back");
    }
    if let Some(held) = now.held.as_ref().filter(|_| before.held != now.held) {
        tracing::warn!(target: "audit", plan = held.hash, why = held.why, "plan taken back");
    }
    if let Some(plan) = now.confirmed.last().filter(|_| before.confirmed != now.confirmed) {
        tracing::info!(target: "audit", plan, "plan confirmed");
    }
    if before.bypass != now.bypass {
        tracing::warn!(target: "audit", bypass = now.bypass.labels().join(" "), "bypass changed");
    }
}

fn tell_bypass(state: &CaptureState) {
    if state.bypass.is_on() {
        tracing::warn!(
            bypassed = state.bypass.labels().join(" "),
            "meshd is out of the way: strict ports take plaintext, raw addresses go direct; end it with `meshd bypass off`"
        );
    }
}
