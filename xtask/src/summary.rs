//! What ran, what failed, what was left out and how long it took, for the end of the output.

use std::time::{Duration, Instant};

/// A line that begins like this tells why a tier did not run.
pub(crate) const RESULT: &str = "not run: ";
/// A line that begins like this tells what a backend's run leaves out.
pub(crate) const LEFT_OUT: &str = "left out with ";

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    passed: usize,
    pub(crate) failed: usize,
    ignored: usize,
    pub(crate) reason: Option<String>,
    /// A line per backend.
    pub(crate) left_out: Vec<String>,
}

impl Counts {
    pub(crate) fn ran(&self) -> usize {
        self.passed + self.failed
    }

    /// `test result: ok. 3 passed; 0 failed; 1 ignored; ...`
    pub(crate) fn add(&mut self, line: &str) {
        self.left_out.extend(line.starts_with(LEFT_OUT).then(|| line.to_owned()));
        if let Some(reason) = line.strip_prefix(RESULT) {
            self.reason = Some(reason.to_owned());
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let words: Vec<&str> = result.split([' ', ';']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(count) = pair[0].parse::<usize>() else { continue };
            match pair[1] {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.ignored += count,
                _ => {}
            }
        }
    }
}

pub(crate) enum Outcome {
    Counted(Counts),
    Skipped(String),
}

impl Outcome {
    pub(crate) fn of(passed: bool) -> Self {
        Self::Counted(Counts { passed: passed.into(), failed: (!passed).into(), ..Counts::default() })
    }

    pub(crate) fn failed(reason: String) -> Self {
        Self::Counted(Counts { failed: 1, reason: Some(reason), ..Counts::default() })
    }
}

struct Tier {
    name: &'static str,
    outcome: Outcome,
    took: Duration,
}

/// What ran, for the end of the output.
pub(crate) struct Summary {
    tiers: Vec<Tier>,
    started: Instant,
    last: Instant,
}

impl Default for Summary {
    fn default() -> Self {
        let now = Instant::now();
        Self { tiers: Vec::new(), started: now, last: now }
    }
}

impl Summary {
    /// It began when the one before it was added.
    pub(crate) fn add(&mut self, name: &'static str, outcome: Outcome) {
        let now = Instant::now();
        self.tiers.push(Tier { name, outcome, took: now - self.last });
        self.last = now;
    }

    /// What ran beside, at the end.
    pub(crate) fn append(&mut self, other: Self) {
        self.tiers.extend(other.tiers);
    }

    /// Whether everything was counted, and nothing ran.
    pub(crate) fn is_empty(&self) -> bool {
        self.tiers.iter().all(|tier| matches!(&tier.outcome, Outcome::Counted(counts) if counts.ran() == 0))
    }

    /// Whether nothing failed.
    pub(crate) fn print(&self) -> bool {
        println!("\nSummary");
        for Tier { name, outcome, took } in &self.tiers {
            println!("  {:>6} {name:<30} {}", minutes(*took), describe(outcome));
            if let Outcome::Counted(counts) = outcome {
                counts.left_out.iter().for_each(|line| println!("    {line}"));
            }
        }
        let counted = |count: fn(&Counts) -> usize| -> usize {
            let tiers = self.tiers.iter().filter_map(|tier| match &tier.outcome {
                Outcome::Counted(counts) => Some(counts),
                Outcome::Skipped(_) => None,
            });
            tiers.map(count).sum()
        };
        let failed = counted(|counts| counts.failed);
        println!("  {:>6} in all", minutes(self.started.elapsed()));
        println!("{} passed, {failed} failed", counted(|counts| counts.passed));
        failed == 0
    }
}

/// `12:34`
fn minutes(took: Duration) -> String {
    format!("{}:{:02}", took.as_secs() / 60, took.as_secs() % 60)
}

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Skipped(reason) => format!("SKIPPED: {reason}"),
        Outcome::Counted(Counts { passed, failed, ignored, reason, .. }) => {
            let ignored = if *ignored > 0 { format!(", {ignored} ignored") } else { String::new() };
            let reason = reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
            format!("{passed} passed, {failed} failed{ignored}{reason}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_test_programs_add_up() {
        let mut counts = Counts::default();
        counts.add("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        counts.add("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        counts.add("test a::b ... ok");
        assert_eq!(counts, Counts { passed: 4, failed: 2, ignored: 1, ..Counts::default() });
    }

    #[test]
    fn how_long_it_took_is_told_in_minutes_and_seconds() {
        assert_eq!(minutes(Duration::from_millis(61_999)), "1:01");
        assert_eq!(minutes(Duration::from_secs(3600)), "60:00");
    }

    #[test]
    fn a_filter_that_matches_nothing_is_told_from_a_tier_that_was_skipped() {
        let mut summary = Summary::default();
        summary.add("one", Outcome::Counted(Counts::default()));
        assert!(summary.is_empty());
        summary.add("two", Outcome::Skipped("not here".to_owned()));
        assert!(!summary.is_empty());
    }

    #[test]
    fn a_failed_tier_fails_the_run() {
        let mut summary = Summary::default();
        summary.add("one", Outcome::of(true));
        summary.add("two", Outcome::Skipped("not here".to_owned()));
        assert!(summary.print());
        summary.add("three", Outcome::of(false));
        assert!(!summary.print());
    }
}
