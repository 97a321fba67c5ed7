//! What one look at the host found.

use std::fmt::Write;

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Warning,
    Failed,
}

/// One checked thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What is as it should be if the verdict is `ok`.
    pub check: &'static str,
    pub verdict: Verdict,
    /// What was found.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

impl Finding {
    pub(super) fn ok(check: &'static str, detail: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Ok, detail: detail.into(), remedy: String::new() }
    }

    pub(super) fn warning(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Warning, detail: detail.into(), remedy: remedy.into() }
    }

    pub(super) fn failed(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Failed, detail: detail.into(), remedy: remedy.into() }
    }

    /// As Linkerd prints it: `√ ok`, `‼ warning`, `× failed`, what is wrong and what to do below.
    pub fn lines(&self) -> String {
        let Finding { check, verdict, detail, remedy } = self;
        match verdict {
            Verdict::Ok if detail.is_empty() => format!("√ {check}\n"),
            Verdict::Ok => format!("√ {check} ({detail})\n"),
            Verdict::Warning | Verdict::Failed => {
                let mark = if *verdict == Verdict::Failed { "×" } else { "‼" };
                let mut text = format!("{mark} {check}\n");
                for more in [detail, remedy].into_iter().filter(|more| !more.is_empty()) {
                    let _ = writeln!(text, "    {more}");
                }
                text
            }
        }
    }
}

/// The worst of them: what the exit code says.
pub fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_comes_with_what_to_do() {
        let finding = Finding::failed("there is a tool", "no hammer", "buy one");
        assert_eq!(finding.lines(), "× there is a tool\n    no hammer\n    buy one\n");
        assert_eq!(Finding::ok("there is a tool", "hammer 2").lines(), "√ there is a tool (hammer 2)\n");
    }

    #[test]
    fn the_worst_finding_counts() {
        let (ok, warning) = (Finding::ok("a", ""), Finding::warning("b", "", ""));
        assert_eq!(worst(&[]), Verdict::Ok);
        assert_eq!(worst(&[warning.clone(), ok]), Verdict::Warning);
        assert_eq!(worst(&[warning, Finding::failed("c", "", "")]), Verdict::Failed);
    }
}
