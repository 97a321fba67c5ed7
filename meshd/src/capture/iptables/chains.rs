//! Our rules, family by family, as `iptables-restore` reads them. What nothing of ours decides goes back to the
//! host's own rules (RETURN, never ACCEPT): we must not open what they close.

use ipnet::IpNet;

use super::super::wanted::{Facts, Present, StrictPort, Wanted};
use super::saved::{Jump, Ours};
use super::variant::Family;

/// Every chain of ours begins with it, and nobody else's does.
pub(super) const PREFIX: &str = "MESHD_";

const COMMENT: &str = "-m comment --comment meshd";
const SYN: &str = "--tcp-flags FIN,SYN,RST,ACK SYN";

/// One table's part of the rules.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub name: &'static str,
    /// From the kernel's chain to ours, always first there: before Docker's and kube-proxy's DNAT, and before a
    /// host's own rule that would let strangers in to a strict port.
    jumps: &'static [(&'static str, &'static str)],
    chains: Vec<Chain>,
}

#[derive(Debug, PartialEq, Eq)]
struct Chain {
    name: &'static str,
    rules: Vec<String>,
}

/// Each table is replaced in one step, but not both at once: filter comes first, so that between the two virtual
/// IPs are refused and strict ports closed, never a capture without its guard.
pub(super) fn tables(family: Family, wanted: &Wanted, facts: &Facts) -> [Table; 2] {
    let vip = match family {
        Family::V4 => wanted.vip4.to_string(),
        Family::V6 => wanted.vip6.to_string(),
    };
    let capture_port = wanted.capture_port;
    let filter = Table {
        name: "filter",
        jumps: &[("INPUT", "MESHD_INPUT"), ("OUTPUT", "MESHD_OUTPUT")],
        chains: vec![
            Chain {
                name: "MESHD_INPUT",
                rules: vec![
                    // Containers and guests; an ICMP error from a virtual IP does not reach them.
                    format!("! -i lo -d {vip} -p tcp -j REJECT --reject-with tcp-reset"),
                    format!("! -i lo -d {vip} -j REJECT"),
                    format!("! -i lo -p tcp {SYN} -j MESHD_STRANGER"),
                ],
            },
            Chain {
                name: "MESHD_OUTPUT",
                // TCP to a virtual IP has another destination by now, unless nothing captured it.
                rules: vec![format!("-d {vip} -j REJECT"), format!("-o lo -p tcp {SYN} -j MESHD_CALLER")],
            },
            Chain { name: "MESHD_CALLER", rules: local_callers(wanted, facts) },
            Chain { name: "MESHD_STRANGER", rules: strangers(family, wanted) },
        ],
    };
    let nat = Table {
        name: "nat",
        jumps: &[("OUTPUT", "MESHD_OUTPUT")],
        chains: vec![Chain {
            name: "MESHD_OUTPUT",
            rules: vec![format!("-d {vip} -p tcp -j REDIRECT --to-ports {capture_port}")],
        }],
    };
    [filter, nat]
}

impl Table {
    /// `iptables-restore --noflush` input that puts this table in force, whatever of it is there already.
    pub(super) fn restore(&self, present: &[Jump]) -> String {
        let jumps = self.jumps.iter().map(|(from, to)| format!("-I {from} 1 {COMMENT} -j {to}"));
        self.transaction(present.iter().map(Jump::delete).chain(jumps))
    }

    /// Whether all of it is there: each jump at the top, each rule of each chain.
    pub(super) fn is_in(&self, ours: &Ours) -> bool {
        let jumps = self.jumps.iter().all(|(from, to)| ours.begins_with_jump(from, to));
        jumps && self.chains.iter().all(|chain| ours.rules_of(chain.name) == chain.rules.len())
    }

    /// The same without the jumps, under names of its own: nothing ever gets there. Of this process alone, as the
    /// daemon and a command may try at the same time; a chain's name has at most 28 characters, this 26.
    pub(super) fn scratch(&self) -> String {
        let ours_alone = format!("{SCRATCH_PREFIX}{}_", std::process::id());
        self.transaction(std::iter::empty()).replace(PREFIX, &ours_alone)
    }

    pub(super) fn scratch_removal(&self) -> String {
        Ours::of(&self.scratch()).removal(self.name).unwrap_or_default()
    }

