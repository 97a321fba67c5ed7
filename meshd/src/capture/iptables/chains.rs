//! Our rules, family by family, as `iptables-restore` reads them. What nothing of ours decides goes back to the
//! host's own rules (RETURN, never ACCEPT): we must not open what they close.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::super::wanted::{Facts, Wanted};
use super::plain::{self, Life};
use super::table::{Chain, Table};
use super::variant::Family;
use super::{Abilities, SYN, alive, answers, local_caller, own_sockets, owners, raw};

/// In the order they are put in force, and taken out of it from the end: filter comes first, so that in between
/// virtual IPs are refused and strict ports closed, never a capture without its guard; capture goes before what
/// refuses the uncaptured.
pub(super) const TABLES: [&str; 4] = ["filter", "security", "mangle", "nat"];

/// Everything of one family, by `TABLES`. Each table is replaced in one step.
pub(super) fn tables(family: Family, wanted: &Wanted, facts: &Facts, can: Abilities, life: Life) -> [Table; 4] {
    let ports = if can.ledger { wanted.counted_ports() } else { BTreeSet::new() };
    [
        filter(family, wanted, facts, life),
        plain::table(wanted, &ports, life),
        mangle(family, wanted, facts, can),
        nat(family, wanted, facts, can),
    ]
}

fn virtual_ips(family: Family, wanted: &Wanted) -> String {
    match family {
        Family::V4 => wanted.vip4.to_string(),
        Family::V6 => wanted.vip6.to_string(),
    }
}

