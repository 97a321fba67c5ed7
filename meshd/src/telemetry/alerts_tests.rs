//! The alert rules we ship for hosts, judged by promtool on what meshd exports.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use meshd_identity::SpiffeId;
use serde_json::{Value, json};

use super::{AccessLog, Exposition, Telemetry, encode};

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
    let series = vec![(vec![("id", "spiffe://mesh.example/ns/shop/sa/web".into())], (END + left) as f64)];
    let ends = Exposition::gauge("identity_cert_expiration_timestamp_seconds", "End", series);
    encode(telemetry, vec![ends]).unwrap()
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
