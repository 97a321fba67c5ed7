//! Which step may be taken now. Pure: what is stored, what the fleet told, and `now` come in.
//!
//! The proof behind ACTIVATE: certificate and bundle travel in one reply. Once every replica has the new root in what it
//! hands out, a leaf issued before that lives for at most one longest life. So after that time whoever holds a valid
//! leaf, and can take part in TLS at all, also holds the new root. Acknowledgements are a second gate, which finds
//! mistakes in the proof; a host that is silent for a longest life holds no valid leaf and delays nobody.

use super::trust::{Root, RootState, Trust};
use crate::lifetimes::Lifetimes;
use crate::store::hosts::{Host, HostState};
use crate::store::intermediates::Intermediate;
use crate::times::seconds;

/// More roots than this in a bundle would mean that rotation is stuck (they overlap for a month of three).
pub(crate) const MOST_ROOTS: usize = 4;
/// SPIFFE Federation 4.1: 3 to 5 refresh intervals between publishing a key and using it.
const REFRESH_INTERVALS: i64 = 5;

/// What the world looks like.
pub(crate) struct Surroundings<'a> {
    pub(crate) hosts: &'a [Host],
    pub(crate) intermediates: &'a [Intermediate],
    pub(crate) lifetimes: &'a Lifetimes,
    /// False while the clocks of PKI and fleet disagree: nothing that depends on time is done.
    pub(crate) clock_is_good: bool,
    pub(crate) now: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Prepare,
    Activate {
        root: String,
        despite: Option<Despite>,
    },
    /// A root of our own signs what hosts are told from now on, while certificates come from outside.
    Speak {
        root: String,
    },
    Remove {
        root: String,
    },
    Retire {
        root: String,
    },
}

/// A gate that was open only because waiting would be worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Despite {
    /// Nothing can be signed without it.
    NoActiveRoot,
    /// The active root is about to end.
    ActiveEnds,
    /// The operator said so.
    Forced,
}

/// What a step still waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Gate {
    /// The active root is from outside and cannot sign what hosts are told (deny sets, bundles): this one does.
    Speaks,
    /// The active root is from outside: so is the next one.
    Upstream,
    /// The calendar.
    Due {
        at: i64,
    },
    TooManyRoots,
    Clock,
    /// A replica does not hand out the new root yet.
    Replicas(Vec<String>),
    /// Leaves from before the new root may still be in use.
    OldLeaves {
        until: i64,
    },
    /// Followers of the bundle endpoint may not have asked again yet.
    Followers {
        until: i64,
    },
    /// Live hosts that have not acknowledged the new root.
    Hosts(Vec<String>),
    /// Replicas that still sign under the root to be removed.
    StillSigning(Vec<String>),
    /// Leaves under the root to be removed may still be valid, or the hold is not over.
    LeavesUnder {
        until: i64,
    },
    /// The same without a hold: it vouched for a root that is tainted.
    LastLeaves {
        until: i64,
    },
    /// Hosts that report a chain to the root to be removed.
    HostsUnder(Vec<String>),
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) step: Option<Step>,
    /// For each root that waits, what for. The next root to prepare has no id yet.
    pub(crate) waiting: Vec<(Option<String>, Vec<Gate>)>,
}

pub(crate) fn decide(trust: &Trust, world: &Surroundings<'_>) -> Decision {
    let mut decision = Decision::default();
    for root in &trust.roots {
        let (step, gates) = match root.state {
            RootState::Prepared => (activate(root, trust, world), activate_gates(root, trust, world)),
            RootState::Old => (Step::Remove { root: root.id.clone() }, old_gates(root, trust, world)),
            RootState::Removed => (Step::Retire { root: root.id.clone() }, Vec::new()),
            RootState::Active | RootState::Retired => continue,
        };
        offer(&mut decision, Some(&root.id), step, gates, world);
    }
    if trust.in_state(RootState::Prepared).is_none_or(|root| root.tainted_at.is_some()) {
        offer(&mut decision, None, Step::Prepare, prepare_gates(trust, world), world);
    }
    decision
}

/// The first step with all its gates open is taken; one at a time.
fn offer(decision: &mut Decision, root: Option<&str>, step: Step, mut gates: Vec<Gate>, world: &Surroundings<'_>) {
    if !world.clock_is_good {
        gates.push(Gate::Clock);
    }
    if !gates.is_empty() {
        decision.waiting.push((root.map(str::to_owned), gates));
    } else if decision.step.is_none() {
        decision.step = Some(step);
    }
}