fn filter(family: Family, wanted: &Wanted, facts: &Facts, life: Life) -> Table {
    let vip = virtual_ips(family, wanted);
    Table {
        name: "filter",
        jumps: &[("INPUT", "MESHD_INPUT"), ("OUTPUT", "MESHD_OUTPUT")],
        chains: vec![
            plain::life_chain(life),
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
    }
}

fn mangle(family: Family, wanted: &Wanted, facts: &Facts, can: Abilities) -> Table {
    let mut rules = answers::rules(family, wanted);
    rules.extend((!wanted.raw_callers.is_empty()).then(|| alive::rule(family, wanted)));
    rules.extend(can.owners.then(|| owners::rule(&virtual_ips(family, wanted))));
    if rules.is_empty() {
        return Table::empty("mangle");
    }
    let mut chains = vec![Chain { name: "MESHD_OUTPUT", rules }];
    chains.extend(can.owners.then(|| owners::chain(wanted, facts)));
    Table { name: "mangle", jumps: &[("OUTPUT", "MESHD_OUTPUT")], chains }
}

fn nat(family: Family, wanted: &Wanted, facts: &Facts, can: Abilities) -> Table {
    let (vip, capture_port) = (virtual_ips(family, wanted), wanted.capture_port);
    let mut rules = vec![format!("-d {vip} -p tcp -j REDIRECT --to-ports {capture_port}")];
    let mut chains = Vec::new();
    if !wanted.raw_callers.is_empty() {
        rules.push(raw::rule());
        chains.extend(raw::chains(family, wanted, facts, can));
    }
    chains.insert(0, Chain { name: "MESHD_OUTPUT", rules });
    Table { name: "nat", jumps: &[("OUTPUT", "MESHD_OUTPUT")], chains }
}

fn local_callers(wanted: &Wanted, facts: &Facts) -> Vec<String> {
    if wanted.strict.is_empty() {
        return Vec::new();
    }
    let mut rules = vec![format!("{} -j RETURN", own_sockets(wanted))];
    for strict in &wanted.strict {
        let port = strict.port;
        let callers = strict.local.iter().flat_map(|caller| facts.present(caller));
        rules.extend(callers.map(|caller| format!("-p tcp --dport {port} {} -j RETURN", local_caller(caller))));
    }
    rules.extend(refuse(wanted));
    rules
}

fn strangers(family: Family, wanted: &Wanted) -> Vec<String> {
    let mut rules = Vec::new();
    for strict in &wanted.strict {
        let of_family = |net: &&IpNet| matches!(net, IpNet::V4(_)) == (family == Family::V4);
        rules.extend(strict.plaintext_from.iter().filter(of_family).map(|net| {
            let port = strict.port;
            format!("-p tcp --dport {port} -s {net} -j RETURN")
        }));
    }
    rules.extend(refuse(wanted));
    rules
}

/// After everybody who may: a port may be strict for several deliveries, each with callers of its own.
fn refuse(wanted: &Wanted) -> impl Iterator<Item = String> {
    let ports: BTreeSet<u16> = wanted.strict.iter().map(|strict| strict.port).collect();
    ports.into_iter().map(|port| format!("-p tcp --dport {port} -j REJECT --reject-with tcp-reset"))
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::tests::wanted;
    use super::super::super::wanted::{Caller, StrictPort};
    use super::super::saved::Ours;
    use super::super::table::{PREFIX, SCRATCH_PREFIX};
    use super::*;
    use crate::enrol::Cgroup;

    fn restored(family: Family, wanted: &Wanted, facts: &Facts) -> String {
        tables(family, wanted, facts, Abilities::default(), 0x2a)
            .iter()
            .map(|table| table.restore(&Ours::default()))
            .collect()
    }

    #[test]
    fn without_strict_ports_only_virtual_ips_are_touched() {
        let expected = "*filter
:MESHD_LIFE - [0:0]
:MESHD_INPUT - [0:0]
:MESHD_OUTPUT - [0:0]
:MESHD_CALLER - [0:0]
:MESHD_STRANGER - [0:0]
-A MESHD_LIFE -m comment --comment meshd -m mark --mark 0x2a -j RETURN
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
    fn a_port_that_is_strict_for_two_deliveries_lets_the_callers_of_both_in() {
        let of = |uid, net: &str| StrictPort {
            port: 8080,
            owner: Caller::Uid(uid),
            local: [Caller::Uid(uid)].into(),
            plaintext_from: [net.parse().unwrap()].into(),
        };
        let wanted = Wanted { strict: [of(7, "10.7.0.0/16"), of(8, "10.8.0.0/16")].into(), ..wanted() };
        for rules in [local_callers(&wanted, &Facts::default()), strangers(Family::V4, &wanted)] {
            let refused = rules.iter().position(|rule| rule.contains("-j REJECT"));
            assert_eq!(refused, Some(rules.len() - 1), "{rules:#?}");
            assert_eq!(
                rules.iter().filter(|rule| rule.contains("--dport 8080") && rule.ends_with("RETURN")).count(),
                2
            );
        }
    }

    #[test]
    fn jumps_that_are_there_make_way_for_one_at_the_top() {
        let nat = nat(Family::V4, &wanted(), &Facts::default(), Abilities::default());
        let present = Ours::of("-A OUTPUT -j DOCKER\n-A OUTPUT -m comment --comment meshd -j MESHD_OUTPUT\n");
        let text = nat.restore(&present);
        let end = "-D OUTPUT -m comment --comment meshd -j MESHD_OUTPUT\n\
                   -I OUTPUT 1 -m comment --comment meshd -j MESHD_OUTPUT\nCOMMIT\n";
        assert!(text.ends_with(end), "{text}");
        assert!(!text.contains("DOCKER"), "{text}");
    }

    #[test]
    fn a_table_that_somebody_emptied_meanwhile_is_not_all_there() {
        let nat = nat(Family::V4, &wanted(), &Facts::default(), Abilities::default());
        let saved = nat.restore(&Ours::default()).replace("-I OUTPUT 1", "-A OUTPUT");
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
        let wanted = Wanted { permissive: [25].into(), ..wanted() };
        let can = Abilities { ledger: true, owners: true };
        for table in tables(Family::V4, &wanted, &Facts::default(), can, 7) {
            let text = table.scratch();
            let output = format!("MESHD_TRY_{}_OUTPUT", std::process::id());
            assert!(text.contains(&format!("-A {output}")) && !text.contains("-I "), "{text}");
            assert!(table.scratch_removal().contains(&format!("-X {output}")), "{}", table.scratch_removal());
            assert_eq!(text.matches(PREFIX).count(), text.matches(SCRATCH_PREFIX).count(), "{text}");
        }
    }
}
