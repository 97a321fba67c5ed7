//! What is to be in force, out of what is configured and what operators decided about it. Pure.

use super::state::{Bypass, CaptureState};
use super::wanted::{Caller, StrictPort, Wanted};

/// None: nothing at all, the operator has reverted.
pub fn resolve(intent: &Wanted, state: &CaptureState) -> Option<Wanted> {
    if state.reverted.is_some() {
        return None;
    }
    let plan = match (state.holds(&intent.hash()), &state.last_confirmed) {
        (false, _) => intent.clone(),
        (true, Some(confirmed)) => instead_of(intent, confirmed),
        (true, None) => only_virtual_ips(intent),
    };
    Some(reduced(&plan, &state.bypass))
}

/// An earlier plan, with what this daemon's own sockets are by now.
fn instead_of(intent: &Wanted, confirmed: &Wanted) -> Wanted {
    let Wanted { capture_port, mark, mark_mask, daemon_uid, .. } = *intent;
    // How connections are delivered, and whose they are, follows enrol.d, whatever is held back.
    let (transparent, enrolled) = (intent.transparent.clone(), intent.enrolled.clone());
    Wanted { capture_port, mark, mark_mask, daemon_uid, transparent, enrolled, ..confirmed.clone() }
}

fn only_virtual_ips(intent: &Wanted) -> Wanted {
    Wanted {
        strict: Default::default(),
        permissive: Default::default(),
        raw_callers: Default::default(),
        ..intent.clone()
    }
}

/// Without what has another way than through meshd: raw addresses go direct, strict ports take plaintext (and
/// count it). Virtual IPs exist in the mesh only, so they stay.
pub fn reduced(wanted: &Wanted, bypass: &Bypass) -> Wanted {
    let mut reduced = wanted.clone();
    let covers = |caller: &Caller| bypass.covers(caller);
    let (open, strict): (Vec<StrictPort>, Vec<StrictPort>) =
        wanted.strict.iter().cloned().partition(|strict| covers(&strict.owner));
    reduced.strict = strict.into_iter().collect();
    reduced.permissive.extend(open.iter().map(|strict| strict.port));
    reduced.raw_callers.retain(|caller| !covers(caller));
    reduced
}

#[cfg(test)]
mod tests {
    use super::super::state::Reverted;
    use super::super::wanted::tests::wanted;
    use super::*;

    fn strict(port: u16, owner: &str) -> StrictPort {
        let owner = Caller::Unit(owner.into());
        StrictPort { port, local: [owner.clone()].into(), owner, plaintext_from: Default::default() }
    }

    fn shop() -> Wanted {
        Wanted {
            strict: [strict(8080, "payments.service"), strict(9090, "ledger.service")].into(),
            raw_callers: [Caller::Unit("payments.service".into()), Caller::Uid(1001)].into(),
            ..wanted()
        }
    }

    #[test]
    fn the_configuration_is_in_force_unless_somebody_decided_otherwise() {
        assert_eq!(resolve(&shop(), &CaptureState::default()), Some(shop()));
        let reverted = Some(Reverted { since: 1, by_uid: 0, why: String::new() });
        assert_eq!(resolve(&shop(), &CaptureState { reverted, ..CaptureState::default() }), None);
    }

    #[test]
    fn instead_of_a_held_plan_the_last_confirmed_one_is_in_force() {
        let mut state = CaptureState::default();
        let confirmed = Wanted { strict: [strict(9090, "ledger.service")].into(), capture_port: 15101, ..wanted() };
        state.confirm(confirmed.clone());
        state.hold(shop().hash(), 1);
        let listening = Wanted { capture_port: shop().capture_port, ..confirmed };
        assert_eq!(resolve(&shop(), &state), Some(listening));
        // Another plan is not the one that was held.
        assert_eq!(resolve(&wanted(), &state), Some(wanted()));
    }

    #[test]
    fn without_a_confirmed_plan_a_held_one_is_removed_and_leaves_virtual_ips_after_a_restart() {
        let mut state = CaptureState::default();
        state.hold(shop().hash(), 1);
        assert_eq!(resolve(&shop(), &state), None);
        state.reverted = None;
        assert_eq!(resolve(&shop(), &state), Some(wanted()));
    }

    #[test]
    fn a_bypass_opens_strict_ports_and_counts_their_callers() {
        let mut bypass = Bypass::default();
        bypass.switch(Some("payments.service"), true, 1);
        let one = reduced(&shop(), &bypass);
        assert_eq!(one.strict, [strict(9090, "ledger.service")].into());
        assert_eq!((one.permissive, one.raw_callers), ([8080].into(), [Caller::Uid(1001)].into()));
        bypass.switch(None, true, 2);
        let all = reduced(&shop(), &bypass);
        assert!(all.strict.is_empty() && all.raw_callers.is_empty());
        assert_eq!((all.vip4, all.permissive), (wanted().vip4, [8080, 9090].into()));
    }
}
