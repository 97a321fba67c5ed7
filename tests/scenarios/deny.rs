//! Who is denied is cut off within seconds, everywhere, and nobody else notices.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Program;
use meshd_tests::wait::until;

use crate::{PAYMENTS, ask, ensure_refused, refused};

/// From the operator's word to the last cut connection.
const PROMISED: Duration = Duration::from_secs(5);

fn cut(mesh: &Mesh, host: &str, direction: &str) -> f64 {
    let metrics = mesh.daemon(host).metrics();
    metrics.map_or(0.0, |metrics| metrics.sum("meshd_connections_cut_total", &[("direction", direction)]))
}

fn open_to_payments(mesh: &Mesh, host: &str) -> Result<f64> {
    Ok(mesh.daemon(host).metrics()?.sum("tcp_open_connections", &[("peer", "src"), ("srv_name", "payments")]))
}

#[test]
fn a_denied_caller_is_cut_off_within_five_seconds_and_others_lose_no_request() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let idle = ["idle", "--target", "payments.shop.mesh:80", "--connections", "3"];
    let _held = mesh.host("web").start_testkit(&mesh.testkit("web", "billing", &idle))?;
    ensure!((open_to_payments(&mesh, "api-1")? - 3.0).abs() < 0.5, "billing holds no three connections");
    let load = Load::start(&mesh, 4)?;
    load.reaches("api-1", 100)?;

    let billing = mesh.spiffe_id("billing");
    mesh.deny(&["--identity", &billing])?;
    until(PROMISED, "billing cut off", || cut(&mesh, "api-1", "inbound") >= 1.0)
        .with_context(|| mesh.daemon("api-1").log())?;
    ensure_refused(&mesh.curl("web", "billing", &["--max-time", "5", PAYMENTS])?)?;
    let counted = || refused(&mesh, "api-1", "banned").is_ok_and(|count| count >= 1.0);
    until(PROMISED, "the refused handshake counted", counted)?;
    load.reaches("api-1", 100)?;
    let report = load.end()?;
    ensure!(report.failed == 0 && report.ok > 200, "{report:?}");

    mesh.daemon("api-1").stop()?;
    let events = mesh.daemon("api-1").access_log();
    let of_billing = events.iter().filter(|event| event.client_id.as_deref() == Some(&billing));
    let outcomes: Vec<&str> = of_billing.map(|event| event.outcome.as_str()).collect();
    ensure!(outcomes == ["banned"; 3], "billing's connections ended as {outcomes:?}");
    Ok(())
}

#[test]
fn connections_to_a_denied_server_are_cut_and_the_others_serve() -> Result<()> {
    let mesh = Mesh::start(Plan::shop())?;
    let idle = ["idle", "--target", "payments.shop.mesh:80", "--connections", "16"];
    let mut held = mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &idle))?;
    let there = open_to_payments(&mesh, "api-2")?;
    ensure!(there >= 1.0, "nothing is held open to api-2");
    let all = open_to_payments(&mesh, "web")?;

    let status = mesh.daemon("api-2").json("status")?;
    let identities = status["identities"].as_array().context("no identities")?;
    let payments = identities.iter().find(|one| one["id"] == mesh.spiffe_id("payments").as_str());
    let serial = payments.and_then(|one| one["serial"].as_str()).context("no serial")?;
    mesh.deny(&["--serial", serial])?;
    until(PROMISED, "the connections to api-2 cut", || cut(&mesh, "web", "outbound") >= 1.0)
        .with_context(|| mesh.daemon("web").log())?;
    let left = || open_to_payments(&mesh, "web").is_ok_and(|open| (open - (all - there)).abs() < 0.5);
    until(PROMISED, "those to api-1 left alone", left)?;
    for _ in 0..10 {
        let body = ask(&mesh)?;
        ensure!(body.starts_with("payments on api-1"), "a denied server answered: {body}");
    }
    held.stop()?;
    mesh.daemon("web").stop()?;
    let events = mesh.daemon("web").access_log();
    let banned = events.iter().filter(|event| event.outcome == "banned").count();
    ensure!((banned as f64 - there).abs() < 0.5, "{banned} of {there} connections ended as banned");
    Ok(())
}

