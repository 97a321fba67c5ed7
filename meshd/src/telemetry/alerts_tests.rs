//! The alert rules we ship for hosts, judged by promtool on what meshd exports.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use meshd_discovery::SourceHealth;
use meshd_identity::SpiffeId;
use serde_json::{Value, json};

use super::{AccessLog, Exposition, Telemetry, encode};
use crate::admin::sources;

/// Rules are evaluated this often, in seconds.
const STEP: u64 = 60;
const END: u64 = 3600;
/// How long what comes second has been so by then.
const SECOND: u64 = 600;

fn rules() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/prometheus/meshd.rules.yaml"))
}

fn promtool(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("promtool").args(arguments).output();
    let output = output.expect("the promtool program is installed (Debian package prometheus)");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// A host whose certificate ends so many seconds after the end of the test.
fn page(telemetry: &Arc<Telemetry>, left: u64) -> String {
    page_with(telemetry, left, &source())
}

fn page_with(telemetry: &Arc<Telemetry>, left: u64, source: &SourceHealth) -> String {
    let series = vec![(vec![("id", "spiffe://mesh.example/ns/shop/sa/web".into())], (END + left) as f64)];
    let ends = Exposition::gauge("identity_cert_expiration_timestamp_seconds", "End", series);
    let sources = sources::metrics(std::slice::from_ref(source));
    encode(telemetry, std::iter::once(ends).chain(sources).collect()).unwrap()
}

/// Heard of and read just now.
fn source() -> SourceHealth {
    let now = Some(SystemTime::now());
    SourceHealth {
        name: "etcd".into(),
        kind: "etcd",
        services: 50,
        endpoints: 500,
        resources: 0,
        refused_resources: 0,
        stale: 0,
        from_disk: false,
        shadowed: vec![],
        last_change: now,
        last_ok: now,
        last_listed: now,
        suspected: 0,
        errors: vec![],
        has_answered: true,
    }
}

/// The values of one page, then those of another.
fn series(before: &str, after: &str) -> Vec<Value> {
    let samples = |page: &str| -> Vec<(String, String)> {
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        lines
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    };
    let (before, first_steps, steps) = (samples(before), (END - SECOND) / STEP, SECOND / STEP);
    let row = |(name, value): (String, String)| {
        let first = before.iter().find(|(known, _)| *known == name).map_or("_", |(_, value)| value);
        let first = match first {
            "_" => format!("_x{first_steps}"),
            first => format!("{first}+0x{}", first_steps - 1),
        };
        json!({"series": name, "values": format!("{first} {value}+0x{steps}")})
    };
    samples(after).into_iter().map(row).collect()
}

/// How many alerts of the name (or of any) are there at the end.
fn count(before: &str, after: &str, alert: &str, expected: u64) {
    let test = json!({
        "rule_files": [rules()],
        "evaluation_interval": format!("{STEP}s"),
        "tests": [{
            "interval": format!("{STEP}s"),
            "input_series": series(before, after),
            "promql_expr_test": [{
                "expr": format!("count(ALERTS{{alertname=~\"{alert}\",alertstate=\"firing\"}}) or vector(0)"),
                "eval_time": format!("{END}s"),
                "exp_samples": [{"labels": "{}", "value": expected}],
            }],
        }],
    });
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    std::fs::write(file.path(), serde_json::to_vec(&test).unwrap()).unwrap();
    let (fine, text) = promtool(&["test", "rules", file.path().to_str().unwrap()]);
    assert!(fine, "{alert}: {text}\n{after}");
}

fn healthy() -> Arc<Telemetry> {
    let telemetry = Telemetry::new(1, AccessLog::off());
    telemetry.tasks.started("renewal");
    telemetry.self_handshakes.note(&id(), Ok(()));
    telemetry
}

fn id() -> SpiffeId {
    "spiffe://mesh.example/ns/shop/sa/web".parse().unwrap()
}

#[test]
fn the_rules_are_well_formed_and_a_healthy_host_alarms_nobody() {
    let (fine, text) = promtool(&["check", "rules", rules().to_str().unwrap()]);
    assert!(fine, "{text}");
    let page = page(&healthy(), 13 * 3600);
    count(&page, &page, ".*", 0);
}

#[test]
fn a_task_that_ends_is_told_and_one_that_stays_down_more_loudly() {
    let telemetry = healthy();
    let before = page(&telemetry, 13 * 3600);
    telemetry.tasks.ended("renewal", "it panicked: no more");
    count(&before, &page(&telemetry, 13 * 3600), "MeshdTaskDown", 1);
    telemetry.tasks.started("renewal");
    let back = page(&telemetry, 13 * 3600);
    count(&before, &back, "MeshdTaskFailing", 1);
    count(&before, &back, "MeshdTaskDown", 0);
}

#[test]
fn a_certificate_that_is_not_renewed_is_told_six_hours_ahead() {
    let telemetry = healthy();
    let page = page(&telemetry, 5 * 3600);
    count(&page, &page, "MeshdCertificateEnding", 1);
}

#[test]
fn a_host_that_would_not_believe_itself_is_told() {
    let telemetry = healthy();
    let before = page(&telemetry, 13 * 3600);
    telemetry.self_handshakes.note(&id(), Err("expired".to_owned()));
    count(&before, &page(&telemetry, 13 * 3600), "MeshdBelievesNotItself", 1);
}

/// What a host alarms with whose source was well until it was as this makes it.
fn count_with(change: impl FnOnce(&mut SourceHealth), alert: &str) {
    let (telemetry, mut now) = (healthy(), source());
    let before = page(&telemetry, 13 * 3600);
    change(&mut now);
    let after = page_with(&telemetry, 13 * 3600, &now);
    count(&before, &after, alert, 1);
    count(&before, &after, "MeshdSource.*", 1);
}

#[test]
fn a_source_that_was_not_heard_of_is_told_also_if_it_never_was() {
    count_with(|source| source.last_ok = None, "MeshdSourceStale");
    // By the clock of promtool, which begins in 1970.
    let heard = UNIX_EPOCH + Duration::from_secs(END - 2 * SECOND);
    count_with(|source| source.last_ok = Some(heard), "MeshdSourceStale");
}

#[test]
fn a_source_of_which_something_cannot_be_read_is_told() {
    count_with(|source| source.last_listed = Some(SystemTime::now() - Duration::from_secs(2000)), "MeshdSourceListOld");
}

#[test]
fn losses_that_nobody_believes_are_told_when_they_last() {
    let (telemetry, lost) = (healthy(), SourceHealth { stale: 7, ..source() });
    let page = page_with(&telemetry, 13 * 3600, &lost);
    count(&page, &page, "MeshdSourceDoubted", 1);
    // A source that settles it within the minute alarms nobody.
    count(&self::page(&telemetry, 13 * 3600), &page, "MeshdSourceDoubted", 0);
}