    fn transaction(&self, last: impl Iterator<Item = String>) -> String {
        // Under --noflush a declaration empties a chain that is there already.
        let declarations = self.chains.iter().map(|chain| format!(":{} - [0:0]", chain.name));
        let rules = self
            .chains
            .iter()
            .flat_map(|Chain { name, rules }| rules.iter().map(move |rule| format!("-A {name} {COMMENT} {rule}")));
        let lines = std::iter::once(format!("*{}", self.name)).chain(declarations).chain(rules).chain(last);
        lines.chain(["COMMIT".to_owned()]).map(|line| line + "\n").collect()
    }
}

/// Ours by its beginning, so that a revert also removes what a probe that was killed left.
const SCRATCH_PREFIX: &str = "MESHD_TRY_";

fn local_callers(wanted: &Wanted, facts: &Facts) -> Vec<String> {
    if wanted.strict.is_empty() {
        return Vec::new();
    }
    let Wanted { mark, mark_mask, daemon_uid, .. } = wanted;
    let mut rules =
        vec![format!("-m owner --uid-owner {daemon_uid} -m mark --mark {mark:#x}/{mark_mask:#x} -j RETURN")];
    for strict in &wanted.strict {
        let port = strict.port;
        let callers = strict.local.iter().flat_map(|caller| facts.present(caller));
        rules.extend(callers.map(|caller| format!("-p tcp --dport {port} {} -j RETURN", local_caller(caller))));
        rules.push(refuse(strict));
    }
    rules
}

fn local_caller(caller: Present<'_>) -> String {
    match caller {
        Present::Uid(uid) => format!("-m owner --uid-owner {uid}"),
        Present::Cgroup(cgroup) => {
            // Names of units have backslashes in them (systemd's escapes), which a quoted word wants doubled.
            let path = cgroup.path.replace('\\', "\\\\").replace('"', "\\\"");
            format!("-m cgroup --path \"{path}\"")
        }
    }
}

fn strangers(family: Family, wanted: &Wanted) -> Vec<String> {
    let mut rules = Vec::new();
    for strict in &wanted.strict {
        let of_family = |net: &&IpNet| matches!(net, IpNet::V4(_)) == (family == Family::V4);
        rules.extend(strict.plaintext_from.iter().filter(of_family).map(|net| {
            let port = strict.port;
            format!("-p tcp --dport {port} -s {net} -j RETURN")
        }));
        rules.push(refuse(strict));
    }
    rules
}

