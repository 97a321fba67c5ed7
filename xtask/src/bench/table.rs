//! The table people read.

use std::fmt::Write;

use super::measure::Sample;
use super::report::{GOALS, Goal, METRICS, Report};
use super::subject::Subject;

/// One sample while the run goes on.
pub(crate) fn line(sample: &Sample) -> String {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), precise);
    format!(
        "{} us/request, {} us/connection, p50 {} p99 {} us, {} Gbit/s, {} s/GB, {} and {} MiB, {} failed",
        number(sample.cpu_us_per_request),
        number(sample.cpu_us_per_connection),
        precise(sample.p50_us),
        precise(sample.p99_us),
        precise(sample.bulk_gbit_per_second),
        number(sample.bulk_cpu_s_per_gb),
        number(sample.idle_mib),
        number(sample.idle_2000_mib),
        sample.failed,
    )
}

/// Markdown, so that it can be pasted into docs/benchmarks.md as it is.
pub(crate) fn render(report: &Report) -> String {
    let mut rows = vec![header(report)];
    for metric in &METRICS {
        let values: Vec<_> = report.subjects().map(|subject| report.median(subject, metric.key)).collect();
        let mut row = vec![metric.label.to_owned()];
        row.extend(values.iter().map(|value| value.map_or("-".to_owned(), precise)));
        row.extend([Subject::Haproxy, Subject::Envoy].map(|other| ratio(report, metric.key, other)));
        row.push(
            GOALS.iter().find(|goal| goal.key == metric.key).map(|goal| verdict(report, goal)).unwrap_or_default(),
        );
        rows.push(row);
    }
    let mut failed = vec!["failed requests".to_owned()];
    failed.extend(report.subjects().map(|subject| report.failed(subject).to_string()));
    failed.extend(std::iter::repeat_n(String::new(), 3));
    rows.push(failed);
    format!("{}\n{}", aligned(&rows), report.provenance())
}

fn header(report: &Report) -> Vec<String> {
    let mut row = vec!["both proxies together".to_owned()];
    row.extend(report.subjects().map(|subject| subject.to_string()));
    row.extend(["meshd / HAProxy", "meshd / Envoy", "goal for meshd"].map(str::to_owned));
    row
}

fn ratio(report: &Report, key: &str, other: Subject) -> String {
    match (report.median(Subject::Meshd, key), report.median(other, key)) {
        (Some(ours), Some(theirs)) if theirs > 0.0 => format!("{:.2}x", ours / theirs),
        _ => "-".to_owned(),
    }
}

fn verdict(report: &Report, goal: &Goal) -> String {
    let (sign, factor) = (if goal.at_most { "<=" } else { ">=" }, goal.factor);
    let text = match goal.against {
        Some(other) => format!("{sign} {factor}x {other}"),
        None => format!("{sign} {factor}"),
    };
    match is_met(report, goal) {
        Some(true) => format!("{text}: met"),
        Some(false) => format!("{text}: missed"),
        None => text,
    }
}

fn is_met(report: &Report, goal: &Goal) -> Option<bool> {
    let ours = report.median(Subject::Meshd, goal.key)?;
    let bound = goal.factor
        * match goal.against {
            Some(other) => report.median(other, goal.key)?,
            None => 1.0,
        };
    Some(if goal.at_most { ours <= bound } else { ours >= bound })
}

/// Three digits that matter.
fn precise(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if index == 0 {
            for width in &widths {
                let _ = write!(text, "|-{}-", "-".repeat(*width));
            }
            text.push_str("|\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::built::Built;

    fn report(haproxy: f64, meshd: f64) -> Report {
        let built = Built { target: "target".into(), commit: "abc".to_owned() };
        let mut report = Report::begin(&built, 1);
        let sample = |value| Sample { cpu_us_per_request: Some(value), ..Sample::default() };
        report.add(Subject::Haproxy, sample(haproxy));
        report.add(Subject::Meshd, sample(meshd));
        report
    }

    #[test]
    fn the_table_says_ratio_and_goal() {
        let met = render(&report(20.0, 14.0));
        assert!(met.contains("0.70x") && met.contains("<= 0.75x HAProxy: met"), "{met}");
        let missed = render(&report(20.0, 16.0));
        assert!(missed.contains("<= 0.75x HAProxy: missed"), "{missed}");
    }

    #[test]
    fn a_goal_against_an_absent_proxy_is_left_open() {
        let table = render(&report(20.0, 14.0));
        assert!(table.contains(">= 1.05x Envoy "), "{table}");
    }
}
