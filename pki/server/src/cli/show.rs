//! Replies as people read them.

use std::fmt::Write;
use std::time::SystemTime;

use meshd_pki::times::{parse_rfc3339, unix};
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{
    Authorities, Authority, BlastRadius, DenySet, Done, Entry, Gate, HostDetail, HostSummary, Recovery, RoleGranted,
};

pub(super) fn show(reply: &Reply) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    _ = match reply {
        Reply::Done(reply) => done(&mut text, reply),
        Reply::Authorities(reply) => authorities(&mut text, reply),
        Reply::Hosts(reply) => hosts(&mut text, &reply.hosts),
        Reply::Host(reply) => host(&mut text, reply),
        Reply::BlastRadius(reply) => blast_radius(&mut text, reply),
        Reply::DenySet(reply) => deny_set(&mut text, reply),
        Reply::Roles(reply) => roles(&mut text, &reply.roles),
        Reply::Token(reply) => writeln!(text, "{}", reply.token),
        Reply::Entries(reply) => entries(&mut text, &reply.entries),
        Reply::Recovery(reply) => recovery(&mut text, reply),
        // To be carried to where the key is: the same in both forms.
        Reply::RecoveryWish(reply) => writeln!(text, "{}", serde_json::to_string_pretty(reply).unwrap_or_default()),
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
    if let (Some(by), Some(until)) = (&one.vouched_by, &one.vouched_until) {
        writeln!(text, "    root {by} vouches for it until {until}, for verifiers that know only that one")?;
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

fn hosts(text: &mut String, hosts: &[HostSummary]) -> std::fmt::Result {
    let head = ("HOST", "STATE", "LAST SEEN", "CLOCK", "BUNDLE", "CERTS");
    writeln!(
        text,
        "{:<20} {:<8} {:<21} {:>9} {:<7} {:>5}  IDENTITIES",
        head.0, head.1, head.2, head.3, head.4, head.5
    )?;
    for one in hosts {
        let clock = format!("{:+.1} s", one.clock_offset_ms as f64 / 1000.0);
        let bundle = if one.bundle_is_current { "current" } else { "older" };
        let (certificates, identities) = (one.valid_certificates, one.identities.join(", "));
        writeln!(
            text,
            "{:<20} {:<8} {:<21} {clock:>9} {bundle:<7} {certificates:>5}  {identities}",
            one.id, one.state, one.last_seen
        )?;
    }
    Ok(())
}

fn host(text: &mut String, host: &HostDetail) -> std::fmt::Result {
    if let Some(one) = &host.summary {
        let clock = format!("{:+.1} s", one.clock_offset_ms as f64 / 1000.0);
        let bundle = if one.bundle_is_current { "the one in force" } else { "older than the one in force" };
        writeln!(text, "host           {} ({})", one.id, one.state)?;
        writeln!(text, "identity       {}", host.spiffe_id)?;
        let way = if host.enrolled_by.is_empty() { "a join token" } else { &host.enrolled_by };
        writeln!(text, "enrolled       {} by {way}, key {}", one.enrolled, host.key_sha256)?;
        writeln!(text, "labels         {}", or_none(&host.labels))?;
        writeln!(text, "last seen      {}, clock {clock}", one.last_seen)?;
        writeln!(text, "bundle         {}, {bundle}", one.bundle_sequence)?;
        writeln!(text, "may hold       {}", or_none(&one.identities))?;
    }
    writeln!(text, "roots in use   {}", or_none(&host.roots_in_use))?;
    writeln!(text, "open tokens    {}", or_none(&host.open_tokens))?;
    writeln!(text, "\n{:<33} {:<21} {:<21} IDENTITY", "VALID CERTIFICATE", "ISSUED", "NOT AFTER")?;
    for one in &host.certificates {
        let denied = if one.denied { "  ‼ denied" } else { "" };
        writeln!(text, "{:<33} {:<21} {:<21} {}{denied}", one.serial, one.issued, one.not_after, one.identity)?;
    }
    Ok(())
}

fn blast_radius(text: &mut String, reply: &BlastRadius) -> std::fmt::Result {
    writeln!(text, "root on host {} can be:", reply.host)?;
    writeln!(text, "{:<40} {:<12} {:>5}  {:<21} ALSO ON", "IDENTITY", "ENTRY", "CERTS", "LAST NOT AFTER")?;
    for one in &reply.identities {
        let entry = if one.permitted { "yes" } else { "removed" };
        let end = one.last_not_after.as_deref().unwrap_or("-");
        let others = or_none(&one.other_hosts);
        writeln!(text, "{:<40} {entry:<12} {:>5}  {end:<21} {others}", one.identity, one.valid_certificates)?;
    }
    for role in &reply.roles {
        writeln!(text, "‼ {} has the role `{}` on this PKI", role.identity, role.role)?;
    }
    if !reply.open_tokens.is_empty() {
        writeln!(text, "‼ open join tokens for it: {}", reply.open_tokens.join(", "))?;
    }
    Ok(())
}

fn deny_set(text: &mut String, set: &DenySet) -> std::fmt::Result {
    writeln!(text, "{:<10} {:<66} UNTIL", "DENIED", "WHOM")?;
    for one in &set.entries {
        let until = one.until.as_deref().unwrap_or("removed");
        writeln!(text, "{:<10} {:<66} {until}", one.kind, one.value)?;
    }
    if set.is_behind {
        writeln!(
            text,
            "‼ hosts may know a newer set: this PKI was restored from a backup; the first report brings it"
        )?;
    }
    Ok(())
}

fn or_none(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn roles(text: &mut String, roles: &[RoleGranted]) -> std::fmt::Result {
    writeln!(text, "{:<8} IDENTITY", "ROLE")?;
    roles.iter().try_for_each(|one| writeln!(text, "{:<8} {}", one.role, one.identity))
}

fn entries(text: &mut String, entries: &[Entry]) -> std::fmt::Result {
    writeln!(text, "{:<20} IDENTITY", "HOST")?;
    entries.iter().try_for_each(|one| {
        let parent = if one.host.is_empty() { one.labels.join(",") } else { one.host.clone() };
        write!(text, "{parent:<20} {}", one.identity)?;
        one.selectors.iter().try_for_each(|selector| write!(text, "  {selector}"))?;
        one.ttl_s.map_or(Ok(()), |ttl| write!(text, "  for {ttl} s"))?;
        one.jwt_ttl_s.map_or(Ok(()), |ttl| write!(text, "  tokens for {ttl} s"))?;
        one.dns_names.iter().try_for_each(|name| write!(text, "  dns:{name}"))?;
        if !one.hint.is_empty() {
            write!(text, "  hint:{}", one.hint)?;
        }
        one.expires.as_ref().map_or(Ok(()), |end| write!(text, "  until {end}"))?;
        writeln!(text)
    })
}

fn recovery(text: &mut String, reply: &Recovery) -> std::fmt::Result {
    for (position, key) in reply.key_ids.iter().enumerate() {
        writeln!(text, "{:<8} recovery key {key}", if position == 0 { "current" } else { "next" })?;
    }
    for one in &reply.statements {
        let bundle = one.bundle_sequence.map(|sequence| format!("trust bundle {sequence}"));
        let next = one.next_key_id.as_ref().map(|key| format!("next recovery key {key}"));
        let says: Vec<String> = bundle.into_iter().chain(next).collect();
        writeln!(text, "said     {}: {}", one.issued, says.join("; "))?;
    }
    Ok(())
}
