//! Permissive ports: who calls them in clear. Rules count every SYN, and tell of each as it happens (NFLOG): the
//! daemon adds up who it was. What was told while nobody listened, or was lost, is in the count all the same.

use std::collections::{BTreeMap, BTreeSet};

use super::super::wanted::Wanted;
use super::table::{Chain, Table};
use super::{GROUP, SYN, own_sockets};

/// After everybody's filters: what a firewall drops has called nobody.
pub(super) const TABLE: &str = "security";
/// Of local callers, with their user, and of other hosts.
const LOCAL: &str = "meshd:local:";
const REMOTE: &str = "meshd:remote:";

/// Which life of the rules counted: in the rules themselves, so that a daemon that comes later knows.
pub(super) type Life = u32;

/// Which call a message tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub local: bool,
    pub life: Life,
}

pub(super) fn table(wanted: &Wanted, ports: &BTreeSet<u16>, life: Life) -> Table {
    if ports.is_empty() {
        return Table::empty(TABLE);
    }
    let own = format!("{} -j RETURN", own_sockets(wanted));
    let callers = std::iter::once(own).chain(ports.iter().map(|port| count(*port, LOCAL, life)));
    let strangers = ports.iter().map(|port| count(*port, REMOTE, life));
    Table {
        name: TABLE,
        jumps: &[("INPUT", "MESHD_INPUT"), ("OUTPUT", "MESHD_OUTPUT")],
        chains: vec![
            Chain { name: "MESHD_INPUT", rules: vec![format!("! -i lo -p tcp {SYN} -j MESHD_STRANGER")] },
            Chain { name: "MESHD_OUTPUT", rules: vec![format!("-o lo -p tcp {SYN} -j MESHD_CALLER")] },
            Chain { name: "MESHD_CALLER", rules: callers.collect() },
            Chain { name: "MESHD_STRANGER", rules: strangers.collect() },
        ],
    }
}

fn count(port: u16, who: &str, life: Life) -> String {
    format!("-p tcp --dport {port} -j NFLOG --nflog-group {GROUP} --nflog-threshold 1 --nflog-prefix {who}{life:08x}")
}

pub(super) fn told(prefix: &str) -> Option<Call> {
    let life = |text: &str| Life::from_str_radix(text, 16).ok();
    let (local, text) = match prefix.strip_prefix(LOCAL) {
        Some(text) => (true, text),
        None => (false, prefix.strip_prefix(REMOTE)?),
    };
    Some(Call { local, life: life(text)? })
}

/// A chain nothing jumps to says which life of the rules this is; in `filter`, which is always there.
pub(super) fn life_chain(life: Life) -> Chain {
    Chain { name: "MESHD_LIFE", rules: vec![format!("-m mark --mark {life:#x} -j RETURN")] }
}

/// What `iptables-save --counters` says of both tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub life: Option<Life>,
    /// SYNs in clear to permissive ports.
    pub calls: BTreeMap<u16, u64>,
    /// SYNs refused at strict ports.
    pub refused: BTreeMap<u16, u64>,
}

impl Counts {
    /// Adds what one saved table has, of one family.
    pub(super) fn read(&mut self, saved: &str) {
        for line in saved.lines() {
            let Some((count, rule)) = counted_rule(line) else { continue };
            let words: Vec<&str> = rule.split(' ').collect();
            let after = |option: &str| words.iter().position(|word| *word == option).and_then(|at| words.get(at + 1));
            if words[0] == "MESHD_LIFE" {
                let number = after("--mark").and_then(|mark| mark.strip_prefix("0x"));
                self.life = number.and_then(|number| Life::from_str_radix(number, 16).ok());
            }
            let Some(port) = after("--dport").and_then(|port| port.parse().ok()) else { continue };
            let by_target = match after("-j").copied() {
                Some("NFLOG") => &mut self.calls,
                Some("REJECT") => &mut self.refused,
                _ => continue,
            };
            *by_target.entry(port).or_default() += count;
        }
    }
}

/// `[3:180] -A MESHD_CALLER ...` -> 3 and the rest.
fn counted_rule(line: &str) -> Option<(u64, &str)> {
    let (counters, rule) = line.strip_prefix('[')?.split_once("] -A ")?;
    let packets = counters.split(':').next()?.parse().ok()?;
    rule.starts_with(super::table::PREFIX).then_some((packets, rule))
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn only_permissive_ports_are_counted_and_never_meshd_itself() {
        assert!(table(&wanted(), &BTreeSet::new(), 7).is_empty());
        let text = table(&wanted(), &[2525].into(), 7).restore(&Default::default());
        for line in [
            "-A MESHD_OUTPUT -m comment --comment meshd -o lo -p tcp --tcp-flags FIN,SYN,RST,ACK SYN -j MESHD_CALLER",
            "--uid-owner 998 -m mark --mark 0x4d0000/0xff0000 -j RETURN\n-A MESHD_CALLER -m comment --comment meshd -p tcp --dport 2525 -j NFLOG",
            "--nflog-group 7471 --nflog-threshold 1 --nflog-prefix meshd:local:00000007",
            "-A MESHD_STRANGER -m comment --comment meshd -p tcp --dport 2525 -j NFLOG --nflog-group 7471 --nflog-threshold 1 --nflog-prefix meshd:remote:00000007",
        ] {
            assert!(text.contains(line), "missing `{line}` in\n{text}");
        }
        assert_eq!(told("meshd:local:0000002a"), Some(Call { local: true, life: 42 }));
        assert_eq!(told("meshd:remote:0000002a"), Some(Call { local: false, life: 42 }));
        assert_eq!((told("meshd:own:2a"), told("kernel: ")), (None, None));
    }

    #[test]
    fn counts_of_both_families_and_tables_add_up() {
        // iptables-nft-save 1.8.9 and iptables-legacy-save differ in quotes and in the order of options.
        const FILTER: &str = "*filter
:INPUT DROP [7:700]
[5:300] -A INPUT -p tcp -m tcp --dport 8080 -j REJECT --reject-with tcp-reset
[0:0] -A MESHD_LIFE -m comment --comment meshd -m mark --mark 0x2a -j RETURN
[2:120] -A MESHD_CALLER -p tcp -m comment --comment meshd -m tcp --dport 8080 -j REJECT --reject-with tcp-reset
[1:60] -A MESHD_CALLER -p tcp -m comment --comment meshd -m tcp --dport 8080 -m owner --uid-owner 7 -j RETURN
[3:180] -A MESHD_STRANGER -p tcp -m comment --comment meshd -m tcp --dport 8080 -j REJECT --reject-with tcp-reset
COMMIT
";
        const SECURITY: &str = "*security
[4:240] -A MESHD_CALLER -p tcp -m comment --comment meshd -m tcp --dport 25 -j NFLOG --nflog-prefix \"meshd:local:0000002a\" --nflog-group 7471 --nflog-threshold 1
[0:0] -A MESHD_STRANGER -p tcp -m tcp --dport 26 -j NFLOG --nflog-group 7471
COMMIT
";
        let mut counts = Counts::default();
        [FILTER, SECURITY, SECURITY].into_iter().for_each(|saved| counts.read(saved));
        let expected = Counts { life: Some(42), calls: [(25, 8), (26, 0)].into(), refused: [(8080, 5)].into() };
        assert_eq!(counts, expected);
    }
}
