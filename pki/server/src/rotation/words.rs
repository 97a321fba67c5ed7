//! What a step waits for, in words: the same in `status`, in metrics, and for whoever asks for the step.

use super::decide::Gate;
use crate::times::rfc3339;

/// How many names a line lists.
const LISTED: usize = 5;

impl Gate {
    pub(crate) fn name(&self) -> &'static str {
        self.words().0
    }

    pub(crate) fn why(&self) -> &'static str {
        self.words().1
    }

    fn words(&self) -> (&'static str, &'static str) {
        match self {
            Gate::Due { .. } => ("due", "not due by the calendar"),
            Gate::Speaks => ("speaks", "it signs what hosts are told, for the active root is from outside"),
            Gate::Upstream => ("import", "the next root comes from outside, by `meshd-pki import` or --upstream-chain"),
            Gate::TooManyRoots => {
                ("too_many_roots", "the bundle holds as many roots as it may; an old one has to leave first")
            }
            Gate::Clock => ("clock", "the PKI's clock is not believed; see the log of meshd-pki, check NTP"),
            Gate::Replicas(_) => ("replicas", "servers of the PKI that do not hand the root out yet"),
            Gate::OldLeaves { .. } => ("old_leaves", "certificates that came without the root may be valid"),
            Gate::Followers { .. } => ("followers", "who follows the bundle endpoint may not have asked again"),
            Gate::Hosts(_) => {
                ("hosts", "hosts that have not acknowledged the root (one that stays silent stops counting)")
            }
            Gate::StillSigning(_) => ("still_signing", "servers of the PKI that still sign under the root"),
            Gate::LeavesUnder { .. } => ("leaves_under", "certificates under it may be in use, the hold included"),
            Gate::LastLeaves { .. } => (
                "leaves_under",
                "certificates under it may be in use (there is no hold: it vouched for a root that is tainted)",
            ),
            Gate::HostsUnder(_) => {
                ("hosts_under", "hosts that report certificates under it (one that stays silent stops counting)")
            }
        }
    }

    /// When it opens by itself, where that is known.
    pub(crate) fn until(&self) -> Option<i64> {
        match self {
            Gate::Due { at: until }
            | Gate::OldLeaves { until }
            | Gate::Followers { until }
            | Gate::LeavesUnder { until }
            | Gate::LastLeaves { until } => Some(*until),
            _ => None,
        }
    }

    pub(crate) fn who(&self) -> &[String] {
        match self {
            Gate::Replicas(who) | Gate::Hosts(who) | Gate::StillSigning(who) | Gate::HostsUnder(who) => who,
            _ => &[],
        }
    }

    /// In one line.
    pub(crate) fn text(&self) -> String {
        let who = if self.who().is_empty() { String::new() } else { format!(": {}", listed(self.who())) };
        let until = self.until().map(|until| format!(" (until {})", rfc3339(until))).unwrap_or_default();
        format!("{}{who}{until}", self.why())
    }
}

/// The first of these names.
pub(crate) fn listed(names: &[impl AsRef<str>]) -> String {
    let shown = names.iter().take(LISTED).map(AsRef::as_ref).collect::<Vec<&str>>().join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_of_names_are_cut() {
        let names: Vec<String> = (0..8).map(|n| format!("h{n}")).collect();
        assert_eq!(listed(&names), "h0, h1, h2, h3, h4 and 3 more");
        assert_eq!(listed(&names[..2]), "h0, h1");
    }

    #[test]
    fn a_line_says_who_and_until_when() {
        let hosts = Gate::StillSigning(vec!["a".to_owned()]);
        assert_eq!(hosts.text(), "servers of the PKI that still sign under the root: a");
        assert_eq!(Gate::Due { at: 0 }.text(), "not due by the calendar (until 1970-01-01T00:00:00Z)");
    }
}
