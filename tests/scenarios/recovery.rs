//! The PKI is lost, with everything in it. Hosts come back to another by themselves, and traffic does not notice.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{Plan, TRUST_DOMAIN};
use meshd_tests::process::Program;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask};

/// Certificates live 2 min here, and are renewed before 54 s.
const LEAF: &str = "120";
const RENEWED: Duration = Duration::from_secs(90);

/// A file as an operator carries it from one machine to another.
fn carry(from: &Path, to: PathBuf) -> Result<PathBuf> {
    fs::copy(from, &to).with_context(|| from.display().to_string())?;
    fs::set_permissions(&to, fs::Permissions::from_mode(0o644))?;
    Ok(to)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// Where the recovery key is, which is not on the PKI.
fn offline(mesh: &Mesh, args: &[&str]) -> Result<String> {
    let program = Program::new(mesh.pki_host().binary("meshd-pki")).args(args);
    mesh.pki_host().run(&program)?.expect_success("signing offline")
}

/// Certificates that this PKI has given a host.
fn given(mesh: &Mesh, host: &str) -> Result<u64> {
    let hosts: serde_json::Value = serde_json::from_str(&mesh.pki(&["host", "list", "-o", "json"])?)?;
    let hosts = hosts["hosts"].as_array().context("no hosts")?;
    let host = hosts.iter().find(|one| one["id"] == host).with_context(|| format!("no {host}"))?;
    host["valid_certificates"].as_u64().context("no count")
}

fn serial(mesh: &Mesh, host: &str, identity: &str) -> Result<String> {
    let status = mesh.daemon(host).json("status")?;
    let identities = status["identities"].as_array().context("no identities")?;
    let one = identities.iter().find(|one| one["id"] == mesh.spiffe_id(identity).as_str());
    Ok(one.and_then(|one| one["serial"].as_str()).context("no serial")?.to_owned())
}

#[test]
fn hosts_of_a_lost_pki_come_back_to_the_one_in_its_place_and_no_request_fails() -> Result<()> {
    let mut mesh = Mesh::start(Plan { leaf_ttl: Some(LEAF), ..Plan::shop_with_one_server() })?;
    let state = mesh.pki_directory().join("state");
    let list = state.join("hosts.json");
    let listed = || fs::read_to_string(&list).is_ok_and(|text| text.contains("api-1") && text.contains("web"));
    until(DEADLINE, "both hosts in the list that the PKI keeps", listed)?;
    let list = carry(&list, mesh.pki_directory().join("kept.json"))?;
    let key = carry(&state.join("recovery.key"), mesh.pki_directory().join("offline.key"))?;
    let pids = ["web", "api-1"].map(|host| mesh.daemon(host).pid());
    let args = ["load", "--target", "payments.shop.mesh:80", "--per-request", "--connections", "4"];
    let mut load = mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &args))?;

    mesh.stop_pki()?;
    fs::remove_dir_all(&state)?;
    mesh.pki(&["init", "--trust-domain", TRUST_DOMAIN])?;
    mesh.pki(&["recovery", "adopt", text(&list)?])?;
    let request = mesh.pki_directory().join("request.json");
    fs::write(&request, mesh.pki(&["recovery", "request"])?)?;
    let signed = offline(&mesh, &["recovery", "sign-bundle", "--key", text(&key)?, "--request", text(&request)?])?;
    let said = mesh.pki_directory().join("said.json");
    fs::write(&said, signed)?;
    mesh.pki(&["recovery", "import", text(&said)?])?;
    mesh.start_pki()?;

    let before = [("web", "checkout"), ("api-1", "payments")].map(|(host, id)| serial(&mesh, host, id));
    let [checkout, payments] = before;
    let (checkout, payments) = (checkout?, payments?);
    let all_given = || ["web", "api-1"].iter().all(|host| given(&mesh, host).is_ok_and(|count| count >= 2));
    until(RENEWED, "certificates of the new PKI on every host", all_given).with_context(|| mesh.daemon("web").log())?;
    let replaced = |host, id, old: &str| serial(&mesh, host, id).is_ok_and(|serial| serial != old);
    until(RENEWED, "both sides showing others", || {
        replaced("web", "checkout", &checkout) && replaced("api-1", "payments", &payments)
    })?;
    ask(&mesh)?;

    load.stop()?;
    let report: LoadReport = report(&load.finish(DEADLINE)?)?;
    ensure!(report.failed == 0 && report.ok > 500, "{report:?}");
    for (host, pid) in ["web", "api-1"].into_iter().zip(pids) {
        ensure!(mesh.daemon(host).pid()? == pid?, "{host} was started again");
    }
    let log = fs::read_to_string(state.join("audit.jsonl"))?;
    ensure!(log.contains("\"event\":\"host_adopt\""), "{log}");
    ensure!(!log.contains("\"event\":\"enrol\""), "somebody needed a token: {log}");
    Ok(())
}
