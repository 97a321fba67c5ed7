//! The alert rules we ship, judged by promtool on what a PKI in trouble really exports.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_pki::federation::commands::{Asked, Endpoint, add};
use meshd_pki::federation::web::WebCertificate;
use meshd_pki_api::v1;
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};

use crate::operation::{DAY, Desk, HOUR};
use crate::support::{Lab, eventually, workload};

/// Rules are evaluated this often, in seconds: as often as samples come.
const STEP: u64 = 300;
/// Where months have to pass.
const LONG_STEP: u64 = 6 * HOUR;

fn rules() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/prometheus/meshd-pki.rules.yaml"))
}

/// promtool counts time from 1970 on, so the PKI of these tests begins there.
fn desk() -> Desk {
    Desk::starting(SystemTime::UNIX_EPOCH + Duration::from_secs(3 * DAY))
}

/// What was scraped, and until when it stayed so (seconds since 1970).
struct History {
    scrapes: Vec<(u64, String)>,
    step: u64,
}

impl History {
    fn of(desk: &Desk) -> History {
        let mut history = History { scrapes: Vec::new(), step: STEP };
        history.scrape(desk, 0);
        history
    }

    /// The desk's metrics, seen from the last scrape until now and `seconds` more.
    fn scrape(&mut self, desk: &Desk, seconds: u64) {
        let now = desk.now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        self.scrapes.push((now + seconds, desk.metrics()));
    }

    fn end(&self) -> u64 {
        self.scrapes.last().unwrap().0 / self.step * self.step
    }

    /// Each series with its values in promtool's notation.
    fn series(&self) -> Vec<Value> {
        let mut series: BTreeMap<&str, String> = BTreeMap::new();
        let mut steps = 0;
        for (until, text) in &self.scrapes {
            let count = (until / self.step + 1).saturating_sub(steps);
            if count == 0 {
                continue;
            }
            let samples: Vec<(&str, &str)> =
                text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' ')).collect();
            for (name, _) in &samples {
                series.entry(name).or_insert_with(|| if steps > 0 { format!("_x{steps}") } else { String::new() });
            }
            for (name, values) in &mut series {
                let value = samples.iter().find(|(known, _)| known == name);
                let more = count - 1;
                // Writing to a string cannot fail.
                _ = match value {
                    Some((_, value)) => write!(values, " {value}+0x{more}"),
                    None => write!(values, " _x{count}"),
                };
            }
            steps += count;
        }
        series.into_iter().map(|(name, values)| json!({"series": name, "values": values.trim_start()})).collect()
    }

    /// Whether promtool finds so many alerts of this name firing at the end.
    fn check(&self, expression: &str, expected: u64) {
        let test = json!({
            "rule_files": [rules()],
            "evaluation_interval": format!("{}s", self.step),
            "tests": [{
                "interval": format!("{}s", self.step),
                "input_series": self.series(),
                "promql_expr_test": [{
                    "expr": expression,
                    "eval_time": format!("{}s", self.end()),
                    "exp_samples": [{"labels": "{}", "value": expected}],
                }],
            }],
        });
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("test.yaml");
        std::fs::write(&file, serde_json::to_vec(&test).unwrap()).unwrap();
        let output = promtool(&["test", "rules", file.to_str().unwrap()]);
        assert!(output.0, "{expression}: {}\n{}", output.1, self.scrapes.last().unwrap().1);
    }

    fn fires(&self, alert: &str) {
        self.check(&format!("count(ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}}) > bool 0"), 1);
    }

    fn is_quiet(&self) {
        self.check("count(ALERTS) or vector(0)", 0);
    }
}

fn promtool(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("promtool").args(arguments).output();
    let output = output.expect("the promtool program is installed (Debian package prometheus)");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn the_rules_are_well_formed_and_each_is_shown_to_fire_here() {
    let (fine, text) = promtool(&["check", "rules", rules().to_str().unwrap()]);
    assert!(fine, "{text}");
    let rules = std::fs::read_to_string(rules()).unwrap();
    let tests = include_str!("alerts.rs");
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tests.contains(&format!("fires(\"{alert}\")")), "{alert} has no test");
    }
}

#[test]
fn a_healthy_pki_alarms_nobody() {
    let desk = desk();
    let chain = desk.enrol("web");
    desk.pass(600);
    ahead(&desk, &chain, 0);
    desk.pass(60);
    let mut history = History::of(&desk);
    history.scrape(&desk, 300);
    history.is_quiet();
}

