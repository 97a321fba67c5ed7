//! What the rotation waits for, in words, and which of it will not pass by itself.

use crate::rotation::decide::{Decision, Gate};
use crate::times::rfc3339;

/// How many names a line lists.
const LISTED: usize = 5;

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
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Gate::Speaks => "speaks",
            Gate::Upstream => "import",
            Gate::Due { .. } => "calendar",
            Gate::TooManyRoots => "too_many_roots",
            Gate::Clock => "clock",
            Gate::Replicas(_) => "replicas",
            Gate::OldLeaves { .. } => "old_leaves",
            Gate::Followers { .. } => "followers",
            Gate::Hosts(_) => "hosts",
            Gate::StillSigning(_) => "still_signing",
            Gate::LeavesUnder { .. } => "leaves_under",
            Gate::HostsUnder(_) => "hosts_under",
        }
    }

    pub(crate) fn text(&self) -> String {
        match self {
            Gate::Speaks => "it signs what hosts are told, for the active root is from outside".to_owned(),
            Gate::Upstream => "the next root comes from outside, by `meshd-pki import` or --upstream-chain".to_owned(),
            Gate::Due { at } => format!("not due before {}", rfc3339(*at)),
            Gate::TooManyRoots => "the bundle holds as many roots as it may; one has to leave first".to_owned(),
            Gate::Clock => "the clock is not believed; see the log of meshd-pki, check NTP".to_owned(),
            Gate::Replicas(names) => format!("servers that do not hand out the new root yet: {}", listed(names)),
            Gate::OldLeaves { until } => format!("leaves from before the new root live until {}", rfc3339(*until)),
            Gate::Followers { until } => format!("followers may ask for the bundle until {}", rfc3339(*until)),
            Gate::Hosts(names) => format!("hosts that have not acknowledged the new root: {}", listed(names)),
            Gate::StillSigning(names) => format!("servers that still sign under it: {}", listed(names)),
            Gate::LeavesUnder { until } => format!("leaves under it, and the hold, until {}", rfc3339(*until)),
            Gate::HostsUnder(names) => format!("hosts that still use a chain to it: {}", listed(names)),
        }
    }

    /// Whether it opens by itself, at a time known now.
    fn is_time(&self) -> bool {
        matches!(
            self,
            Gate::Speaks
                | Gate::Upstream
                | Gate::Due { .. }
                | Gate::OldLeaves { .. }
                | Gate::Followers { .. }
                | Gate::LeavesUnder { .. }
        )
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
            let block = Block { reason: gate.reason(), text };
            if !blocks.contains(&block) {
                blocks.push(block);
            }
        }
    }
    blocks
}

fn listed(names: &[String]) -> String {
    let more = names.len().saturating_sub(LISTED);
    let shown = names.iter().take(LISTED).map(String::as_str).collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
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
        assert!(all.iter().all(|gate| REASONS.contains(&gate.reason())));
    }

    #[test]
    fn long_lists_of_names_are_cut() {
        let names: Vec<String> = (0..8).map(|n| format!("h{n}")).collect();
        assert_eq!(listed(&names), "h0, h1, h2, h3, h4 and 3 more");
    }
}
