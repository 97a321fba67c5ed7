//! Whose connection it is, when systemd makes the users and the cgroups.

use anyhow::{Context, Result, ensure};
use meshd_tests::machine::{Machine, MachineMesh, units};
use meshd_tests::plan::Plan;
use meshd_tests::wait::{until, until_some};

use crate::{DEADLINE, PAYMENTS, activate, ask, clients, ensure_answered, ensure_refused, refused};

/// Asks payments, shows the answer in its journal, and stays.
const ASKS_AND_STAYS: &str =
    "/bin/sh -c 'curl --silent --show-error --max-time 20 http://payments.shop.mesh/; exec sleep infinity'";

#[test]
fn every_enrolled_unit_has_its_identity_beside_units_that_have_none() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    for unit in ["checkout", "billing"] {
        ask(&mesh, unit)?;
    }
    ensure_refused(&mesh.curl("web", "stray", &[PAYMENTS])?)?;
    until(DEADLINE, "the refusal counted", || refused(&mesh, "web", "unenrolled").is_ok_and(|count| count >= 1.0))?;
    arrived_as(&mesh, &["checkout", "billing"])
}

#[test]
fn a_restarted_unit_has_its_identity_from_its_first_connection() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let web = mesh.machine("web");
    web.install_unit("checkout.service", &units::service(ASKS_AND_STAYS, &["User=checkout"]))?;
    let mut cgroups = Vec::new();
    for answers in 1..=3 {
        web.systemctl(&["restart", "checkout.service"])?;
        cgroups.push(web.command("stat", &["--format=%i", "/sys/fs/cgroup/system.slice/checkout.service"])?);
        wait_for_answers(web, "checkout.service", answers)?;
    }
    cgroups.sort_unstable();
    cgroups.dedup();
    ensure!(cgroups.len() == 3, "the same cgroup again, so nothing is shown: {cgroups:?}");
    arrived_as(&mesh, &["checkout", "checkout", "checkout"])?;
    ensure!(refused(&mesh, "web", "unenrolled")? < 1.0, "a connection of checkout's was refused");
    Ok(())
}

#[test]
fn a_unit_of_root_has_its_identity_and_root_elsewhere_has_none() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let web = mesh.machine("web");
    web.start_unit("checkout.service", &units::service(ASKS_AND_STAYS, &[]))?;
    wait_for_answers(web, "checkout.service", 1)?;

    let curl = format!("curl --silent --show-error --max-time 5 {PAYMENTS}");
    ensure_refused(&mesh.ssh("web", &curl)?.finish(DEADLINE)?).context("root's SSH session")?;
    let job = units::service(&format!("/usr/bin/{curl}"), &[]).replace("Type=exec", "Type=oneshot");
    web.install_unit("nightly.service", &job)?;
    let ran = web.systemctl(&["start", "nightly.service"]);
    ensure!(ran.is_err(), "root's job was answered: {}", web.journal("nightly.service")?);

    let log = || mesh.daemon("web").log();
    let named = || log().contains("nightly.service") && log().contains("session-");
    until(DEADLINE, "log lines that name the job and the session", named).with_context(log)?;
    arrived_as(&mesh, &["checkout"])
}

#[test]
fn a_unit_whose_user_is_made_when_it_starts_has_its_identity() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let (web, server) = (mesh.machine("web"), mesh.machine("api-1"));
    let payments = "/usr/bin/testkit echo-http --listen 0.0.0.0:8080 --name payments-on-api-dynamic";
    server.systemctl(&["stop", "payments.service"])?;
    // A name of its own: systemd takes one that exists for what it is.
    let dynamic = ["DynamicUser=yes", "User=made-up"];
    server.start_unit("payments.service", &units::service(payments, &dynamic))?;
    web.start_unit("checkout.service", &units::service(ASKS_AND_STAYS, &dynamic))?;
    wait_for_answers(web, "checkout.service", 1)?;
    let user = web.command("stat", &["--format=%u", "/proc/self"])?;
    ensure!(user.trim() == "0", "the harness itself is root");
    let pid = web.systemctl(&["show", "--property=MainPID", "--value", "checkout.service"])?;
    let user = web.command("stat", &["--format=%u", &format!("/proc/{}", pid.trim())])?;
    ensure!(user.trim().parse::<u32>()? >= 61184, "not a dynamic user: {user}");
    arrived_as(&mesh, &["checkout"])
}

#[test]
fn socket_activated_units_call_and_serve() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let (web, server) = (mesh.machine("web"), mesh.machine("api-1"));
    server.systemctl(&["stop", "payments.service"])?;
    let backend = "/usr/bin/testkit echo-http --listen 127.0.0.1:8081 --name payments-on-api-activated";
    server.start_unit("backend.service", &units::service(backend, &[]))?;
    activate(server, "payments", &["User=payments"], "127.0.0.1:8080", "127.0.0.1:8081")?;
    activate(web, "checkout", &["User=checkout"], "127.0.0.1:7070", "payments.shop.mesh:80")?;

    for _ in 0..2 {
        let answer = mesh.curl("web", "stray", &["--fail", "http://127.0.0.1:7070/"])?;
        ensure_answered(&answer.expect_success("asking the socket-activated checkout")?)?;
    }
    for (machine, unit) in [(web, "checkout"), (server, "payments")] {
        let state = machine.systemctl(&["show", "--property=ActiveState", "--value", &format!("{unit}.service")])?;
        ensure!(state.trim() == "active", "{unit} was not started by its socket: {state}");
    }
    arrived_as(&mesh, &["checkout", "checkout"])
}

fn wait_for_answers(machine: &Machine, unit: &str, count: usize) -> Result<()> {
    let answers = || machine.journal(unit).map_or(0, |journal| journal.matches("payments-on-api-").count());
    until(DEADLINE, &format!("{count} answers to {unit}"), || answers() >= count)
        .with_context(|| machine.journal(unit).unwrap_or_default())
}

/// The callers of payments, in order, are these and no others, by its host's access log.
fn arrived_as(mesh: &MachineMesh, names: &[&str]) -> Result<()> {
    let expected: Vec<String> = names.iter().map(|name| mesh.spiffe_id(name)).collect();
    let all = || clients(mesh).ok().filter(|seen| seen.len() >= expected.len());
    let seen = until_some(DEADLINE, "every connection in the access log", all)
        .with_context(|| format!("{:?}", clients(mesh)))?;
    ensure!(seen == expected, "came: {seen:?}, expected: {expected:?}");
    Ok(())
}
