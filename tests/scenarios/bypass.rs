//! The kill switch.

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::{DEADLINE, ask};

/// payments' strict port, called in clear by somebody of its own host.
fn is_open(mesh: &Mesh) -> Result<bool> {
    Ok(mesh.curl("api-1", "stray", &["--fail", "--max-time", "3", "http://127.0.0.1:8080/"])?.success())
}

fn bypass(mesh: &Mesh, words: &[&str]) -> Result<String> {
    let words: Vec<&str> = std::iter::once("bypass").chain(words.iter().copied()).collect();
    mesh.daemon("api-1").run(&words)?.expect_success(&words.join(" "))
}

#[test]
fn a_bypass_opens_strict_ports_until_it_is_off_and_survives_a_restart() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let api = mesh.daemon("api-1");
    ensure!(!is_open(&mesh)?, "not strict, so nothing is shown");
    let said = bypass(&mesh, &["on"])?;
    ensure!(said.contains("Virtual IPs") && said.contains("stay captured"), "does not say what stays: {said}");
    ensure!(is_open(&mesh)?, "still closed");
    ask(&mesh)?;
    ensure!(api.metrics()?.sum("meshd_bypass", &[("unit", "*")]) == 1.0, "not in the metrics");
    let check = api.run(&["check"])?;
    ensure!(check.stdout.contains("meshd bypass off"), "check is content: {}", check.stdout);
    api.restart()?;
    ensure!(is_open(&mesh)?, "closed by a restart");
    ensure!(api.log().contains("meshd is out of the way"), "no warning at start:\n{}", api.log());
    bypass(&mesh, &["off"])?;
    ensure!(!is_open(&mesh)?, "still open");
    ensure!(!api.metrics()?.has("meshd_bypass", &[]), "still in the metrics");
    let recorded = || api.log().lines().any(|line| line.contains("audit") && line.contains("bypass changed"));
    until(DEADLINE, "a record of it", recorded)?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn a_bypass_of_one_unit_leaves_the_others_alone() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let (payments, smtp) =
        if mesh.lab().has_units() { ("payments.service", "smtp.service") } else { ("uid:2001", "uid:2002") };
    bypass(&mesh, &["on", "--unit", smtp])?;
    ensure!(!is_open(&mesh)?, "opened by a bypass of {smtp}");
    bypass(&mesh, &["on", "--unit", payments])?;
    ensure!(is_open(&mesh)?, "still closed");
    let said = bypass(&mesh, &["off", "--unit", payments])?;
    ensure!(said.contains(smtp), "does not say what is still bypassed: {said}");
    ensure!(!is_open(&mesh)?, "still open");
    let wrong = mesh.daemon("api-1").run(&["bypass", "on", "--unit", "payments"])?;
    ensure!(!wrong.success() && wrong.stderr.contains("payments.service"), "no suggestion: {}", wrong.stderr);
    Ok(())
}

#[test]
fn a_bypass_works_without_the_daemon() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let api = mesh.daemon("api-1");
    api.kill()?;
    ensure!(!is_open(&mesh)?, "a strict port was opened by a kill");
    bypass(&mesh, &["on"])?;
    ensure!(is_open(&mesh)?, "still closed");
    api.start()?;
    ensure!(is_open(&mesh)?, "closed by a start");
    ask(&mesh)?;
    api.kill()?;
    bypass(&mesh, &["off"])?;
    ensure!(!is_open(&mesh)?, "still open");
    Ok(())
}

#[test]
fn a_bypass_works_while_the_daemon_hangs() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let api = mesh.daemon("api-1");
    api.stand_still()?;
    ensure!(!is_open(&mesh)?, "a strict port was opened by a daemon that hangs");
    bypass(&mesh, &["on"])?;
    ensure!(is_open(&mesh)?, "still closed");
    let status = api.run(&["status"])?;
    ensure!(!status.success() && status.stderr.contains("hangs"), "not told: {status:?}");
    api.signal(Signal::SIGCONT)?;
    bypass(&mesh, &["off"])?;
    ensure!(!is_open(&mesh)?, "still open");
    ask(&mesh)?;
    Ok(())
}