pub(crate) fn prepare_gates(trust: &Trust, world: &Surroundings<'_>) -> Vec<Gate> {
    let mut gates = Vec::new();
    let ends = |active: &Root| active.not_after - seconds(world.lifetimes.last_call) <= world.now;
    let cannot_stay = |active: &Root| active.tainted_at.is_some() || ends(active);
    // One more is better than going on with a root that has to be left.
    let most = MOST_ROOTS + usize::from(trust.active().is_some_and(cannot_stay));
    if trust.in_bundle().count() >= most {
        gates.push(Gate::TooManyRoots);
    }
    let Some(active) = trust.active() else {
        return gates;
    };
    if active.upstream.is_some() {
        if !needs_speaker(trust, world) {
            gates.push(Gate::Upstream);
        }
        return gates;
    }
    let wanted = trust.urgent.is_some() || cannot_stay(active);
    let at = next_rotation(trust, active, world.lifetimes);
    if !wanted && at > world.now {
        gates.push(Gate::Due { at });
    }
    gates
}

/// Whether half the time is over in which one root can sign what hosts are told, or others may have its key.
fn needs_speaker(trust: &Trust, world: &Surroundings<'_>) -> bool {
    let half = seconds(world.lifetimes.root / 2);
    trust.speaker().is_none_or(|speaker| speaker.tainted_at.is_some() || speaker.not_after - half <= world.now)
}

/// While the active root is from outside, one of our own never takes its place.
fn only_speaks(root: &Root, trust: &Trust) -> bool {
    root.upstream.is_none() && trust.active().is_some_and(|active| active.upstream.is_some())
}

/// When the calendar wants the next root. Of authorities outside it knows only when the last moment is.
pub(crate) fn next_rotation(trust: &Trust, active: &Root, lifetimes: &Lifetimes) -> i64 {
    if active.upstream.is_some() {
        return last_call(active, lifetimes);
    }
    let is_first = trust.roots.iter().filter(|root| root.activated_at.is_some()).count() == 1;
    let every = if is_first { lifetimes.first_root } else { lifetimes.root_every };
    active.activated_at.unwrap_or(active.published_at) + seconds(every)
}

pub(crate) fn activate(root: &Root, trust: &Trust, world: &Surroundings<'_>) -> Step {
    if root.tainted_at.is_some() {
        return Step::Remove { root: root.id.clone() };
    }
    if only_speaks(root, trust) {
        return Step::Speak { root: root.id.clone() };
    }
    Step::Activate { root: root.id.clone(), despite: despite(trust, world) }
}

fn despite(trust: &Trust, world: &Surroundings<'_>) -> Option<Despite> {
    match trust.active() {
        None => Some(Despite::NoActiveRoot),
        Some(active) if last_call(active, world.lifetimes) <= world.now => Some(Despite::ActiveEnds),
        Some(_) if trust.urgent.is_some_and(|urgent| urgent.force) => Some(Despite::Forced),
        Some(_) => None,
    }
}

/// From when on waiting for hosts is worse than leaving them behind. What is from outside may be brought late and live
/// shortly: only the time counts in which every leaf under it is replaced.
fn last_call(active: &Root, lifetimes: &Lifetimes) -> i64 {
    match &active.upstream {
        Some(given) => given.not_after - 2 * seconds(lifetimes.leaf) - 2 * seconds(lifetimes.skew),
        None => active.not_after - seconds(lifetimes.last_call),
    }
}

pub(crate) fn activate_gates(root: &Root, trust: &Trust, world: &Surroundings<'_>) -> Vec<Gate> {
    let speaks = only_speaks(root, trust);
    if root.tainted_at.is_some() || (!speaks && despite(trust, world).is_some()) {
        return Vec::new();
    }
    let mut gates = Vec::new();
    let behind = replicas_behind(root, world);
    if !behind.is_empty() {
        gates.push(Gate::Replicas(behind));
    }
    let laggards = laggards(root, world);
    if !laggards.is_empty() {
        gates.push(Gate::Hosts(laggards));
    }
    let replaces_tainted = speaks && trust.speaker().is_some_and(|speaker| speaker.tainted_at.is_some());
    if trust.urgent.is_some() || replaces_tainted {
        // Acknowledgements alone: the operator has a reason not to wait for the proof.
        return gates;
    }
    let handed_out = handed_out_since(root, world);
    let until = handed_out + longest_leaf(world) + 2 * seconds(world.lifetimes.skew);
    if until > world.now {
        gates.push(Gate::OldLeaves { until });
    }
    let until = handed_out + REFRESH_INTERVALS * seconds(world.lifetimes.refresh_hint);
    if until > world.now {
        gates.push(Gate::Followers { until });
    }
    gates
}

/// Replicas that could issue a leaf now and hand out a bundle without the root.
fn replicas_behind(root: &Root, world: &Surroundings<'_>) -> Vec<String> {
    let behind = issuing(world).filter(|one| one.bundle_sequence < root.published_sequence);
    behind.map(|one| one.replica.clone()).collect()
}

