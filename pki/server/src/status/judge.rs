//! From health to what `status` shows, and to what needs the operator.

use super::{CertificateStatus, ClockStatus, CloneStatus, GateStatus, RotationStatus, ServerStatus};
use crate::health::census::{Held, LeafState, own};
use crate::health::report::SILENT_S;
use crate::health::{Health, clocks as host_clocks};
use crate::lifetimes::Lifetimes;
use crate::rotation::decide::next_rotation;
use crate::rotation::words::listed;
use crate::store::clones::Alarm;
use crate::store::federation::Federated;
use crate::store::hosts::{Host, HostState};
use crate::store::servers::Server;
use crate::times::{rfc3339, seconds};

/// Web certificates live for 47 days and more, and are replaced weeks before their end.
const WEB_WARNING_S: i64 = 7 * 86_400;
/// Below this the root needs attention: replacing it takes weeks of overlap.
const ROOT_WARNING_S: i64 = 60 * 86_400;
/// A host silent for longer is probably gone for good.
const FORGOTTEN_S: i64 = 30 * 86_400;

/// What needs the operator.
pub(super) fn problems(health: &Health, servers: &[Server]) -> Vec<String> {
    let lifetimes = newest(servers).map_or_else(Lifetimes::default, |server| server.lifetimes);
    let mut problems = authorities(health, &lifetimes);
    problems.extend(
        health.blocks().into_iter().map(|block| format!("rotation blocked ({}): {}", block.reason, block.text)),
    );
    problems.extend(servers.iter().filter_map(|server| server.distrust.clone()));
    problems.extend(web_certificates(servers, health.now));
    problems.extend(silent(health, servers));
    problems.extend(overdue(&health.overdue()));
    problems.extend(health.federation.iter().filter_map(|one| stale(one, health.now)));
    let skew_ms = seconds(lifetimes.skew) * 1000;
    let wrong = host_clocks::far_off(&health.hosts, health.now);
    problems.extend(clocks_of(wrong.into_iter().filter(|host| host.clock_offset_ms.abs() > skew_ms)));
    problems.extend(health.clones.iter().map(|alarm| {
        let Alarm { host, at, remote } = alarm;
        format!(
            "two machines use the key of host {host} (last seen {} from {remote}); one is a cloned image: find it, then \
             enrol one of them anew with `meshd-pki token create --host {host}`",
            rfc3339(*at)
        )
    }));
    problems
}

/// What would be better, but hurts nobody yet.
pub(super) fn advice(health: &Health) -> Vec<String> {
    let skewed = host_clocks::far_off(&health.hosts, health.now);
    let mut advice: Vec<String> = clocks_of(skewed.into_iter()).into_iter().collect();
    let active = || health.hosts.iter().filter(|host| host.state == HostState::Active);
    let (come, adopted): (Vec<&Host>, Vec<&Host>) = active().partition(|host| host.adopted_until.is_none());
    let (may, late): (Vec<&Host>, Vec<&Host>) =
        adopted.into_iter().partition(|host| host.adopted_until.is_some_and(|until| until >= health.now));
    let not_back = |hosts: &[&Host], what: &dyn Fn(String) -> String| {
        let until = hosts.iter().filter_map(|host| host.adopted_until).max()?;
        let names: Vec<&str> = hosts.iter().map(|host| host.id.as_str()).collect();
        let (count, names) = (names.len(), listed(&names));
        Some(format!("{count} hosts of the PKI before have not come back; {}: {names}", what(rfc3339(until))))
    };
    advice.extend(not_back(&may, &|until| format!("they may until {until}")));
    advice.extend(not_back(&late, &|until| {
        format!("they had until {until}, and need a token now (`meshd-pki token create --host NAME`)")
    }));
    let forgotten = come.into_iter().filter(|host| host.last_seen < health.now - FORGOTTEN_S);
    let names: Vec<&str> = forgotten.map(|host| host.id.as_str()).collect();
    if !names.is_empty() {
        advice.push(format!("not heard for 30 days: {}", listed(&names)));
    }
    advice
}

fn authorities(health: &Health, lifetimes: &Lifetimes) -> Vec<String> {
    let mut problems = Vec::new();
    let root_warning = ROOT_WARNING_S.min(seconds(lifetimes.root) / 6);
    for root in health.trust.in_bundle().filter(|root| root.not_after - health.now < root_warning) {
        problems.push(format!("root {} ends at {}", root.id, rfc3339(root.not_after)));
    }
    let active = health.intermediates.iter().filter(|one| one.replaced_at.is_none());
    for one in active.filter(|one| one.not_after - health.now < seconds(lifetimes.intermediate) / 2) {
        let (id, replica, end) = (&one.id, &one.replica, rfc3339(one.not_after));
        problems.push(format!("intermediate {id} of server {replica} ends at {end} and was not replaced"));
    }
    if let Some(active) = health.trust.active() {
        let due = next_rotation(&health.trust, active, lifetimes);
        if health.now - due > seconds(lifetimes.root_every) / 2 {
            problems.push(format!("the next root was due at {}; see what blocks the rotation", rfc3339(due)));
        }
    }
    problems
}

/// Certificates that others replace in files.
fn web_certificates(servers: &[Server], now: i64) -> Vec<String> {
    let running = servers.iter().filter(|server| !is_silent(server, now));
    let shown = running.flat_map(|server| server.certificates.iter().map(move |one| (server, one)));
    let ending = shown.filter(|(_, one)| one.kind == "https_web" && one.not_after - now < WEB_WARNING_S);
    let told = ending.map(|(server, one)| {
        let (replica, end) = (&server.replica, rfc3339(one.not_after));
        format!("the certificate of the https_web endpoint of server {replica} ends at {end}; replace --bundle-cert")
    });
    told.collect()
}

