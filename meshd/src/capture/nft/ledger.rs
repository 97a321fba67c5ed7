//! Permissive ports: who calls them in clear, counted by the kernel in dynamic sets. Only SYNs, so what is counted is
//! attempts to connect, and a connection costs nothing after its first packet.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use serde_json::Value;

use super::super::ledger::{PlainCaller, Tally};
use super::super::wanted::Wanted;
use super::guard::SYN;

/// What the sets hold together must be less than the book remembers (`ledger/book.rs`). Callers beyond it are counted
/// by port, without a name.
const REMOTE4_MAX: u32 = 4096;
const REMOTE6_MAX: u32 = 2048;
const LOCAL_MAX: u32 = 2048;
/// While meshd is down nobody reads the sets: long enough for any restart, short enough to make room again.
const TIMEOUT: &str = "1d";

const STRICT: &str = "strict_";
const OTHERS: &str = "plain_others_";

pub(super) fn chains(wanted: &Wanted) -> String {
    let ports = wanted.counted_ports();
    let mut text = String::new();
    if ports.is_empty() {
        return text;
    }
    for (name, key, size) in
        [("remote4", "ipv4_addr", REMOTE4_MAX), ("remote6", "ipv6_addr", REMOTE6_MAX), ("local", "uid", LOCAL_MAX)]
    {
        let _ = writeln!(
            text,
            "  set plain_{name} {{ type {key} . inet_service; size {size}; flags dynamic,timeout; timeout {TIMEOUT}; }}"
        );
    }
    let mut others = String::new();
    for port in &ports {
        let _ = writeln!(text, "  counter {OTHERS}{port} {{ }}");
        let _ = writeln!(others, "    tcp dport {port} counter name {OTHERS}{port}");
    }
    let list = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let Wanted { mark, mark_mask, daemon_uid, .. } = wanted;
    // After everybody's filters: what a firewall drops has called nobody. A full set fails its rule, so that the
    // caller ends up among the others.
    let _ = write!(
        text,
        "  chain plain_input {{\n\
         \x20   type filter hook input priority filter + 10; policy accept;\n\
         \x20   iif != lo tcp dport {{ {list} }} {SYN} jump plain_stranger\n\
         \x20 }}\n\
         \x20 chain plain_stranger {{\n\
         \x20   update @plain_remote4 {{ ip saddr . tcp dport counter }} return\n\
         \x20   update @plain_remote6 {{ ip6 saddr . tcp dport counter }} return\n\
         {others}\
         \x20 }}\n\
         \x20 chain plain_output {{\n\
         \x20   type filter hook output priority filter + 10; policy accept;\n\
         \x20   oif lo tcp dport {{ {list} }} {SYN} jump plain_caller\n\
         \x20 }}\n\
         \x20 chain plain_caller {{\n\
         \x20   meta skuid {daemon_uid} meta mark & {mark_mask:#010x} == {mark:#010x} return\n\
         \x20   update @plain_local {{ meta skuid . tcp dport counter }} return\n\
         {others}\
         \x20 }}\n"
    );
    text
}

/// Reads `nft -j list table inet meshd`. What is not understood is left out: other tools may list there, too.
pub(super) fn tally(json: &Value) -> Tally {
    let mut tally = Tally::default();
    for object in json["nftables"].as_array().into_iter().flatten() {
        if let Some(handle) = object["table"]["handle"].as_u64() {
            tally.rules = handle;
        }
        read_counter(&object["counter"], &mut tally);
    }
    let sets = json["nftables"].as_array().into_iter().flatten().map(|object| &object["set"]);
    for element in sets.filter(|set| is_ours(set)).flat_map(|set| set["elem"].as_array().into_iter().flatten()) {
        if let Some((port, caller, count)) = read_element(&element["elem"])
            && let Some(callers) = tally.ports.get_mut(&port)
        {
            callers.insert(caller, count);
        }
    }
    tally
}

/// The named counters tell which ports are counted at all.
fn read_counter(counter: &Value, tally: &mut Tally) {
    let Some((name, packets)) = counter["name"].as_str().zip(counter["packets"].as_u64()) else { return };
    let port = |prefix: &str| name.strip_prefix(prefix)?.parse::<u16>().ok();
    if let Some(port) = port(STRICT) {
        tally.refused.insert(port, packets);
    } else if let Some(port) = port(OTHERS) {
        let others = (packets > 0).then_some((PlainCaller::Others, packets));
        tally.ports.insert(port, BTreeMap::from_iter(others));
    }
}

fn is_ours(set: &Value) -> bool {
    set["name"].as_str().is_some_and(|name| name.starts_with("plain_"))
}

fn read_element(element: &Value) -> Option<(u16, PlainCaller, u64)> {
    let [caller, port] = element["val"]["concat"].as_array()?.as_slice() else { return None };
    let caller = match caller {
        Value::String(address) => PlainCaller::Address(address.parse::<IpAddr>().ok()?),
        uid => PlainCaller::Uid(u32::try_from(uid.as_u64()?).ok()?),
    };
    let port = u16::try_from(port.as_u64()?).ok()?;
    Some((port, caller, element["counter"]["packets"].as_u64()?))
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn only_permissive_ports_are_counted_and_never_meshd_itself() {
        let mut wanted = wanted();
        assert!(chains(&wanted).is_empty());
        wanted.permissive = [2525, 8080].into();
        let text = chains(&wanted);
        for line in [
            "iif != lo tcp dport { 2525, 8080 } tcp flags syn / fin,syn,rst,ack jump plain_stranger",
            "meta skuid 998 meta mark & 0x00ff0000 == 0x004d0000 return",
            "update @plain_local { meta skuid . tcp dport counter } return",
            "tcp dport 8080 counter name plain_others_8080",
        ] {
            assert!(text.contains(line), "missing `{line}` in\n{text}");
        }
    }

    #[test]
    fn what_nft_lists_is_read() {
        let json = serde_json::json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"table": {"family": "inet", "name": "meshd", "handle": 4}},
            {"counter": {"name": "strict_8080", "table": "meshd", "packets": 7, "bytes": 420}},
            {"counter": {"name": "plain_others_2525", "table": "meshd", "packets": 2, "bytes": 120}},
            {"counter": {"name": "plain_others_53", "table": "meshd", "packets": 0, "bytes": 0}},
            {"set": {"name": "plain_remote4", "elem": [
                {"elem": {"val": {"concat": ["10.87.0.12", 2525]}, "counter": {"packets": 3, "bytes": 180}}}]}},
            {"set": {"name": "plain_local", "elem": [
                {"elem": {"val": {"concat": [2005, 2525]}, "counter": {"packets": 1, "bytes": 60}}},
                {"elem": {"val": {"concat": [2005, 99]}, "counter": {"packets": 9, "bytes": 60}}}]}},
            {"set": {"name": "plain_remote6"}},
            {"chain": {"name": "plain_input"}},
        ]});
        let smtp = [
            (PlainCaller::Others, 2),
            (PlainCaller::Address("10.87.0.12".parse().unwrap()), 3),
            (PlainCaller::Uid(2005), 1),
        ];
        let expected = Tally {
            rules: 4,
            ports: BTreeMap::from([(2525, BTreeMap::from(smtp)), (53, BTreeMap::new())]),
            totals: None,
            refused: BTreeMap::from([(8080, 7)]),
        };
        assert_eq!(tally(&json), expected);
    }
}
