//! Who opened a connection, remembered by the kernel when its first packet leaves: a client that writes and closes
//! at once is nobody's any more by the time its connection is accepted (docs/adr/0005-owner-recorded-at-syn.md).
//!
//! One map per address family: exact 4-tuple -> uid and cgroup id of the socket. Also without a daemon it costs
//! only connections to virtual IPs, and forgets by itself.

use std::fmt::Write;

use super::super::wanted::Wanted;

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

pub(super) fn chains(wanted: &Wanted, record: Recorded) -> String {
    let Wanted { vip4, vip6, .. } = wanted;
    let mut text = String::new();
    let families = [(record.v4, "ip", "4", vip4.to_string()), (record.v6, "ip6", "6", vip6.to_string())];
    let families: Vec<_> = families.into_iter().filter(|(recorded, ..)| *recorded).collect();
    families.iter().for_each(|(_, family, number, _)| map_and_chain(&mut text, family, number));
    if !families.is_empty() {
        // Before any NAT: as the client knows its connection.
        text.push_str("  chain owners {\n    type filter hook output priority mangle; policy accept;\n");
        for (_, family, number, vips) in families {
            let _ = writeln!(text, "    {family} daddr {vips} tcp flags syn / fin,syn,rst,ack jump record{number}");
        }
        text.push_str("  }\n");
    }
    text
}

fn map_and_chain(text: &mut String, family: &str, number: &str) {
    let tuple = format!("{family} saddr . tcp sport . {family} daddr . tcp dport");
    let _ = write!(
        text,
        "  map owner{number} {{\n\
         \x20   typeof {tuple} : meta skuid . socket cgroupv2 level 0\n\
         \x20   size 65535\n\
         \x20   flags dynamic,timeout\n\
         \x20   timeout {KEPT_SECONDS}s\n\
         \x20 }}\n\
         \x20 chain record{number} {{\n"
    );
    // First, and with constants: what cannot be said of this socket must not be answered by the one before.
    let _ = writeln!(text, "    delete @owner{number} {{ {tuple} : 0 . \".\" }}");
    // A rule whose level the socket does not reach ends there, without having added anything.
    for level in (0..=DEEPEST).rev() {
        let _ =
            writeln!(text, "    add @owner{number} {{ {tuple} : meta skuid . socket cgroupv2 level {level} }} return");
    }
    text.push_str("  }\n");
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn the_owner_before_is_forgotten_before_the_next_is_looked_for_deepest_cgroup_first() {
        let text = chains(&wanted(), Recorded { v4: true, v6: false });
        let at = |what: &str| text.find(what).unwrap_or_else(|| panic!("missing `{what}` in\n{text}"));
        let order = [at(": 0 . \".\" }\n"), at("level 5 } return"), at("level 2 } return"), at("level 0 } return")];
        assert!(order.is_sorted(), "{text}");
        assert!(text.contains("ip daddr 240.240.0.0/16 tcp flags syn / fin,syn,rst,ack jump record4"), "{text}");
        assert!(!text.contains("ip6"), "{text}");
    }

    #[test]
    fn nothing_is_recorded_where_the_host_cannot() {
        assert_eq!(chains(&wanted(), Recorded::default()), "");
    }
}
