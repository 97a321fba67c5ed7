//! Rules of others on this host that would fight ours, and ours where they should not be.

use super::finding::Finding;
use super::ruleset::{self, Chain};
use super::tools::look;

/// What is in the packet filter, whoever put it there.
pub(super) struct RuleFacts {
    pub chains: Vec<Chain>,
    /// Whether a daemon answers on this host.
    pub daemon_runs: bool,
}

impl RuleFacts {
    pub(super) fn gather(daemon_runs: bool) -> RuleFacts {
        let iptables = ["iptables-nft-save", "iptables-legacy-save", "ip6tables-nft-save", "ip6tables-legacy-save"];
        let mut chains: Vec<Chain> =
            iptables.iter().filter_map(|tool| look(tool, &[])).flat_map(|text| ruleset::from_iptables(&text)).collect();
        let nft = look("nft", &["--stateless", "list", "ruleset"]).unwrap_or_default();
        // nft lists the tables of iptables-nft, too, and less exactly than iptables itself.
        let of_iptables = |chain: &Chain| {
            let (_, table) = chain.table.split_once(' ').unwrap_or_default();
            chains.iter().any(|known| (known.table.as_str(), &known.name) == (table, &chain.name))
        };
        let more: Vec<Chain> = ruleset::from_nft(&nft).into_iter().filter(|chain| !of_iptables(chain)).collect();
        chains.extend(more);
        RuleFacts { chains, daemon_runs }
    }
}

/// A mesh that may have been here before.
struct Mesh {
    name: &'static str,
    /// What its chains or tables are called.
    prefixes: &'static [&'static str],
    remedy: &'static str,
}

const MESHES: [Mesh; 4] = [
    Mesh {
        name: "Istio",
        prefixes: &["ISTIO_", "istio-"],
        remedy: "remove Istio's rules: `pilot-agent istio-clean-iptables`, or delete its nft tables",
    },
    Mesh {
        name: "Linkerd",
        prefixes: &["PROXY_INIT_"],
        remedy: "delete Linkerd's chains from the nat table (iptables -t nat -D, -F and -X)",
    },
    Mesh {
        name: "Consul",
        prefixes: &["CONSUL_PROXY_", "CONSUL_DNS_"],
        remedy: "delete Consul's chains from the nat table (iptables -t nat -D, -F and -X)",
    },
    Mesh {
        name: "Kuma",
        prefixes: &["KUMA_MESH_", "MESH_INBOUND", "MESH_OUTBOUND"],
        remedy: "remove Kuma's rules: `kumactl uninstall transparent-proxy`",
    },
];

impl Mesh {
    fn owns(&self, chain: &Chain) -> bool {
        let table = chain.table.rsplit(' ').next().unwrap_or_default();
        self.prefixes.iter().any(|prefix| chain.name.starts_with(prefix) || table.starts_with(prefix))
    }
}

pub(super) fn judge(facts: &RuleFacts, mesh_port: u16) -> Vec<Finding> {
    let mut findings = other_meshes(&facts.chains);
    findings.push(own_leftovers(facts));
    findings.push(firewall(&facts.chains, mesh_port));
    findings
}

fn other_meshes(chains: &[Chain]) -> Vec<Finding> {
    let check = "no other mesh captures connections";
    let found: Vec<Finding> = MESHES.iter().filter_map(|mesh| one_mesh(mesh, chains, check)).collect();
    if found.is_empty() { vec![Finding::ok(check, "")] } else { found }
}

fn one_mesh(mesh: &Mesh, chains: &[Chain], check: &'static str) -> Option<Finding> {
    let left: Vec<&Chain> = chains.iter().filter(|chain| mesh.owns(chain)).collect();
    let first = left.first()?;
    let more = if left.len() > 1 { format!(" and {} more", left.len() - 1) } else { String::new() };
    let in_force = left.iter().any(|chain| chain.hook.is_some() || ruleset::is_entered(chains, &chain.name));
    let place = first.place();
    Some(match in_force {
        true => Finding::failed(check, format!("{} does: {place}{more}", mesh.name), mesh.remedy),
        false => Finding::warning(check, format!("{} left {place}{more}, out of use", mesh.name), mesh.remedy),
    })
}

