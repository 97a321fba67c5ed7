//! One table's part of our rules, and how it is put in force by `iptables-restore`.

use super::saved::{Jump, Ours};

/// Every chain of ours begins with it, and nobody else's does.
pub(super) const PREFIX: &str = "MESHD_";
/// Ours by its beginning, so that a revert also removes what a probe that was killed left.
pub(super) const SCRATCH_PREFIX: &str = "MESHD_TRY_";

const COMMENT: &str = "-m comment --comment meshd";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub name: &'static str,
    /// From the kernel's chain to ours, always first there: before Docker's and kube-proxy's DNAT, and before a
    /// host's own rule that would let strangers in to a strict port.
    pub jumps: &'static [(&'static str, &'static str)],
    pub chains: Vec<Chain>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub name: &'static str,
    pub rules: Vec<String>,
}

impl Table {
    /// Where nothing of ours is wanted.
    pub(super) fn empty(name: &'static str) -> Table {
        Table { name, jumps: &[], chains: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// `iptables-restore --noflush` input that puts this table in force, whatever of it is there already. What an
    /// earlier one had besides goes.
    pub(super) fn restore(&self, present: &Ours) -> String {
        if self.is_empty() {
            return present.removal(self.name).unwrap_or_default();
        }
        // What a probe tries at this moment is gone by itself soon.
        let is_gone = |name: &&String| {
            !name.starts_with(SCRATCH_PREFIX) && !self.chains.iter().any(|chain| chain.name == name.as_str())
        };
        let gone: Vec<&String> = present.chains.iter().filter(is_gone).collect();
        let jumps = self.jumps.iter().map(|(from, to)| format!("-I {from} 1 {COMMENT} -j {to}"));
        let emptied = gone.iter().map(|name| format!("-F {name}"));
        let removed = gone.iter().map(|name| format!("-X {name}"));
        self.transaction(present.jumps.iter().map(Jump::delete).chain(jumps).chain(emptied).chain(removed))
    }

    /// Whether all of it is there: each jump at the top, each rule of each chain.
    pub(super) fn is_in(&self, ours: &Ours) -> bool {
        let jumps = self.jumps.iter().all(|(from, to)| ours.begins_with_jump(from, to));
        let rules = self.chains.iter().all(|chain| ours.rules_of(chain.name) == chain.rules.len());
        jumps && rules && (!self.is_empty() || *ours == Ours::default())
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
