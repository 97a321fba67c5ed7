//! What the mesh and its PKI survive, with real processes on hosts that are namespaces: under load, nothing of it failed,
//! no meshd restarted. Run by `cargo xtask test` in a short form; `cargo xtask soak` sets `MESHD_SOAK`, for the long one.
//! docs/reliability.md has the table.

mod asleep;
mod away;
mod clocks;
mod disks;
mod endings;
mod etcd;
mod kills;
mod roots;
mod shut_out;
mod witness;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::Mesh;

/// Longer than anything here takes: what it bounds is a failing test.
const DEADLINE: Duration = Duration::from_secs(90);
const PAYMENTS: &str = "http://payments.shop.mesh/";
const SERVERS: [&str; 3] = ["web", "api-1", "api-2"];

/// One of two sizes of a test.
fn scale<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

fn is_long() -> bool {
    std::env::var_os("MESHD_SOAK").is_some()
}

/// A figure that depends on how busy the machine is: told always, and held against what is promised in the long form only.
fn figure_promised(text: &str, kept: bool) -> Result<()> {
    figure(text);
    ensure!(kept || !is_long(), "more than was promised: {text}");
    Ok(())
}

/// What docs/reliability.md reports.
fn figure(text: &str) {
    println!("figure: {text}");
}

fn asks_payments(mesh: &Mesh, host: &str, name: &str) -> Result<()> {
    let answer = mesh.curl(host, name, &["--fail", PAYMENTS])?;
    let body = answer.expect_success(&format!("{name} on {host} asking payments"))?;
    ensure!(body.starts_with("payments on api-"), "not the answer of payments: {body}");
    Ok(())
}

/// The root that signs, and how many the bundle holds.
fn roots(mesh: &Mesh) -> Result<(String, usize)> {
    roots_in(&mesh.pki_status()?)
}

fn roots_in(status: &serde_json::Value) -> Result<(String, usize)> {
    let all = status["authorities"].as_array().context("no authorities")?;
    let of = |state: &str| all.iter().filter(|one| one["kind"] == "root" && one["state"] == state).collect::<Vec<_>>();
    let active = of("active");
    ensure!(active.len() == 1, "{} active roots: {status}", active.len());
    let id = active[0]["id"].as_str().context("a root without id")?.to_owned();
    Ok((id, 1 + of("prepared").len() + of("old").len()))
}
