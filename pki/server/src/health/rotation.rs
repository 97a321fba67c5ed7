//! Which of what the rotation waits for will not pass by itself.

use crate::rotation::decide::{Decision, Gate};

/// Something that holds a rotation up and that time alone does not cure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) reason: &'static str,
    pub(crate) text: String,
}

/// Every reason there can be, so that an alert sees a zero before the first one.
pub(crate) const REASONS: [&str; 7] =
    ["clock", "hosts", "hosts_under", "replicas", "still_signing", "too_many_roots", "upstream"];

impl Gate {
    /// Whether time alone, or what is under way elsewhere, opens it.
    fn is_time(&self) -> bool {
        self.until().is_some() || matches!(self, Gate::Speaks | Gate::Upstream)
    }
}

/// A clock that is not believed blocks everything at once. Whatever else a root waits for is a block only when it is all
/// that it still waits for: until then hosts and servers have time.
pub(crate) fn blocks(outlook: &Decision) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for (root, gates) in &outlook.waiting {
        let only_these = !gates.iter().any(Gate::is_time);
        for gate in gates.iter().filter(|gate| only_these || **gate == Gate::Clock) {
            let text = match root {
                Some(root) if *gate != Gate::Clock => format!("root {root}: {}", gate.text()),
                _ => gate.text(),
            };
            let block = Block { reason: gate.name(), text };
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(gates: Vec<Gate>) -> Decision {
        Decision { step: None, waiting: vec![(Some("r1".to_owned()), gates)] }
    }

    #[test]
    fn a_wait_with_an_end_is_no_block() {
        let hosts = || Gate::Hosts(vec!["web".to_owned()]);
        assert!(blocks(&waiting(vec![hosts(), Gate::OldLeaves { until: 9 }])).is_empty());
        let found = blocks(&waiting(vec![hosts()]));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].reason, "hosts");
        assert!(found[0].text.contains("r1") && found[0].text.contains("web"), "{}", found[0].text);
        assert!(blocks(&waiting(vec![Gate::Due { at: 9 }])).is_empty());
    }

    #[test]
    fn a_clock_that_is_not_believed_blocks_whatever_else_is_waited_for_once() {
        let mut outlook = waiting(vec![Gate::Due { at: 9 }, Gate::Clock]);
        outlook.waiting.push((None, vec![Gate::Due { at: 9 }, Gate::Clock]));
        let found = blocks(&outlook);
        assert_eq!(found.iter().map(|block| block.reason).collect::<Vec<_>>(), ["clock"]);
    }

    #[test]
    fn every_reason_that_can_block_is_exported() {
        let none = Vec::new;
        let all = [
            Gate::TooManyRoots,
            Gate::Clock,
            Gate::Replicas(none()),
            Gate::Hosts(none()),
            Gate::StillSigning(none()),
            Gate::HostsUnder(none()),
        ];
        assert!(all.iter().all(|gate| REASONS.contains(&gate.name())));
    }
}
