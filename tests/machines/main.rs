//! Behaviours of a mesh on real systemd hosts: units, cgroups, a journal, sshd, reboots. Each test boots machines of its
//! own. Run by `cargo xtask test`; needs root.

mod bridge;
mod identity;
mod intercept;
mod ipv6;
mod lab;
mod many;
mod restart;
mod ssh;
mod strict;

use std::time::Duration;

use anyhow::{Result, ensure};
use meshd_tests::machine::MachineMesh;
use meshd_tests::process::Finished;

const PAYMENTS: &str = "http://payments.shop.mesh/";
/// Longer than anything here takes: what it bounds is a failing test.
const DEADLINE: Duration = Duration::from_secs(20);

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
