//! Who opened a connection, remembered by the kernel when its first packet leaves: a client that writes and closes
//! at once is nobody's any more by the time its connection is accepted (docs/adr/0005-owner-recorded-at-syn.md).
//!
//! One map per address family: exact 4-tuple -> uid and cgroup id of the socket. Also without a daemon it costs
//! only connections to captured addresses, and forgets by itself.
//!
//! nft 1.0.6 fails on maps whose key is wider than 16 bytes or value wider than 32. So only ports and the last 12 bytes
//! of the destination are the IPv6 key, and the rest of the tuple stands in the value, for the reader to compare: of two
//! connections that differ in nothing else, the later one is known.

use std::fmt::Write;

use super::guard::SYN;

/// `socket cgroupv2` finds an ancestor by its level, and none below the socket's own: units sit at 1-4.
const DEEPEST: u8 = 5;
/// An accept queue that takes longer is lost anyway.
const KEPT_SECONDS: u8 = 10;

/// The address families whose connections have their owner recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) v4: bool,
    pub(super) v6: bool,
}

/// How a family's connections are told apart, and what of them is written down besides the owner.
struct Map {
    number: &'static str,
    key: &'static str,
    more: &'static str,
}

const MAP4: Map = Map { number: "4", key: "ip saddr . tcp sport . ip daddr . tcp dport", more: "" };
/// The source address is at bit 64 of the header, the destination at bit 192; ports are the first 32 bits of TCP's.
const MAP6: Map = Map { number: "6", key: "@nh,224,96 . @th,0,32", more: " . @nh,64,160" };

/// `to4` and `to6` match what goes to the captured addresses of each family.
pub(super) fn chains(record: Recorded, to4: &str, to6: &str) -> String {
    let mut text = String::new();
    let families = [(record.v4, MAP4, to4), (record.v6, MAP6, to6)];
    let families: Vec<_> = families.into_iter().filter(|(recorded, ..)| *recorded).collect();
    families.iter().for_each(|(_, map, _)| map.write(&mut text));
    if !families.is_empty() {
        // Before any NAT: as the client knows its connection.
        text.push_str("  chain owners {\n    type filter hook output priority mangle; policy accept;\n");
        for (_, Map { number, .. }, to) in families {
            let _ = writeln!(text, "    {SYN} {to} jump record{number}");
        }
        text.push_str("  }\n");
    }
    text
}

impl Map {
    fn write(&self, text: &mut String) {
        let Map { number, key, more } = self;
        let owner = |level: u8| format!("meta skuid . socket cgroupv2 level {level}{more}");
        let _ = write!(
            text,
            "  map owner{number} {{\n\
             \x20   typeof {key} : {}\n\
             \x20   size 65535\n\
             \x20   flags dynamic,timeout\n\
             \x20   timeout {KEPT_SECONDS}s\n\
             \x20 }}\n\
             \x20 chain record{number} {{\n",
            owner(0)
        );
        // First, and of no owner: what cannot be said of this socket must not be answered by the one before.
        let _ = writeln!(text, "    delete @owner{number} {{ {key} : 0 . \".\"{more} }}");
        // A rule whose level the socket does not reach ends there, without having added anything.
        for level in (0..=DEEPEST).rev() {
            let _ = writeln!(text, "    add @owner{number} {{ {key} : {} }} return", owner(level));
        }
        text.push_str("  }\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TO4: &str = "ip daddr 240.240.0.0/16";
    const TO6: &str = "ip6 daddr fd6d:6573:6864::/64";

    #[test]
    fn the_owner_before_is_forgotten_before_the_next_is_looked_for_deepest_cgroup_first() {
        let text = chains(Recorded { v4: true, v6: false }, TO4, TO6);
        let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("missing `{what}` in\n{text}"));
        let order = [at(": 0 . \".\" }\n"), at("level 5 } return"), at("level 2 } return"), at("level 0 } return")];
        assert!(order.is_sorted(), "{text}");
        assert!(text.contains("tcp flags syn / fin,syn,rst,ack ip daddr 240.240.0.0/16 jump record4"), "{text}");
        assert!(!text.contains("ip6"), "{text}");
    }

    #[test]
    fn what_does_not_fit_the_key_of_an_ipv6_connection_is_in_the_value() {
        let text = chains(Recorded { v4: false, v6: true }, TO4, TO6);
        let value = "meta skuid . socket cgroupv2 level 2 . @nh,64,160";
        assert!(text.contains(&format!("add @owner6 {{ @nh,224,96 . @th,0,32 : {value} }}")), "{text}");
    }

    #[test]
    fn nothing_is_recorded_where_the_host_cannot() {
        assert_eq!(chains(Recorded::default(), TO4, TO6), "");
    }
}
