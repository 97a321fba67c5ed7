//! What an operator may ask of the rotation: a step sooner than the calendar has it, never sooner than its gates. Pure.

use super::decide::{Gate, Step, Surroundings, activate, activate_gates, old_gates, prepare_gates};
use super::trust::{RootState, Trust};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    Prepare,
    Activate,
    Remove(String),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Take(Step),
    /// The step is the next one, and will be taken by itself once these are open.
    Waits {
        root: Option<String>,
        gates: Vec<Gate>,
    },
    /// There is no such step, whatever the time; why, and what to do instead.
    Never(String),
}

pub(crate) fn judge(wish: &Wish, trust: &Trust, world: &Surroundings<'_>) -> Verdict {
    match wish {
        Wish::Prepare => prepare(trust, world),
        Wish::Activate => hasten_activation(trust, world),
        Wish::Remove(id) => remove(id, trust, world),
    }
}

fn prepare(trust: &Trust, world: &Surroundings<'_>) -> Verdict {
    if let Some(root) = trust.in_state(RootState::Prepared).filter(|root| root.tainted_at.is_none()) {
        let id = &root.id;
        return Verdict::Never(format!(
            "root {id} is prepared already, and signs as soon as it may; see `meshd-pki authority list`"
        ));
    }
    let mut gates = prepare_gates(trust, world);
    // The calendar is all that an operator may overrule.
    gates.retain(|gate| !matches!(gate, Gate::Due { .. }));
    verdict(None, Step::Prepare, gates, world)
}

fn hasten_activation(trust: &Trust, world: &Surroundings<'_>) -> Verdict {
    match trust.in_state(RootState::Prepared).filter(|root| root.tainted_at.is_none()) {
        Some(root) => verdict(Some(&root.id), activate(root, trust, world), activate_gates(root, trust, world), world),
        None => Verdict::Never("no root is prepared; run `meshd-pki authority prepare` first".to_owned()),
    }
}

fn remove(id: &str, trust: &Trust, world: &Surroundings<'_>) -> Verdict {
    let Some(root) = trust.roots.iter().find(|root| root.id == id) else {
        return Verdict::Never(format!("there is no root {id}; see `meshd-pki authority list`"));
    };
    let never = |text: &str| Verdict::Never(format!("root {id} {text}"));
    match root.state {
        RootState::Old => verdict(Some(id), Step::Remove { root: id.to_owned() }, old_gates(root, trust, world), world),
        RootState::Active => never(
            "signs now; without it nothing the PKI issues would verify. Run `meshd-pki authority prepare`: it leaves by \
             itself when another root signs and nobody depends on it any more",
        ),
        RootState::Prepared => {
            never("is about to sign; if its key may be known to others, run `meshd-pki authority taint` on it")
        }
        RootState::Removed | RootState::Retired => never("has left the bundle already"),
    }
}

fn verdict(root: Option<&str>, step: Step, mut gates: Vec<Gate>, world: &Surroundings<'_>) -> Verdict {
    if !world.clock_is_good {
        gates.push(Gate::Clock);
    }
    match gates.is_empty() {
        true => Verdict::Take(step),
        false => Verdict::Waits { root: root.map(str::to_owned), gates },
    }
}
