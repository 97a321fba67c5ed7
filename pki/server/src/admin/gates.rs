//! What a step waits for, as whoever asks for it is told.

use meshd_pki_api::admin as wire;

use super::time;
use crate::rotation::decide::{Gate, Surroundings, longest_leaf};

pub(super) fn explain(gate: &Gate, world: &Surroundings<'_>, clock_doubt: Option<&str>) -> wire::Gate {
    let until = match gate {
        Gate::Hosts(who) | Gate::HostsUnder(who) => silent_until(who, world),
        _ => gate.until(),
    };
    let why = match gate {
        Gate::Clock => clock_doubt.unwrap_or(gate.why()),
        _ => gate.why(),
    };
    wire::Gate { name: gate.name().to_owned(), why: why.to_owned(), until: until.map(time), who: gate.who().to_vec() }
}

/// When the last of the hosts would hold no valid certificate any more if none were heard again.
fn silent_until(hosts: &[String], world: &Surroundings<'_>) -> Option<i64> {
    let seen = world.hosts.iter().filter(|host| hosts.contains(&host.id)).map(|host| host.last_seen);
    seen.max().map(|last| last + longest_leaf(world))
}

/// One line for a refusal: what stands against it, and when it happens without anybody's doing.
pub(super) fn refusal(what: &str, gates: &[wire::Gate]) -> String {
    let each = gates.iter().map(|gate| {
        let who = if gate.who.is_empty() { String::new() } else { format!(": {}", gate.who.join(", ")) };
        let until = gate.until.as_ref().map(|until| format!(" (until {until})")).unwrap_or_default();
        format!("{}: {}{who}{until}", gate.name, gate.why)
    });
    let text = each.collect::<Vec<_>>().join("; ");
    let open = gates.iter().all(|gate| gate.until.is_some());
    let last = gates.iter().filter_map(|gate| gate.until.as_deref()).max();
    let when = match (open, last) {
        (true, Some(last)) => format!("it happens by itself, at {last} at the latest"),
        _ => "it happens by itself once nothing of this is left".to_owned(),
    };
    format!("{what} waits for {text}; {when}")
}
