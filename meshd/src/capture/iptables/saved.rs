//! What of ours is in the output of `iptables-save`. Foreign rules are never looked into: only their last words
//! matter, which say where a rule jumps to.

use super::table::PREFIX;

/// A rule in a chain of others that jumps to one of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Jump {
    /// How many rules of its chain come before it.
    position: usize,
    /// As saved, without `-A`.
    rule: String,
}

impl Jump {
    pub(super) fn delete(&self) -> String {
        format!("-D {}", self.rule)
    }
}

/// Everything that is ours in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ours {
    pub jumps: Vec<Jump>,
    pub chains: Vec<String>,
    pub rules: Vec<String>,
}

impl Ours {
    pub(super) fn of(saved: &str) -> Ours {
        let chains = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
        let rules = saved.lines().filter_map(|line| line.strip_prefix("-A "));
        Ours {
            jumps: jumps(saved),
            chains: chains.filter(|name| name.starts_with(PREFIX)).map(str::to_owned).collect(),
            rules: rules.filter(|rule| rule.starts_with(PREFIX)).map(str::to_owned).collect(),
        }
    }

    pub(super) fn begins_with_jump(&self, from: &str, to: &str) -> bool {
        let is = |rule: &str| rule.starts_with(&format!("{from} ")) && rule.ends_with(&format!(" {to}"));
        self.jumps.iter().any(|jump| jump.position == 0 && is(&jump.rule))
    }

    pub(super) fn rules_of(&self, chain: &str) -> usize {
        let of = |rule: &&String| rule.strip_prefix(chain).is_some_and(|rest| rest.starts_with(' '));
        self.rules.iter().filter(of).count()
    }

    /// `iptables-restore --noflush` input that removes it; None if there is nothing.
    pub(super) fn removal(&self, table: &str) -> Option<String> {
        if *self == Ours::default() {
            return None;
        }
        let mut lines = vec![format!("*{table}")];
        lines.extend(self.jumps.iter().map(Jump::delete));
        // All are emptied before any goes: they jump to each other.
        lines.extend(self.chains.iter().map(|chain| format!("-F {chain}")));
        lines.extend(self.chains.iter().map(|chain| format!("-X {chain}")));
        lines.push("COMMIT\n".to_owned());
        Some(lines.join("\n"))
    }
}

fn jumps(saved: &str) -> Vec<Jump> {
    let mut jumps = Vec::new();
    let (mut chain, mut position) = ("", 0);
    for rule in saved.lines().filter_map(|line| line.strip_prefix("-A ")) {
        let of = rule.split(' ').next().unwrap_or_default();
        position = if of == chain { position + 1 } else { 0 };
        chain = of;
        // A target comes last; the same words inside a comment end with a quote.
        let mut last = rule.rsplit(' ');
        let (target, option) = (last.next().unwrap_or_default(), last.next().unwrap_or_default());
        if is_ours(target) && matches!(option, "-j" | "-g") && !chain.starts_with(PREFIX) {
            jumps.push(Jump { position, rule: rule.to_owned() });
        }
    }
    jumps
}

fn is_ours(target: &str) -> bool {
    target.starts_with(PREFIX) && target.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "*filter
:INPUT DROP [12:800]
:OUTPUT ACCEPT [0:0]
:MESHD_CALLER - [0:0]
:MESHD_OUTPUT - [0:0]
:ufw-before-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -p tcp -m comment --comment \"was -j MESHD_INPUT\" -j ACCEPT
-A INPUT -m comment --comment \"see -j MESHD_INPUT\"
-A OUTPUT -m comment --comment meshd -j MESHD_OUTPUT
-A OUTPUT -j MESHD_OUTPUT
-A MESHD_OUTPUT -o lo -j MESHD_CALLER
COMMIT
";

    #[test]
    fn only_chains_of_ours_and_jumps_to_them_are_ours() {
        let ours = Ours::of(SAVED);
        let jump = |position, rule: &str| Jump { position, rule: rule.to_owned() };
        assert_eq!(
            ours.jumps,
            [jump(0, "OUTPUT -m comment --comment meshd -j MESHD_OUTPUT"), jump(1, "OUTPUT -j MESHD_OUTPUT")]
        );
        assert_eq!(ours.chains, ["MESHD_CALLER", "MESHD_OUTPUT"]);
        assert_eq!(ours.rules, ["MESHD_OUTPUT -o lo -j MESHD_CALLER"]);
    }

    #[test]
    fn removal_takes_every_jump_and_empties_chains_before_any_goes() {
        let expected = "*filter
-D OUTPUT -m comment --comment meshd -j MESHD_OUTPUT
-D OUTPUT -j MESHD_OUTPUT
-F MESHD_CALLER
-F MESHD_OUTPUT
-X MESHD_CALLER
-X MESHD_OUTPUT
COMMIT
";
        assert_eq!(Ours::of(SAVED).removal("filter").as_deref(), Some(expected));
        assert_eq!(Ours::of("*filter\n:INPUT DROP [0:0]\n-A INPUT -j DROP\nCOMMIT\n").removal("filter"), None);
    }

    #[test]
    fn a_jump_that_somebody_got_ahead_of_is_another() {
        let overtaken = SAVED.replace("-A OUTPUT -m", "-A OUTPUT -j ACCEPT\n-A OUTPUT -m");
        assert_ne!(Ours::of(&overtaken), Ours::of(SAVED));
    }
}