fn own_leftovers(facts: &RuleFacts) -> Finding {
    let check = "no rules of an earlier meshd are left";
    match facts.chains.iter().find(|chain| chain.is_ours()) {
        Some(chain) if !facts.daemon_runs => Finding::warning(
            check,
            format!("{} is there without a daemon: virtual IPs are refused, strict ports closed", chain.place()),
            "start meshd, or run `meshd intercept revert`",
        ),
        Some(_) => Finding::ok(check, "the running daemon's are there"),
        None => Finding::ok(check, ""),
    }
}

/// Best effort: a rule that admits the port under conditions counts as admitting it.
fn firewall(chains: &[Chain], port: u16) -> Finding {
    let check = "the firewall lets peers in";
    let closed = chains
        .iter()
        .filter(|chain| !chain.is_ours() && chain.hook.as_deref() == Some("input") && drops_the_rest(chain))
        .find(|chain| !chains.iter().any(|other| other.table == chain.table && admits(other, port)));
    match closed {
        None => Finding::ok(check, ""),
        Some(chain) => Finding::warning(
            check,
            format!("{} drops what no rule accepts, and none names port {port}", chain.place()),
            opening(chains, chain, port),
        ),
    }
}

fn drops_the_rest(chain: &Chain) -> bool {
    let last = chain.rules.last().map(String::as_str).unwrap_or_default();
    let last = last.trim_start_matches("counter ");
    let always = ["drop", "reject", "-j DROP", "-j REJECT"];
    chain.policy_drop
        || always.iter().any(|verdict| last == *verdict || last.starts_with(&format!("{verdict} with")))
        || last.starts_with("-j REJECT --reject-with")
}

fn admits(chain: &Chain, port: u16) -> bool {
    let accepts = |rule: &&String| rule.contains("accept") || rule.contains("ACCEPT");
    chain.rules.iter().filter(accepts).any(|rule| {
        // What a named set holds is not looked at.
        matches!(rule.as_str(), "accept" | "-j ACCEPT") || rule.contains("dport @") || names_port(rule, port)
    })
}

/// Whether a rule for destination ports names this one, alone, in a set or in a range.
fn names_port(rule: &str, port: u16) -> bool {
    let words = rule.split(|character: char| character.is_whitespace() || matches!(character, ',' | '{' | '}'));
    rule.contains("dport")
        && words.filter(|word| !word.is_empty()).any(|word| match word.split_once(['-', ':']) {
            Some((first, last)) => match (first.parse::<u16>(), last.parse::<u16>()) {
                (Ok(first), Ok(last)) => (first..=last).contains(&port),
                _ => false,
            },
            None => word.parse() == Ok(port),
        })
}

