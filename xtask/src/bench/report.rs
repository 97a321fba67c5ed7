//! All samples of a run, their medians, and the goals.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use super::measure::Sample;
use super::subject::Subject;
use crate::built::Built;

pub(crate) struct Report {
    commit: String,
    rounds: usize,
    samples: BTreeMap<Subject, Vec<Sample>>,
}

/// One row of the table: what it is called and where it is in a sample.
pub(crate) struct Metric {
    pub(crate) key: &'static str,
    pub(crate) label: &'static str,
    pub(crate) of: fn(&Sample) -> Option<f64>,
}

const fn metric(key: &'static str, label: &'static str, of: fn(&Sample) -> Option<f64>) -> Metric {
    Metric { key, label, of }
}

pub(crate) const METRICS: [Metric; 12] = [
    metric("cpu_us_per_request", "CPU us per request", |sample| sample.cpu_us_per_request),
    metric("requests_per_second", "requests/s, 64 connections", |sample| Some(sample.requests_per_second)),
    metric("cpu_us_per_connection", "CPU us per new connection", |sample| sample.cpu_us_per_connection),
    metric("connections_per_second", "new connections/s", |sample| Some(sample.connections_per_second)),
    metric("p50_us", "p50 us at 5,000 requests/s", |sample| Some(sample.p50_us)),
    metric("p99_us", "p99 us at 5,000 requests/s", |sample| Some(sample.p99_us)),
    metric("bulk_gbit_per_second", "bulk Gbit/s", |sample| Some(sample.bulk_gbit_per_second)),
    metric("bulk_cpu_s_per_gb", "bulk CPU s per GB", |sample| sample.bulk_cpu_s_per_gb),
    metric("idle_mib", "MiB idle, both", |sample| sample.idle_mib),
    metric("idle_larger_mib", "MiB idle, the larger", |sample| sample.idle_larger_mib),
    metric("idle_2000_mib", "MiB, 2,000 idle connections, both", |sample| sample.idle_2000_mib),
    metric("idle_2000_larger_mib", "MiB, 2,000 idle, the larger", |sample| sample.idle_2000_larger_mib),
];

/// What meshd is to reach: `at_most` or at least `factor` times another's number, or times 1.
pub(crate) struct Goal {
    pub(crate) key: &'static str,
    pub(crate) against: Option<Subject>,
    pub(crate) factor: f64,
    pub(crate) at_most: bool,
}

const fn goal(key: &'static str, against: Option<Subject>, factor: f64, at_most: bool) -> Goal {
    Goal { key, against, factor, at_most }
}

pub(crate) const GOALS: [Goal; 6] = [
    goal("cpu_us_per_request", Some(Subject::Haproxy), 0.75, true),
    goal("cpu_us_per_connection", Some(Subject::Envoy), 1.15, true),
    goal("bulk_gbit_per_second", Some(Subject::Envoy), 1.05, false),
    goal("bulk_cpu_s_per_gb", Some(Subject::Envoy), 0.85, true),
    goal("idle_mib", None, 16.0, true),
    goal("idle_2000_mib", None, 40.0, true),
];

impl Report {
    pub(crate) fn begin(built: &Built, rounds: usize) -> Self {
        Self { commit: built.commit.clone(), rounds, samples: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, subject: Subject, sample: Sample) {
        self.samples.entry(subject).or_default().push(sample);
    }

    pub(crate) fn subjects(&self) -> impl Iterator<Item = Subject> + use<'_> {
        self.samples.keys().copied()
    }

    pub(crate) fn failed(&self, subject: Subject) -> u64 {
        self.samples.get(&subject).into_iter().flatten().map(|sample| sample.failed).sum()
    }

    pub(crate) fn median(&self, subject: Subject, key: &str) -> Option<f64> {
        let metric = METRICS.iter().find(|metric| metric.key == key)?;
        let values = self.samples.get(&subject)?.iter().filter_map(|sample| (metric.of)(sample));
        median(values.collect())
    }

    /// The line under the table: where these numbers are from.
    pub(crate) fn provenance(&self) -> String {
        let Self { commit, rounds, .. } = self;
        let (cpu, cores) = (cpu_model(), cores());
        format!("{rounds} rounds, medians; commit {commit}; kernel {}; {cores} x {cpu}", kernel())
    }

    pub(crate) fn json(&self) -> Result<String> {
        let medians = |subject: Subject| -> Value {
            METRICS.iter().map(|metric| (metric.key.to_owned(), json!(self.median(subject, metric.key)))).collect()
        };
        let subjects: BTreeMap<&str, Value> = self
            .samples
            .iter()
            .map(|(subject, samples)| (subject.name(), json!({ "median": medians(*subject), "samples": samples })))
            .collect();
        Ok(serde_json::to_string_pretty(&json!({
            "commit": self.commit,
            "kernel": kernel(),
            "cpu": cpu_model(),
            "cores": cores(),
            "rounds": self.rounds,
            "subjects": subjects,
        }))? + "\n")
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("unknown processor", |(_, name)| name).to_owned()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_middle_two() {
        assert_eq!(median(vec![9.0, 1.0, 4.0]), Some(4.0));
        assert_eq!(median(vec![1.0, 9.0, 4.0, 5.0]), Some(4.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn every_goal_is_about_a_row() {
        assert!(GOALS.iter().all(|goal| METRICS.iter().any(|metric| metric.key == goal.key)));
    }
}
