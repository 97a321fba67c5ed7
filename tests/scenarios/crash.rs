//! A meshd that is killed.

use anyhow::{Result, ensure};
use meshd_tests::host::Host;
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use std::sync::Arc;

use crate::ask;

/// curl: could not connect.
const NOT_CONNECTED: Option<i32> = Some(7);

#[test]
fn a_killed_server_side_loses_only_requests_in_flight() -> Result<()> {
    let mesh = Mesh::start(Plan::shop())?;
    let load = Load::start(&mesh, 8)?;
    load.reaches("api-1", 100)?;
    mesh.daemon("api-1").kill()?;
    load.reaches("api-2", 200)?;
    let report = load.end()?;
    ensure!(report.failed <= 8, "more than were in flight: {report:?}");
    Ok(())
}

#[test]
fn a_killed_client_side_leaves_the_hosts_own_traffic_alone_and_refuses_the_mesh_at_once() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let server = mesh.host("api-1");
    let listen = "0.0.0.0:9090";
    let _plain = server.start_testkit(&server.testkit(&["echo-http", "--listen", listen]).unit("plain.service"))?;
    let raw = format!("http://{}:9090/", server.address());
    let virtual_url = format!("http://{}/", mesh.virtual_address("web", "payments.shop.mesh")?);
    let ask_raw =
        || mesh.curl("web", "checkout", &["--fail", "--max-time", "5", &raw])?.expect_success("a raw address");
    ask_raw()?;
    ask(&mesh)?;

    mesh.daemon("web").kill()?;
    ask_raw()?;
    let answer = mesh.curl("web", "checkout", &["--max-time", "5", &virtual_url])?;
    ensure!(answer.exit_code() == NOT_CONNECTED, "not refused at once: {answer:?}");

    mesh.daemon("web").start()?;
    ask(&mesh)?;
    ask_raw()?;
    Ok(())
}

#[test]
fn revert_leaves_no_rule_behind_after_a_kill() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    let before = kernel_state(&mesh.host("api-1"))?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    ask(&mesh)?;
    ensure!(kernel_state(&mesh.host("api-1"))? != before, "nothing was captured, so nothing is shown");
    mesh.daemon("api-1").kill()?;
    mesh.daemon("api-1").run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    let after = kernel_state(&mesh.host("api-1"))?;
    ensure!(after == before, "left behind:\n{after}\nbefore it was:\n{before}");
    Ok(())
}

#[test]
fn a_stopped_meshd_leaves_no_other_rules_than_a_killed_one() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let daemon = mesh.daemon("web");
    daemon.stop()?;
    daemon.run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    let rules = mesh.host("web").netfilter()?;
    ensure!(rules.is_empty(), "left behind:\n{rules}");
    daemon.start()?;
    ask(&mesh)?;
    Ok(())
}

/// All that capture may change; link-local addresses come by themselves, and late.
pub(crate) fn kernel_state(host: &Host) -> Result<String> {
    let mut state = host.netfilter()?;
    for family in ["-4", "-6"] {
        state += &host.command("ip", &[family, "rule", "show"])?;
        state += &host.command("ip", &[family, "route", "show", "table", "all"])?;
    }
    state += &host.command("ip", &["-o", "link", "show"])?;
    Ok(state.lines().filter(|line| !line.contains("fe80::")).collect::<Vec<_>>().join("\n"))
}