fn opening(chains: &[Chain], closed: &Chain, port: u16) -> String {
    if chains.iter().any(|chain| chain.name.starts_with("ufw")) {
        return format!("run `ufw allow {port}/tcp`");
    }
    if closed.table.contains("firewalld") {
        return format!("run `firewall-cmd --permanent --add-port={port}/tcp` and `firewall-cmd --reload`");
    }
    let Chain { table, name, .. } = closed;
    match table.contains(' ') {
        true => format!("run `nft insert rule {table} {name} tcp dport {port} accept`, and make it permanent"),
        false => format!("run `iptables -I {name} -p tcp --dport {port} -j ACCEPT`, and make it permanent"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::ruleset::{from_iptables, from_nft};
    use super::*;

    const MESH_PORT: u16 = 15008;

    #[test]
    fn another_mesh_in_force_is_a_failure_and_its_remains_a_warning() {
        let remains = "*nat\n:OUTPUT ACCEPT [0:0]\n:ISTIO_OUTPUT - [0:0]\n";
        let in_force = format!("{remains}-A OUTPUT -p tcp -j ISTIO_OUTPUT\n");
        let of = |text: &str| other_meshes(&from_iptables(text)).remove(0);
        assert_eq!((of(remains).verdict, of(&in_force).verdict), (Verdict::Warning, Verdict::Failed));
        assert!(of(&in_force).detail.contains("Istio does: table nat, chain ISTIO_OUTPUT"));
    }

    #[test]
    fn every_mesh_is_known_by_its_chains_or_tables() {
        for (name, mesh) in [
            ("PROXY_INIT_OUTPUT", "Linkerd"),
            ("CONSUL_PROXY_OUTPUT", "Consul"),
            ("KUMA_MESH_OUTBOUND", "Kuma"),
            ("MESH_OUTBOUND", "Kuma"),
        ] {
            let findings = other_meshes(&from_iptables(&format!("*nat\n:{name} - [0:0]\n")));
            assert!(findings[0].detail.starts_with(mesh), "{name}: {findings:?}");
        }
        let ambient = "table inet istio-ambient-nat {\nchain output {\ntype nat hook output priority -100; policy accept;\n}\n}\n";
        assert_eq!(other_meshes(&from_nft(ambient))[0].verdict, Verdict::Failed);
        assert_eq!(other_meshes(&from_iptables("*nat\n:OUTPUT ACCEPT\n:DOCKER -\n"))[0].verdict, Verdict::Ok);
    }

    #[test]
    fn our_own_rules_are_leftovers_only_without_a_daemon() {
        let chains = from_nft("table inet meshd {\nchain prerouting {\n}\n}\n");
        let with = |daemon_runs| own_leftovers(&RuleFacts { chains: chains.clone(), daemon_runs }).verdict;
        assert_eq!((with(true), with(false)), (Verdict::Ok, Verdict::Warning));
    }

    #[test]
    fn a_firewall_without_a_word_about_the_port_is_warned_about() {
        let with = |rule: &str| {
            let text = format!(
                "table inet filter {{\nchain input {{\ntype filter hook input priority 0; policy drop;\n{rule}\n}}\n}}\n"
            );
            firewall(&from_nft(&text), MESH_PORT).verdict
        };
        assert_eq!(with("tcp dport 22 accept"), Verdict::Warning);
        assert_eq!(with("tcp dport 15008 drop"), Verdict::Warning);
        assert_eq!(with("tcp sport 15008 accept"), Verdict::Warning);
        for admitted in ["tcp dport 15008", "tcp dport { 22, 15000-15100 }", "tcp dport @open"] {
            assert_eq!(with(&format!("{admitted} accept")), Verdict::Ok, "{admitted}");
        }
    }

    #[test]
    fn a_final_reject_closes_like_a_policy_does() {
        let with = |rule: &str| {
            let text = format!("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\n-A INPUT {rule}\n");
            firewall(&from_iptables(&text), MESH_PORT)
        };
        let closed = with("-j REJECT --reject-with icmp-host-prohibited");
        assert_eq!(closed.verdict, Verdict::Warning);
        assert!(closed.remedy.contains("iptables -I INPUT"), "{}", closed.remedy);
        assert_eq!(with("-p tcp --dport 15000:15100 -j ACCEPT").verdict, Verdict::Ok);
    }

    #[test]
    fn ufw_is_opened_with_ufw() {
        let text = "*filter\n:INPUT DROP [0:0]\n:ufw-user-input - [0:0]\n-A INPUT -j ufw-user-input\n";
        assert_eq!(firewall(&from_iptables(text), MESH_PORT).remedy, "run `ufw allow 15008/tcp`");
        let allowed = format!("{text}-A ufw-user-input -p tcp --dport 15008 -j ACCEPT\n");
        assert_eq!(firewall(&from_iptables(&allowed), MESH_PORT).verdict, Verdict::Ok);
    }
}