/// Since when every replica hands the root out.
fn handed_out_since(root: &Root, world: &Surroundings<'_>) -> i64 {
    let joined = issuing(world).map(|one| one.joined_bundle_at);
    // Later than the truth when a replica has taken over yet another root since: the wait becomes longer, never shorter.
    joined.fold(root.published_at, i64::max)
}

fn issuing<'a>(world: &'a Surroundings<'_>) -> impl Iterator<Item = &'a Intermediate> {
    world.intermediates.iter().filter(|one| one.replaced_at.is_none() && one.not_after > world.now)
}

/// Hosts that may hold a valid certificate and have not said that they have the root.
pub(crate) fn laggards(root: &Root, world: &Surroundings<'_>) -> Vec<String> {
    let lagging = live(world).filter(|host| host.acked_sequence < root.published_sequence);
    lagging.map(|host| host.id.clone()).collect()
}

pub(crate) fn live<'a>(world: &'a Surroundings<'_>) -> impl Iterator<Item = &'a Host> {
    let since = world.now - longest_leaf(world);
    world.hosts.iter().filter(move |host| host.state == HostState::Active && host.last_seen >= since)
}

pub(crate) fn longest_leaf(world: &Surroundings<'_>) -> i64 {
    let of_intermediates = world.intermediates.iter().map(|one| one.longest_leaf_s);
    of_intermediates.chain([seconds(world.lifetimes.leaf)]).max().unwrap_or_default()
}

pub(crate) fn old_gates(root: &Root, trust: &Trust, world: &Surroundings<'_>) -> Vec<Gate> {
    let mut gates = remove_gates(root, trust, world);
    if trust.speaker().is_some_and(|speaker| speaker.id == root.id) {
        gates.push(Gate::Speaks);
    }
    gates
}

fn remove_gates(root: &Root, trust: &Trust, world: &Surroundings<'_>) -> Vec<Gate> {
    let skew = seconds(world.lifetimes.skew);
    if root.not_after + skew <= world.now {
        // Nothing under it verifies anywhere but in libraries that do not look at the end of roots.
        return Vec::new();
    }
    let under: Vec<&Intermediate> = world.intermediates.iter().filter(|one| one.root == root.id).collect();
    let signing = under.iter().filter(|one| one.replaced_at.is_none() && one.not_after > world.now);
    let signing: Vec<String> = signing.map(|one| one.replica.clone()).collect();
    let mut gates = Vec::new();
    if !signing.is_empty() {
        gates.push(Gate::StillSigning(signing));
    }
    let last_end = under.iter().map(|one| one.replaced_at.unwrap_or(one.not_after) + one.longest_leaf_s).max();
    // As long as it is believed, so is a thief of the key it vouched for.
    let vouched_in_vain = trust.vouched_in_vain(&root.id, skew, world.now).is_some();
    let hold = if root.tainted_at.is_some() || vouched_in_vain { 0 } else { seconds(world.lifetimes.hold) };
    // Without an intermediate on record the root signed none since it was prepared.
    let until = last_end.unwrap_or(root.published_at) + 2 * skew + hold;
    // A tainted root goes when nobody depends on it, not when nobody could: what it signs may be an impostor's.
    if until > world.now && root.tainted_at.is_none() {
        gates.push(if vouched_in_vain { Gate::LastLeaves { until } } else { Gate::LeavesUnder { until } });
    }
    let on_it: Vec<String> =
        live(world).filter(|host| host.roots_in_use.contains(&root.id)).map(|host| host.id.clone()).collect();
    if !on_it.is_empty() {
        gates.push(Gate::HostsUnder(on_it));
    }
    gates
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(n: usize, state: RootState, tainted_at: Option<i64>) -> Root {
        let record = serde_json::json!({
            "id": n.to_string(), "state": state, "certificate": "", "published_sequence": 1, "published_at": 0,
            "activated_at": 0, "tainted_at": tainted_at, "not_after": 365 * 86_400,
        });
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn a_full_bundle_holds_up_the_next_root_but_not_the_replacement_of_one_whose_key_leaked() {
        let lifetimes = Lifetimes::default();
        let gates = |tainted_at| {
            let mut roots: Vec<Root> = (0..MOST_ROOTS).map(|n| root(n, RootState::Old, None)).collect();
            roots[0] = root(0, RootState::Active, tainted_at);
            let trust = Trust { roots, ..Trust::default() };
            let (clock_is_good, now) = (true, 200 * 86_400);
            let world = Surroundings { hosts: &[], intermediates: &[], lifetimes: &lifetimes, clock_is_good, now };
            prepare_gates(&trust, &world)
        };
        assert_eq!(gates(None), [Gate::TooManyRoots]);
        assert_eq!(gates(Some(1)), []);
    }
}
