//! Other tools' packet filter rules, as `nft list ruleset` and `iptables-save` print them: enough of their structure
//! to look for names, marks and ports, and no more.

/// One chain, whoever made it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chain {
    /// `inet filter`, or `nat` of iptables.
    pub table: String,
    pub name: String,
    /// `input`, `output`...; None for one that others jump to.
    pub hook: Option<String>,
    pub policy_drop: bool,
    pub rules: Vec<String>,
}

impl Chain {
    /// Ours are checked for elsewhere.
    pub(super) fn is_ours(&self) -> bool {
        [" meshd", " meshd_raw"].iter().any(|table| self.table.ends_with(table)) || self.name.starts_with("MESHD_")
    }

    /// What an operator recognises it by.
    pub(super) fn place(&self) -> String {
        format!("table {}, chain {}", self.table, self.name)
    }
}

/// Whether some rule leads to a chain of this name.
pub(super) fn is_entered(chains: &[Chain], name: &str) -> bool {
    let leads = |rule: &String| {
        let words: Vec<&str> = rule.split_whitespace().collect();
        words.windows(2).any(|pair| matches!(pair[0], "jump" | "goto" | "-j" | "-g") && pair[1] == name)
    };
    chains.iter().flat_map(|chain| &chain.rules).any(leads)
}

/// `nft list ruleset`.
pub(super) fn from_nft(text: &str) -> Vec<Chain> {
    let mut chains = Vec::new();
    let (mut table, mut chain) = (String::new(), None::<Chain>);
    let mut statement = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = opened(line, "table ") {
            name.clone_into(&mut table);
        } else if let Some(name) = opened(line, "chain ") {
            chain = Some(Chain { table: table.clone(), name: name.to_owned(), ..Chain::default() });
        } else if line == "}" {
            // Of a set or a table, it ends nothing we keep.
            chains.extend(chain.take());
        } else if let Some(chain) = &mut chain {
            statement.push_str(line);
            statement.push(' ');
            // A long set goes on over several lines.
            if statement.matches('{').count() == statement.matches('}').count() {
                add_statement(chain, statement.trim());
                statement.clear();
            }
        }
    }
    chains
}

/// The name in `table inet filter {`; a comment may follow: tables with an owner say who it is.
fn opened<'a>(line: &'a str, kind: &str) -> Option<&'a str> {
    Some(line.strip_prefix(kind)?.split_once('{')?.0.trim())
}

fn add_statement(chain: &mut Chain, statement: &str) {
    match statement.strip_prefix("type ").and_then(|rest| rest.split_once(" hook ")) {
        Some((_, rest)) => {
            chain.hook = rest.split_whitespace().next().map(str::to_owned);
            chain.policy_drop = rest.contains("policy drop");
        }
        None if statement.is_empty() || statement.starts_with('#') => {}
        None => chain.rules.push(statement.to_owned()),
    }
}

/// `iptables-save`, of either variant and family.
pub(super) fn from_iptables(text: &str) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(rest) = line.strip_prefix(':') {
            let mut words = rest.split_whitespace();
            let (name, policy) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            // Built-in chains have a policy and hang on the hook of their name.
            let hook = (policy != "-").then(|| name.to_lowercase());
            let (table, name) = (table.to_owned(), name.to_owned());
            chains.push(Chain { table, name, hook, policy_drop: policy == "DROP", rules: Vec::new() });
        } else if let Some((name, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' '))
            && let Some(chain) = chains.iter_mut().rev().find(|chain| chain.table == table && chain.name == name)
        {
            chain.rules.push(rule.to_owned());
        }
    }
    chains
}

#[cfg(test)]
mod tests {
    use super::*;

    const NFT: &str = "table inet filter {
	set open {
		type inet_service
		elements = { 22, 80 }
	}

	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		tcp dport { 22, 80,
			    443 } accept
		jump more
	}

	chain more {
	}
}
table ip nat {
	chain OUTPUT {
		type nat hook output priority -100; policy accept;
		meta l4proto tcp jump ISTIO_OUTPUT
	}
}
";

    #[test]
    fn chains_of_nft_have_hook_policy_and_rules() {
        let chains = from_nft(NFT);
        let names: Vec<_> = chains.iter().map(|chain| (chain.table.as_str(), chain.name.as_str())).collect();
        assert_eq!(names, [("inet filter", "input"), ("inet filter", "more"), ("ip nat", "OUTPUT")]);
        assert_eq!((chains[0].hook.as_deref(), chains[0].policy_drop), (Some("input"), true));
        assert_eq!(
            chains[0].rules,
            ["ct state established,related accept", "tcp dport { 22, 80, 443 } accept", "jump more"]
        );
        assert_eq!((chains[1].hook.as_deref(), chains[2].policy_drop), (None, false));
    }

    #[test]
    fn a_table_that_belongs_to_a_process_is_read_like_any_other_and_ours_is_known() {
        let text =
            "table inet filter {\n}\ntable inet meshd_raw { # progname nft\n\tflags owner\n\n\tchain take {\n\t}\n}\n";
        let chains = from_nft(text);
        assert_eq!(chains[0].table, "inet meshd_raw");
        assert!(chains[0].is_ours());
        assert!(!from_nft("table inet my_meshd {\nchain take {\n}\n}\n")[0].is_ours());
    }

    #[test]
    fn chains_of_iptables_do_too() {
        let text = "*filter\n:INPUT DROP [0:0]\n:ufw-user - [0:0]\n-A INPUT -j ufw-user\n-A ufw-user -p tcp -j ACCEPT\nCOMMIT\n";
        let chains = from_iptables(text);
        assert_eq!((chains[0].hook.as_deref(), chains[0].policy_drop), (Some("input"), true));
        assert_eq!(chains[0].rules, ["-j ufw-user"]);
        assert_eq!((chains[1].hook.as_deref(), chains[1].rules.len()), (None, 1));
    }

    #[test]
    fn a_chain_is_entered_by_a_jump_of_either_kind() {
        let chains = from_nft(NFT);
        assert!(is_entered(&chains, "more") && is_entered(&chains, "ISTIO_OUTPUT"));
        assert!(!is_entered(&chains, "input"));
        assert!(is_entered(&from_iptables("*nat\n:OUTPUT ACCEPT\n:X -\n-A OUTPUT -p tcp -j X\n"), "X"));
    }
}
