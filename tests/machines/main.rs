//! Behaviours of a mesh on real systemd hosts: units, cgroups, a journal, sshd, reboots. Each test boots machines of its
//! own. Run by `cargo xtask test`; needs root.

mod bridge;
mod enrol;
mod identity;
mod intercept;
mod ipv6;
mod lab;
mod many;
mod names;
mod restart;
mod ssh;
mod strict;

use std::time::Duration;

use anyhow::{Result, ensure};
use meshd_tests::machine::{Machine, MachineMesh, units};
use meshd_tests::plan::Plan;
use meshd_tests::process::Finished;

const PAYMENTS: &str = "http://payments.shop.mesh/";
/// Longer than anything here takes: what it bounds is a failing test.
const DEADLINE: Duration = Duration::from_secs(20);

const PROXYD: &str = "/usr/lib/systemd/systemd-socket-proxyd";

/// The shop where plaintext callers of payments are let in, for what cannot be shown or done with a strict port.
fn shop_without_strict_ports() -> Plan {
    let mut plan = Plan::shop_with_one_server();
    for workload in plan.hosts.iter_mut().flat_map(|host| &mut host.workloads) {
        workload.serve.iter_mut().for_each(|serve| serve.strict = false);
    }
    plan
}

/// A socket whose service starts with its first connection, and passes what it accepts on.
fn activate(machine: &Machine, name: &str, settings: &[&str], listen: &str, target: &str) -> Result<()> {
    machine.install_unit(&format!("{name}.service"), &units::service(&format!("{PROXYD} {target}"), settings))?;
    machine.start_unit(&format!("{name}.socket"), &units::socket(listen))
}

/// A unit of web asks payments, and the answer must be right.
fn ask(mesh: &MachineMesh, unit: &str) -> Result<()> {
    let answer = mesh.curl("web", unit, &["--fail", PAYMENTS])?;
    ensure_answered(&answer.expect_success(&format!("{unit} asking payments"))?)
}

fn ensure_answered(body: &str) -> Result<()> {
    ensure!(body.starts_with("payments-on-api-"), "not the answer of payments: {body}");
    Ok(())
}

fn ensure_refused(answer: &Finished) -> Result<()> {
    ensure!(!answer.success() && answer.stdout.is_empty(), "was answered: {}", answer.stdout);
    Ok(())
}

fn refused(mesh: &MachineMesh, machine: &str, error: &str) -> Result<f64> {
    Ok(mesh.daemon(machine).metrics()?.sum("meshd_refused_total", &[("error", error)]))
}

/// Who came to payments, by its host's access log.
fn clients(mesh: &MachineMesh) -> Result<Vec<String>> {
    let events = mesh.daemon("api-1").access_log()?;
    let inbound = events.into_iter().filter(|event| event.is_inbound() && event.is_for("payments.shop"));
    Ok(inbound.filter_map(|event| event.client_id).collect())
}
