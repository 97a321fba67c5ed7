//! Deliveries that seem to come from the peer's host: what the application answers is for an address of another
//! host and must come back to this one all the same.
//!
//! To a loopback address a policy rule per delivery is enough: what answers from 127.0.0.1 could not leave the host
//! anyway, and connection tracking stays out of it. At an address of the host the application may be called directly
//! by the same peer, too, so the flows we opened are told by a mark on their connection, as Istio's ambient mode does.
//! No sysctl is touched, and reverse path filters do not matter: nothing of this ever leaves the loopback device.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::SocketAddr;

use serde::Deserialize;

use super::routes::{PREFERENCE, ensure_rule, ip, present};
use super::tool::CaptureError;
use super::wanted::Wanted;

const FAMILIES: [&str; 2] = ["-4", "-6"];

/// The routing table of answers; beside the one of virtual IPs.
pub(crate) fn table_beside(table: u32) -> u32 {
    table + 1
}

/// Which packets are answers, as `ip rule` selects them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Answers {
    From(SocketAddr),
    Marked { mark: u32, mask: u32 },
}

impl Answers {
    fn command(&self, verb: &str, table: u32) -> String {
        let selector = match self {
            Answers::From(address) => format!("from {} ipproto tcp sport {}", address.ip(), address.port()),
            Answers::Marked { mark, mask } => format!("fwmark {mark:#x}/{mask:#x}"),
        };
        format!("rule {verb} {selector} iif lo lookup {table} pref {PREFERENCE} protocol kernel")
    }
}

/// The rules of one address family.
fn wanted_rules(wanted: &Wanted, option: &str) -> BTreeSet<Answers> {
    let of_family = wanted.transparent.iter().filter(|address| address.is_ipv4() == (option == "-4"));
    let answers = of_family.map(|address| match address.ip().is_loopback() {
        true => Answers::From(*address),
        false => Answers::Marked { mark: wanted.answer_mark(), mask: wanted.mark_mask },
    });
    answers.collect()
}

/// One of `ip -j rule`.
#[derive(Deserialize)]
struct ListedRule {
    src: String,
    sport: Option<u16>,
    fwmark: Option<String>,
    fwmask: Option<String>,
    /// Other tools' rules may lead nowhere: `unreachable`, `goto`, a VRF.
    table: Option<String>,
}

/// None for a rule we never write.
fn as_answers(rule: &ListedRule) -> Option<Answers> {
    if let Some(port) = rule.sport {
        return Some(Answers::From(SocketAddr::new(rule.src.parse().ok()?, port)));
    }
    let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let mark = number(rule.fwmark.as_ref()?)?;
    // Without a mask all bits count.
    let mask = rule.fwmask.as_deref().map_or(Some(u32::MAX), number)?;
    Some(Answers::Marked { mark, mask })
}

fn parse_rules(json: &str, table: u32) -> serde_json::Result<BTreeSet<Answers>> {
    let listed: Vec<ListedRule> = serde_json::from_str(json)?;
    let table = Some(table.to_string());
    Ok(listed.iter().filter(|rule| rule.table == table).filter_map(as_answers).collect())
}

/// Every rule that leads to our table. All rules are listed: older versions of `ip` cannot list those of one table.
fn listed_rules(option: &str, table: u32) -> Result<BTreeSet<Answers>, CaptureError> {
    parse_rules(&ip(option, "-N -j rule show")?, table).map_err(|error| CaptureError::State {
        what: "cannot understand `ip -j rule show`".into(),
        source: error.into(),
    })
}

/// Makes the rules exactly those that are wanted; one that stays is never away for a moment.
pub(super) fn install(wanted: &Wanted) -> Result<(), CaptureError> {
    let table = table_beside(wanted.table);
    for option in FAMILIES.into_iter().filter(|option| present(option)) {
        let (rules, listed) = (wanted_rules(wanted, option), listed_rules(option, table)?);
        if !rules.is_empty() {
            ip(option, &add_route(table))?;
        }
        for missing in rules.difference(&listed) {
            ensure_rule(option, &missing.command("add", table))?;
        }
        for needless in listed.difference(&rules) {
            ip(option, &needless.command("del", table))?;
        }
        if rules.is_empty() {
            // Most often it was never there.
            let _ = ip(option, &delete_route(table));
        }
    }
    Ok(())
}

