//! What a step waits for, in words.

use meshd_pki_api::admin as wire;

use super::time;
use crate::rotation::decide::{Gate, Surroundings, longest_leaf};

pub(super) fn explain(gate: &Gate, world: &Surroundings<'_>, clock_doubt: Option<&str>) -> wire::Gate {
    let open = |name: &str, why: String| wire::Gate { name: name.to_owned(), why, until: None, who: Vec::new() };
    let timed =
        |name: &str, why: &str, until: i64| wire::Gate { until: Some(time(until)), ..open(name, why.to_owned()) };
    let about = |name: &str, why: String, who: &[String]| wire::Gate { who: who.to_vec(), ..open(name, why) };
    match gate {
        Gate::Due { at } => timed("due", "the calendar wants a new root only then", *at),
        Gate::Speaks => open("speaks", "it signs what hosts are told, for the active root is from outside".to_owned()),
        Gate::Upstream => {
            let why = "the next root comes from outside, by `meshd-pki import` or --upstream-chain".to_owned();
            open("import", why)
        }
        Gate::TooManyRoots => {
            open("too_many_roots", "the bundle holds 4 roots; an old one has to leave first".to_owned())
        }
        Gate::Clock => {
            let why = clock_doubt.unwrap_or("the PKI's clock is not believed").to_owned();
            open("clock", why)
        }
        Gate::Replicas(who) => {
            about("replicas", "servers of the PKI that do not hand the root out yet".to_owned(), who)
        }
        Gate::OldLeaves { until } => {
            timed("old_leaves", "certificates that came without the root may be valid until then", *until)
        }
        Gate::Followers { until } => {
            timed("followers", "who follows the bundle endpoint may not have asked again before", *until)
        }
        Gate::Hosts(who) => {
            let why = "hosts that have not acknowledged the root; one that stays silent stops counting".to_owned();
            wire::Gate { until: silent_until(who, world).map(time), ..about("hosts", why, who) }
        }
        Gate::StillSigning(who) => {
            about("still_signing", "servers of the PKI that still sign under the root".to_owned(), who)
        }
        Gate::LeavesUnder { until } => {
            timed("leaves_under", "certificates under it may be in use until then, the hold included", *until)
        }
        Gate::HostsUnder(who) => {
            let why = "hosts that report certificates under it; one that stays silent stops counting".to_owned();
            wire::Gate { until: silent_until(who, world).map(time), ..about("hosts_under", why, who) }
        }
    }
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