#[test]
fn a_host_that_restarts_while_the_pki_is_away_still_denies() -> Result<()> {
    let mut mesh = Mesh::start(Plan::shop_with_one_server())?;
    mesh.deny(&["--identity", &mesh.spiffe_id("billing")])?;
    let denied = || mesh.curl("web", "billing", &["--max-time", "5", PAYMENTS]).is_ok_and(|answer| !answer.success());
    until(PROMISED, "billing refused", denied)?;
    mesh.stop_pki()?;
    mesh.daemon("api-1").restart()?;
    ensure_refused(&mesh.curl("web", "billing", &["--max-time", "5", PAYMENTS])?)?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn a_banned_host_gives_up_its_identities_until_the_ban_is_lifted() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    ask(&mesh)?;
    let is_banned = |expected: f64| {
        let metrics = mesh.daemon("web").metrics();
        metrics.is_ok_and(|metrics| metrics.sum("meshd_banned", &[]) == expected)
    };
    mesh.pki(&["host", "ban", "web"])?;
    until(PROMISED, "web to hear of it", || is_banned(1.0))?;
    ensure_refused(&mesh.curl("web", "checkout", &["--max-time", "5", PAYMENTS])?)?;
    let status = mesh.daemon("web").run(&["status"])?.expect_success("meshd status")?;
    for part in ["host `web` is banned", "meshd-pki host unban web", "withheld: claimed here"] {
        ensure!(status.contains(part), "no `{part}`: {status}");
    }
    let identities = mesh.daemon("web").json("status")?["identities"].as_array().map(Vec::len);
    ensure!(identities == Some(1), "it holds {identities:?} besides its own");
    let client = Program::new(mesh.host("web").binary("workload-client"));
    let client = client.arg("--socket").arg(mesh.daemon("web").api_socket()).args(["call", "fetch-jwt-svid"]);
    let answer = mesh.host("web").run(&mesh.in_unit("web", "checkout", client))?.stdout;
    ensure!(answer == "PermissionDenied: no identity issued\n", "{answer}");

    mesh.pki(&["host", "unban", "web"])?;
    until(Duration::from_secs(60), "web to be let in again", || is_banned(0.0) && ask(&mesh).is_ok())
}

#[test]
fn what_a_tainted_intermediate_signed_is_replaced_under_load_and_no_request_fails() -> Result<()> {
    let mesh = Mesh::start(Plan { leaf_ttl: Some("60"), ..Plan::shop_with_one_server() })?;
    let load = Load::start(&mesh, 4)?;
    load.reaches("api-1", 50)?;
    let list: serde_json::Value = serde_json::from_str(&mesh.pki(&["authority", "list", "-o", "json"])?)?;
    let authorities = list["authorities"].as_array().cloned().unwrap_or_default();
    let intermediate = authorities.iter().find(|one| one["kind"] == "intermediate");
    let id = intermediate.and_then(|one| one["id"].as_str()).unwrap_or_default().to_owned();
    let serials = |host: &str| -> Result<Vec<String>> {
        let status = mesh.daemon(host).json("status")?;
        let held = status["identities"].as_array().cloned().unwrap_or_default();
        Ok(held.iter().map(|one| one["serial"].as_str().unwrap_or_default().to_owned()).collect())
    };
    let before = [serials("web")?, serials("api-1")?].concat();
    mesh.pki(&["authority", "taint", &id])?;
    // A quarter of what is left of them, at most.
    until(Duration::from_secs(30), "new certificates everywhere", || {
        let now = serials("web").and_then(|web| Ok([web, serials("api-1")?].concat()));
        now.is_ok_and(|now| now.len() == before.len() && now.iter().all(|serial| !before.contains(serial)))
    })?;
    load.reaches("api-1", 50)?;
    let report = load.end()?;
    ensure!(report.failed == 0 && report.ok > 100, "{report:?}");
    Ok(())
}