fn refuse(strict: &StrictPort) -> String {
    format!("-p tcp --dport {} -j REJECT --reject-with tcp-reset", strict.port)
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::Caller;
    use super::super::super::wanted::tests::wanted;
    use super::super::saved;
    use super::*;
    use crate::enrol::Cgroup;

    fn restored(family: Family, wanted: &Wanted, facts: &Facts) -> String {
        tables(family, wanted, facts).iter().map(|table| table.restore(&[])).collect()
    }

    #[test]
    fn without_strict_ports_only_virtual_ips_are_touched() {
        let expected = "*filter
:MESHD_INPUT - [0:0]
:MESHD_OUTPUT - [0:0]
:MESHD_CALLER - [0:0]
:MESHD_STRANGER - [0:0]
-A MESHD_INPUT -m comment --comment meshd ! -i lo -d 240.240.0.0/16 -p tcp -j REJECT --reject-with tcp-reset
-A MESHD_INPUT -m comment --comment meshd ! -i lo -d 240.240.0.0/16 -j REJECT
-A MESHD_INPUT -m comment --comment meshd ! -i lo -p tcp --tcp-flags FIN,SYN,RST,ACK SYN -j MESHD_STRANGER
-A MESHD_OUTPUT -m comment --comment meshd -d 240.240.0.0/16 -j REJECT
-A MESHD_OUTPUT -m comment --comment meshd -o lo -p tcp --tcp-flags FIN,SYN,RST,ACK SYN -j MESHD_CALLER
-I INPUT 1 -m comment --comment meshd -j MESHD_INPUT
-I OUTPUT 1 -m comment --comment meshd -j MESHD_OUTPUT
COMMIT
*nat
:MESHD_OUTPUT - [0:0]
-A MESHD_OUTPUT -m comment --comment meshd -d 240.240.0.0/16 -p tcp -j REDIRECT --to-ports 15001
-I OUTPUT 1 -m comment --comment meshd -j MESHD_OUTPUT
COMMIT
";
        assert_eq!(restored(Family::V4, &wanted(), &Facts::default()), expected);
        let v6 = restored(Family::V6, &wanted(), &Facts::default());
        assert_eq!(v6, expected.replace("240.240.0.0/16", "fd6d:6573:6864::/64"));
    }

    #[test]
    fn strict_ports_let_in_only_the_daemon_and_named_callers() {
        let mut wanted = wanted();
        let local = [Caller::Uid(997), Caller::Unit("a\\x2db.service".into()), Caller::Unit("off.service".into())];
        wanted.strict = [StrictPort {
            port: 8080,
            owner: Caller::Uid(997),
            local: local.into_iter().collect(),
            plaintext_from: ["10.9.0.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()].into_iter().collect(),
        }]
        .into();
        let path = "system.slice/a\\x2db.service".to_owned();
        let cgroup = Cgroup { nft_path: format!("unified/{path}"), path, level: 2, id: 7 };
        let facts = Facts { cgroups: [("a\\x2db.service".to_owned(), cgroup)].into(), ..Facts::default() };
        let (v4, v6) = (restored(Family::V4, &wanted, &facts), restored(Family::V6, &wanted, &facts));
        for rule in [
            "MESHD_CALLER -m comment --comment meshd -m owner --uid-owner 998 -m mark --mark 0x4d0000/0xff0000 -j RETURN",
            "MESHD_CALLER -m comment --comment meshd -p tcp --dport 8080 -m owner --uid-owner 997 -j RETURN",
            r#"-p tcp --dport 8080 -m cgroup --path "system.slice/a\\x2db.service" -j RETURN"#,
            "MESHD_CALLER -m comment --comment meshd -p tcp --dport 8080 -j REJECT --reject-with tcp-reset",
            "MESHD_STRANGER -m comment --comment meshd -p tcp --dport 8080 -j REJECT --reject-with tcp-reset",
        ] {
            assert!(v4.contains(rule) && v6.contains(rule), "missing `{rule}` in\n{v4}\n{v6}");
        }
        assert!(v4.contains("-s 10.9.0.0/24 -j RETURN") && !v4.contains("fd00::"), "{v4}");
        assert!(v6.contains("-s fd00::/64 -j RETURN") && !v6.contains("10.9.0.0"), "{v6}");
        assert!(!v4.contains("off.service"), "{v4}");
    }

    #[test]
    fn jumps_that_are_there_make_way_for_one_at_the_top() {
        let nat = &tables(Family::V4, &wanted(), &Facts::default())[1];
        let present = saved::jumps("-A OUTPUT -j DOCKER\n-A OUTPUT -m comment --comment meshd -j MESHD_OUTPUT\n");
        let text = nat.restore(&present);
        let end = "-D OUTPUT -m comment --comment meshd -j MESHD_OUTPUT\n\
                   -I OUTPUT 1 -m comment --comment meshd -j MESHD_OUTPUT\nCOMMIT\n";
        assert!(text.ends_with(end), "{text}");
        assert!(!text.contains("DOCKER"), "{text}");
    }

    #[test]
    fn a_table_that_somebody_emptied_meanwhile_is_not_all_there() {
        let nat = &tables(Family::V4, &wanted(), &Facts::default())[1];
        let saved = nat.restore(&[]).replace("-I OUTPUT 1", "-A OUTPUT");
        assert!(nat.is_in(&Ours::of(&saved)));
        let without =
            |start: &str| saved.lines().filter(|line| !line.starts_with(start)).collect::<Vec<_>>().join("\n");
        for missing in ["-A OUTPUT", "-A MESHD_OUTPUT"] {
            assert!(!nat.is_in(&Ours::of(&without(missing))), "{missing}");
        }
        assert!(!nat.is_in(&Ours::of(&saved.replace("-A OUTPUT", "-A OUTPUT -j DOCKER\n-A OUTPUT"))));
    }

    #[test]
    fn what_a_probe_tries_is_out_of_every_packets_way() {
        for table in tables(Family::V4, &wanted(), &Facts::default()) {
            let text = table.scratch();
            let output = format!("MESHD_TRY_{}_OUTPUT", std::process::id());
            assert!(text.contains(&format!("-A {output}")) && !text.contains("-I "), "{text}");
            assert!(table.scratch_removal().contains(&format!("-X {output}")), "{}", table.scratch_removal());
            assert_eq!(text.matches(PREFIX).count(), text.matches(SCRATCH_PREFIX).count(), "{text}");
        }
    }
}
