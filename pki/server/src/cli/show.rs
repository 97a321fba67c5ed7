//! Replies as people read them.

use std::fmt::Write;
use std::time::SystemTime;

use meshd_pki::times::{parse_rfc3339, unix};
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{Authorities, Authority, Done, Gate};

pub(super) fn show(reply: &Reply) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    _ = match reply {
        Reply::Done(reply) => done(&mut text, reply),
        Reply::Authorities(reply) => authorities(&mut text, reply),
        _ => Ok(()),
    };
    text
}

fn done(text: &mut String, reply: &Done) -> std::fmt::Result {
    writeln!(text, "{}", reply.what)?;
    reply.follows.iter().try_for_each(|one| writeln!(text, "{one}"))
}

fn authorities(text: &mut String, reply: &Authorities) -> std::fmt::Result {
    writeln!(text, "{:<13} {:<9} {:<33} {:>7}  {:<21} KEY SHA-256", "KIND", "STATE", "ID", "AGE", "NOT AFTER")?;
    for one in &reply.authorities {
        let age = age(&one.since);
        let key = one.key_sha256.get(..16).unwrap_or_default();
        writeln!(text, "{:<13} {:<9} {:<33} {age:>7}  {:<21} {key}", one.kind, one.state, one.id, one.not_after)?;
        detail(text, one)?;
    }
    writeln!(text)?;
    if let Some(why) = &reply.clock_distrust {
        writeln!(text, "‼ nothing is issued or rotated: {why}")?;
    }
    if let Some(since) = &reply.urgent_since {
        let how = if reply.forced { "whoever lacks it" } else { "as soon as every live host has it" };
        writeln!(text, "‼ emergency rotation since {since}: the new root signs {how}")?;
    }
    if !reply.next_root.is_empty() {
        writeln!(text, "next new root: waits for")?;
        gates(text, &reply.next_root)?;
    }
    Ok(())
}

fn detail(text: &mut String, one: &Authority) -> std::fmt::Result {
    if let Some(since) = &one.tainted {
        writeln!(text, "    ‼ tainted since {since}")?;
    }
    if let Some(root) = &one.root {
        let ended = one.ended.as_ref().map(|at| format!(", signed until {at}")).unwrap_or_default();
        writeln!(text, "    under root {root}, of server `{}`{ended}", one.replica.as_deref().unwrap_or_default())?;
    } else if let Some(at) = &one.ended {
        writeln!(text, "    left the bundle at {at}")?;
    }
    if !one.waits_for.is_empty() {
        writeln!(text, "    to {}: waits for", one.next_step)?;
    }
    gates(text, &one.waits_for)
}

fn gates(text: &mut String, gates: &[Gate]) -> std::fmt::Result {
    for gate in gates {
        let who = if gate.who.is_empty() { String::new() } else { format!(": {}", gate.who.join(", ")) };
        let until = gate.until.as_ref().map(|until| format!(" (until {until})")).unwrap_or_default();
        writeln!(text, "      {:<14} {}{who}{until}", gate.name, gate.why)?;
    }
    Ok(())
}

/// `36d`, `5h`, `12m`: how long ago that was.
fn age(since: &str) -> String {
    let Some(since) = parse_rfc3339(since) else { return "?".to_owned() };
    match unix(SystemTime::now()) - since {
        seconds if seconds >= 2 * 86_400 => format!("{}d", seconds / 86_400),
        seconds if seconds >= 2 * 3600 => format!("{}h", seconds / 3600),
        seconds => format!("{}m", seconds.max(0) / 60),
    }
}