#[test]
fn a_pki_that_is_gone_or_hangs_is_noticed() {
    let nothing = History { scrapes: vec![(HOUR, String::new())], step: STEP };
    nothing.fires("MeshdPkiDown");
    let desk = desk();
    let mut hanging = History::of(&desk);
    hanging.scrape(&desk, HOUR);
    hanging.fires("MeshdPkiStuck");
}

#[test]
fn a_clock_that_is_not_believed_blocks_the_rotation_and_says_so() {
    let desk = desk();
    for number in 0..5 {
        let name = format!("web-{number}");
        let chain = desk.enrol(&name);
        ahead(&desk, &chain, 3600);
    }
    desk.pass(60);
    let mut history = History::of(&desk);
    history.scrape(&desk, 2 * HOUR);
    history.fires("MeshdPkiClockDistrusted");
    history.fires("MeshdPkiRotationBlocked");
}

#[test]
fn every_end_that_comes_near_is_told_in_time() {
    // A PKI whose maintenance stopped: time goes on, what it exports stays.
    let desk = desk();
    desk.enrol("web");
    desk.pass(60);
    let mut history = History { step: LONG_STEP, ..History::of(&desk) };
    history.scrape(&desk, 24 * HOUR);
    history.fires("MeshdPkiEndpointEnding");
    history.scrape(&desk, 8 * DAY);
    history.fires("MeshdPkiIntermediateEnding");
    history.scrape(&desk, 53 * DAY);
    history.fires("MeshdPkiRotationOverdue");
    history.scrape(&desk, 310 * DAY);
    history.fires("MeshdPkiRootEnding");
}

#[test]
fn hosts_that_do_not_renew_are_counted_and_only_the_worst_are_named() {
    let desk = desk();
    for number in 0..30 {
        desk.enrol(&format!("web-{number:02}"));
        desk.pass(60);
    }
    desk.pass(13 * HOUR);
    assert!(desk.metrics().contains("meshd_pki_hosts_overdue 30"), "{}", desk.metrics());
    let named = desk.metrics().lines().filter(|line| line.starts_with("meshd_pki_host_not_after_seconds{")).count();
    assert_eq!(named, 10);
    assert!(desk.metrics().contains("meshd_pki_host_not_after_seconds{host=\"web-00\"}"), "the first to end is named");
    let mut history = History::of(&desk);
    history.scrape(&desk, HOUR);
    history.fires("MeshdPkiHostsOverdue");
    desk.pass(12 * HOUR);
    let mut history = History::of(&desk);
    history.scrape(&desk, HOUR);
    history.fires("MeshdPkiHostCertificateEnded");
    let status = desk.status();
    assert!(status.problems.iter().any(|problem| problem.contains("30 hosts") && problem.contains("web-00")));
}

/// The host reports with a clock that is so many seconds ahead.
fn ahead(desk: &Desk, chain: &[Vec<u8>], seconds: u64) {
    let time = desk.now() + Duration::from_secs(seconds);
    let host_time_unix_ms = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64;
    let request = v1::IssueBatchRequest { host_time_unix_ms, ..v1::IssueBatchRequest::default() };
    desk.pki().issue_batch(Some(&chain[0]), &request, "test").unwrap();
}

#[test]
fn a_host_with_a_wrong_clock_is_named() {
    let desk = desk();
    let chain = desk.enrol("web");
    ahead(&desk, &chain, 120);
    desk.pass(60);
    let mut history = History::of(&desk);
    history.scrape(&desk, HOUR);
    history.fires("MeshdPkiHostClock");
    assert!(desk.status().advice.iter().any(|line| line.contains("web +120 s")), "{:?}", desk.status().advice);
}

#[test]
fn a_cloned_host_is_an_alarm_until_it_enrols_anew() {
    let mut desk = desk();
    let chain = desk.enrol("web");
    for instance in ["a", "b", "a"] {
        let report = v1::SyncRequest { instance: instance.to_owned(), ..v1::SyncRequest::default() };
        desk.pki().sync_report(Some(&chain[0]), &report, "10.0.0.9:1").unwrap();
    }
    desk.open();
    History::of(&desk).fires("MeshdPkiClonedHost");
    assert!(desk.status().problems.iter().any(|line| line.contains("10.0.0.9")), "{:?}", desk.status().problems);
    desk.pass(1);
    desk.enrol("web");
    assert!(desk.status().clone_alarms.is_empty());
}

