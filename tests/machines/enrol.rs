//! `meshd enrol` and `unenrol` of what already runs under systemd.

use anyhow::{Result, ensure};
use meshd_tests::machine::MachineMesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Program};
use meshd_tests::wait::until;

use crate::{DEADLINE, PAYMENTS, activate, clients, ensure_answered, ensure_refused, refused};

const CHECKOUT: &str = "ns/shop/sa/checkout";

fn enrol(mesh: &MachineMesh, who: &str) -> Result<()> {
    mesh.daemon("web").run(&["enrol", who, "--as", CHECKOUT])?.expect_success("meshd enrol").map(drop)
}

fn unenrol(mesh: &MachineMesh, who: &str) -> Result<()> {
    mesh.daemon("web").run(&["unenrol", who])?.expect_success("meshd unenrol").map(drop)
}

fn came_as_checkout(mesh: &MachineMesh, connections: usize) -> Result<()> {
    let id = mesh.spiffe_id("checkout");
    let came = || clients(mesh).is_ok_and(|seen| seen.len() == connections && seen.iter().all(|client| *client == id));
    until(DEADLINE, &format!("{connections} connections of checkout's"), came)
}

#[test]
fn a_running_unit_gains_and_loses_its_identity_without_a_restart() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let web = mesh.machine("web");
    // Whoever connects to it makes it connect to payments.
    activate(web, "shopper", &["User=billing"], "127.0.0.1:7070", "payments.shop.mesh:80")?;
    let through_it = || mesh.curl("web", "stray", &["--fail", "--max-time", "5", "http://127.0.0.1:7070/"]);
    ensure_refused(&through_it()?)?;
    let process = || web.systemctl(&["show", "--property=MainPID", "--value", "shopper.service"]);
    let running = process()?;
    ensure!(running.trim() != "0", "it does not run");

    enrol(&mesh, "shopper.service")?;
    ensure_answered(&through_it()?.expect_success("the first connection after meshd enrol")?)?;
    came_as_checkout(&mesh, 1)?;
    unenrol(&mesh, "shopper.service")?;
    ensure_refused(&through_it()?)?;
    ensure!(process()? == running, "it was restarted");
    Ok(())
}

/// A container on the host's network is a scope, named by its container manager anew at each start.
#[test]
fn containers_on_the_hosts_network_are_enrolled_by_the_pattern_of_their_scopes() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let web = mesh.machine("web");
    let persistent = ["--retry", "60", "--retry-delay", "1", "--retry-all-errors"];
    let running = web.spawn(&in_scope("docker-abc123.scope", &persistent))?;
    until(DEADLINE, "it refused", || refused(&mesh, "web", "unenrolled").is_ok_and(|count| count >= 1.0))?;

    enrol(&mesh, "docker-*.scope")?;
    ensure_answered(&running.finish(DEADLINE)?.expect_success("the container that ran already")?)?;
    let once = |scope: &str| -> Result<Finished> { web.run(&in_scope(scope, &[])) };
    ensure_answered(&once("docker-def456.scope")?.expect_success("a container started later")?)?;
    ensure_refused(&once("podman-abc123.scope")?)?;
    came_as_checkout(&mesh, 2)?;
    unenrol(&mesh, "docker-*.scope")?;
    ensure_refused(&once("docker-def456.scope")?)
}

fn in_scope(scope: &str, options: &[&str]) -> Program {
    let run = ["--scope", "--quiet", "--unit", scope, "curl", "--silent", "--show-error", "--fail", "--max-time", "30"];
    Program::new("systemd-run").args(run).args(options).arg(PAYMENTS)
}
