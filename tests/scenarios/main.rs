//! Behaviours of a whole mesh: real kernels' capture, real mutual TLS, real programs, on hosts that are namespaces.
//! Each test has a lab of its own. Run by `cargo xtask test`; needs root.

mod access_log;
mod any_tcp;
mod bad_config;
mod black_hole;
mod by_name;
mod by_zone;
mod bypass;
mod certificates;
mod check;
mod client_address;
mod crash;
mod deny;
mod dns;
mod enrol;
mod enrolment;
mod entries;
mod federation;
mod hasty;
mod heal;
mod identify;
mod independence;
mod intercept;
mod iptables;
mod lab;
mod ledger;
mod loops;
mod probe;
mod raw;
mod recovery;
mod selectors;
mod slow_readers;
mod stop;
mod strict;
mod targets;
mod tun;
mod wire;
mod workload_api;

use std::time::Duration;

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::process::Finished;

const PAYMENTS: &str = "http://payments.shop.mesh/";
/// Longer than anything here takes: what it bounds is a failing test.
const DEADLINE: Duration = Duration::from_secs(20);

/// checkout on web asks payments, and the answer must be right.
fn ask(mesh: &Mesh) -> Result<String> {
    let answer = mesh.curl("web", "checkout", &["--fail", PAYMENTS])?;
    let body = answer.expect_success("checkout asking payments")?;
    ensure!(body.starts_with("payments on api-"), "not the answer of payments: {body}");
    Ok(body)
}

fn refused(mesh: &Mesh, host: &str, error: &str) -> Result<f64> {
    Ok(mesh.daemon(host).metrics()?.sum("meshd_refused_total", &[("error", error)]))
}

fn failed_handshakes(mesh: &Mesh, host: &str) -> Result<f64> {
    let labels = [("direction", "inbound"), ("result", "failed")];
    Ok(mesh.daemon(host).metrics()?.sum("meshd_handshakes_total", &labels))
}

fn ensure_refused(answer: &Finished) -> Result<()> {
    ensure!(!answer.success() && answer.stdout.is_empty(), "was answered: {}", answer.stdout);
    Ok(())
}