/// Whether exactly what is wanted is there.
pub(super) fn intact(wanted: &Wanted) -> Result<bool, CaptureError> {
    let table = table_beside(wanted.table);
    for option in FAMILIES.into_iter().filter(|option| present(option)) {
        let rules = wanted_rules(wanted, option);
        if listed_rules(option, table)? != rules {
            return Ok(false);
        }
        if rules.is_empty() {
            continue;
        }
        // An empty table does not exist for `ip`, which says so with an error.
        let routes = ip(option, &format!("route show table {table}")).unwrap_or_default();
        if !routes.contains("local default dev lo") {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes them; fine when there is nothing left.
pub(super) fn remove(wanted: &Wanted) -> Result<(), CaptureError> {
    install(&Wanted { transparent: BTreeSet::new(), ..wanted.clone() })
}

/// As an operator would type them.
pub(super) fn render(wanted: &Wanted) -> String {
    let table = table_beside(wanted.table);
    let mut text = String::new();
    for option in FAMILIES {
        let rules = wanted_rules(wanted, option);
        if !rules.is_empty() {
            let _ = writeln!(text, "ip {option} {}", add_route(table));
        }
        for rule in rules {
            let _ = writeln!(text, "ip {option} {}", rule.command("add", table));
        }
    }
    text
}

/// Chains that tell answers to us from answers to anybody else; none where addresses alone do.
pub(super) fn chains(wanted: &Wanted) -> String {
    let Wanted { mark, mark_mask, daemon_uid, .. } = wanted;
    let ports = wanted.transparent.iter().filter(|address| !address.ip().is_loopback()).map(SocketAddr::port);
    let ports: BTreeSet<String> = ports.map(|port| port.to_string()).collect();
    if ports.is_empty() {
        return String::new();
    }
    let ports = Vec::from_iter(ports).join(", ");
    let (answer, others) = (wanted.answer_mark(), !mark_mask);
    format!(
        "\x20 chain transparent_open {{\n\
         \x20   type filter hook output priority mangle; policy accept;\n\
         \x20   oif lo tcp dport {{ {ports} }} meta skuid {daemon_uid} meta mark & {mark_mask:#010x} == {mark:#010x} \
         ct mark set ct mark & {others:#010x} | {answer:#010x}\n\
         \x20 }}\n\
         \x20 chain transparent_answer {{\n\
         \x20   type route hook output priority mangle; policy accept;\n\
         \x20   tcp sport {{ {ports} }} ct direction reply ct mark & {mark_mask:#010x} == {answer:#010x} \
         meta mark set meta mark & {others:#010x} | {answer:#010x}\n\
         \x20 }}\n"
    )
}

fn add_route(table: u32) -> String {
    format!("route replace local default dev lo table {table} protocol kernel")
}

fn delete_route(table: u32) -> String {
    format!("route del local default dev lo table {table}")
}

#[cfg(test)]
mod tests {
    use super::super::wanted::tests::wanted;
    use super::*;

    fn delivering_to(addresses: &[&str]) -> Wanted {
        let transparent = addresses.iter().map(|address| address.parse().unwrap()).collect();
        Wanted { transparent, ..wanted() }
    }

    #[test]
    fn a_host_without_transparent_deliveries_gets_nothing() {
        assert_eq!((chains(&wanted()), render(&wanted())), (String::new(), String::new()));
    }

    #[test]
    fn deliveries_to_loopback_need_no_connection_tracking() {
        let wanted = delivering_to(&["127.0.0.1:8080", "[::1]:8080"]);
        assert_eq!(chains(&wanted), "");
        let expected = "ip -4 route replace local default dev lo table 7472 protocol kernel
ip -4 rule add from 127.0.0.1 ipproto tcp sport 8080 iif lo lookup 7472 pref 100 protocol kernel
ip -6 route replace local default dev lo table 7472 protocol kernel
ip -6 rule add from ::1 ipproto tcp sport 8080 iif lo lookup 7472 pref 100 protocol kernel
";
        assert_eq!(render(&wanted), expected);
    }

    #[test]
    fn deliveries_to_a_host_address_are_told_by_the_mark_of_their_connection() {
        let wanted = delivering_to(&["10.0.0.5:8080", "10.0.0.5:8081"]);
        let text = chains(&wanted);
        for line in [
            "oif lo tcp dport { 8080, 8081 } meta skuid 998 meta mark & 0x00ff0000 == 0x004d0000 ct mark set ct mark & 0xff00ffff | 0x004c0000",
            "type route hook output",
            "tcp sport { 8080, 8081 } ct direction reply ct mark & 0x00ff0000 == 0x004c0000 meta mark set meta mark & 0xff00ffff | 0x004c0000",
        ] {
            assert!(text.contains(line), "missing `{line}` in\n{text}");
        }
        assert_eq!(render(&wanted).matches("rule add fwmark 0x4c0000/0xff0000").count(), 1);
    }

    #[test]
    fn what_ip_lists_is_recognised() {
        // `ip -j rule` of iproute2 6.1, after the commands above, beside a rule like Tailscale's.
        let listed = r#"[{"priority":0,"src":"all","table":"local"},
            {"priority":100,"src":"all","dst":"240.240.0.0","dstlen":16,"table":"7471"},
            {"priority":100,"src":"127.0.0.1","iif":"lo","ipproto":"tcp","sport":8080,"table":"7472"},
            {"priority":100,"src":"all","fwmark":"0x4c0000","fwmask":"0xff0000","iif":"lo","table":"7472"},
            {"priority":5250,"src":"all","fwmark":"0x80000","fwmask":"0xff0000","action":"unreachable"}]"#;
        let wanted = delivering_to(&["127.0.0.1:8080", "10.0.0.5:8080"]);
        assert_eq!(parse_rules(listed, 7472).unwrap(), wanted_rules(&wanted, "-4"));
    }
}