fn newest(servers: &[Server]) -> Option<&Server> {
    servers.iter().max_by_key(|server| server.at)
}

fn is_silent(server: &Server, now: i64) -> bool {
    now - server.at > SILENT_S
}

fn silent(health: &Health, servers: &[Server]) -> Option<String> {
    let last = newest(servers)?;
    let at = rfc3339(last.at);
    is_silent(last, health.now)
        .then(|| format!("no server of this PKI runs, the last was seen at {at}; start meshd-pki"))
}

fn overdue(overdue: &[&Held]) -> Option<String> {
    let names: Vec<&str> = overdue.iter().map(|held| held.host.as_str()).collect();
    let first = overdue.first()?;
    let (count, names, end) = (overdue.len(), listed(&names), rfc3339(first.leaf.not_after));
    let ended = overdue.iter().filter(|held| held.state == LeafState::Ended).count();
    Some(format!(
        "{count} hosts have not renewed in time, {ended} of them hold an ended certificate (the first end is {end}): \
         {names}; run `meshd status` there"
    ))
}

/// A few misses are the network's; after that the keys held may be those of yesterday.
fn stale(one: &Federated, now: i64) -> Option<String> {
    let problem = one.polled.problem.as_ref()?;
    let interval = one.polled.next_at - one.polled.at;
    let since = if one.polled.last_good_at == 0 {
        "ever".to_owned()
    } else {
        format!("since {}", rfc3339(one.polled.last_good_at))
    };
    let domain = &one.relationship.trust_domain;
    let never = one.polled.last_good_at > now;
    let is_stale = never || one.held.is_none() || now - one.polled.last_good_at > 3 * interval;
    is_stale.then(|| format!("the bundle of federated domain {domain} was not fetched {since}: {problem}"))
}

fn clocks_of<'a>(far_off: impl Iterator<Item = &'a Host>) -> Option<String> {
    let names: Vec<String> =
        far_off.map(|host| format!("{} {:+.0} s", host.id, host.clock_offset_ms as f64 / 1000.0)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    (!names.is_empty()).then(|| format!("clocks of hosts far from this one's: {}; check NTP there", listed(&names)))
}

/// The PKI's own first, then those of hosts and workloads with the earliest end first.
pub(super) fn certificates(health: &Health, servers: &[Server]) -> Vec<CertificateStatus> {
    let own = own(health).into_iter().map(|one| CertificateStatus {
        kind: one.kind.to_owned(),
        id: one.id,
        state: one.state.to_owned(),
        identity: None,
        host: None,
        issuer: one.parent,
        not_after: rfc3339(one.not_after),
    });
    let shown = servers.iter().flat_map(|server| {
        server.certificates.iter().map(move |one| CertificateStatus {
            kind: one.kind.clone(),
            id: one.serial.clone(),
            state: if one.not_after > health.now { "active" } else { "ended" }.to_owned(),
            identity: None,
            host: Some(server.replica.clone()),
            issuer: None,
            not_after: rfc3339(one.not_after),
        })
    });
    let leaves = health.leaves.iter().map(|held| CertificateStatus {
        kind: held.kind.name().to_owned(),
        id: held.leaf.serial.clone(),
        state: held.state.name().to_owned(),
        identity: Some(held.spiffe_id.clone()),
        host: Some(held.host.clone()),
        issuer: Some(held.leaf.authority.clone()),
        not_after: rfc3339(held.leaf.not_after),
    });
    own.chain(shown).chain(leaves).collect()
}

pub(super) fn rotation(health: &Health, servers: &[Server]) -> RotationStatus {
    let lifetimes = newest(servers).map_or_else(Lifetimes::default, |server| server.lifetimes);
    let blocked = health.blocks().into_iter().map(|block| GateStatus {
        root: None,
        reason: block.reason.to_owned(),
        text: block.text,
    });
    let waiting = health.outlook.waiting.iter().flat_map(|(root, gates)| {
        gates.iter().map(|gate| GateStatus { root: root.clone(), reason: gate.name().to_owned(), text: gate.text() })
    });
    let active = health.trust.active();
    RotationStatus {
        next_root: active.map(|active| rfc3339(next_rotation(&health.trust, active, &lifetimes))),
        blocked: blocked.collect(),
        waiting: waiting.collect(),
    }
}

pub(super) fn clocks(health: &Health) -> Option<ClockStatus> {
    let host_clocks::Spread { lowest_ms, median_ms, highest_ms } = host_clocks::spread(&health.hosts, health.now)?;
    Some(ClockStatus { lowest_ms, median_ms, highest_ms })
}

pub(super) fn server(server: &Server, now: i64) -> ServerStatus {
    ServerStatus {
        replica: server.replica.clone(),
        seen: rfc3339(server.at),
        is_running: !is_silent(server, now),
        clock_problem: server.distrust.clone(),
        is_clock_unconfirmed: server.is_clock_unconfirmed,
        renewals: server.renewals.clone(),
    }
}

pub(super) fn clone_alarm(alarm: &Alarm) -> CloneStatus {
    CloneStatus { host: alarm.host.clone(), at: rfc3339(alarm.at), remote: alarm.remote.clone() }
}