#[test]
fn a_certificate_of_the_web_that_nobody_renews_is_told_a_week_ahead() {
    let desk = desk();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["bundles.example.org".to_owned()]).unwrap();
    params.not_after = (desk.now() + Duration::from_secs(8 * DAY)).into();
    let files = ["web.pem", "web.key"].map(|name| desk.dir().join(name));
    std::fs::write(&files[0], params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(&files[1], key.serialize_pem()).unwrap();
    let [chain, key] = files;
    desk.pki().set_web_certificate(Arc::new(WebCertificate::load(chain.clone(), key).unwrap()));
    desk.pass(60);
    let mut history = History::of(&desk);
    history.is_quiet();
    std::fs::write(&chain, "nonsense").unwrap();
    desk.pki().reload_web_certificate();
    history.scrape(&desk, HOUR);
    history.fires("MeshdPkiWebCertificateRefused");
    desk.pass(25 * HOUR);
    history.scrape(&desk, 2 * HOUR);
    history.fires("MeshdPkiWebCertificateEnding");
}

#[test]
fn a_federated_domain_that_cannot_be_asked_is_told() {
    let desk = desk();
    let (url, identities) = ("https://bundles.other.example/", ["*".to_owned()]);
    let endpoint = Endpoint::Web { authorities: None };
    let trust_domain = "other.example".parse().unwrap();
    let asked = Asked { trust_domain, url, endpoint, identities: &identities, bundle: None };
    add(desk.dir(), &asked, desk.now()).unwrap();
    desk.pass(60);
    let mut history = History::of(&desk);
    history.scrape(&desk, HOUR);
    history.fires("MeshdPkiFederationStale");
}

#[test]
fn an_audit_log_that_cannot_be_written_is_told() {
    let desk = desk();
    let chain = desk.enrol("web");
    let mut history = History::of(&desk);
    let log = desk.dir().join("audit.jsonl");
    std::fs::remove_file(&log).unwrap();
    std::fs::create_dir(&log).unwrap();
    desk.renew("web", Some(&chain[0])).unwrap();
    desk.pass(300);
    history.scrape(&desk, 600);
    history.fires("MeshdPkiAuditFailing");
}

#[test]
fn a_database_that_takes_nothing_is_told() {
    let desk = desk();
    let chain = desk.enrol("web");
    let mut history = History::of(&desk);
    let database = rusqlite::Connection::open(desk.dir().join("pki.db")).unwrap();
    let full = "CREATE TRIGGER full BEFORE INSERT ON record BEGIN SELECT RAISE(FAIL, 'disk full'); END";
    database.execute(full, []).unwrap();
    desk.renew("web", Some(&chain[0])).unwrap();
    history.scrape(&desk, 600);
    history.fires("MeshdPkiRecordsFailing");
}

#[test]
fn identities_that_are_refused_are_told() {
    let desk = desk();
    let chain = desk.enrol("web");
    let mut history = History::of(&desk);
    desk.renew("db", Some(&chain[0])).unwrap();
    history.scrape(&desk, 2400);
    history.fires("MeshdPkiRenewalsRefused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_gone_is_told() {
    let lab = Lab::start().await;
    lab.join("web", &[]).await.unwrap();
    let host = lab.host("web");
    let before = lab.pki().metrics.encode();
    let database = rusqlite::Connection::open(lab.state().join("pki.db")).unwrap();
    database.execute("DROP TABLE record", []).unwrap();
    host.want(&[&workload("checkout")]);
    let counted = |series: &str| {
        let page = lab.pki().metrics.encode();
        page.lines().any(|line| line.strip_prefix(series).is_some_and(|count| count != " 0"))
    };
    eventually("failed maintenance", || counted("meshd_pki_maintenance_failures_total")).await;
    let refused = "meshd_pki_requests_total{method=\"issue_batch\",result=\"unavailable\"}";
    eventually("a request that failed", || counted(refused)).await;
    // promtool sees no increase in a series that is new; what is scraped before shows it as zero.
    let before = format!("{before}{refused} 0\n");
    let scrapes = vec![(HOUR, before), (HOUR + 600, lab.pki().metrics.encode())];
    let history = History { scrapes, step: STEP };
    history.fires("MeshdPkiMaintenanceFailing");
    history.fires("MeshdPkiUnavailable");
}
