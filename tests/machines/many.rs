//! Many connections: nothing is left of them, and hardly any is not identified.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use meshd_tests::load::{LoadReport, report};
use meshd_tests::machine::{MachineMesh, units};
use meshd_tests::metrics::Metrics;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask, shop_without_strict_ports};

const LEAVING: u64 = 1000;
/// One in a hundred: those whose connection was opened while the rules were replaced.
const UNIDENTIFIED_MAX: f64 = 20.0;

#[test]
fn ten_thousand_connections_leave_no_descriptor_and_no_nat_entry_by_nft_tproxy() -> Result<()> {
    leave_nothing(Plan::shop_with_one_server(), "nft-tproxy")
}

#[test]
fn ten_thousand_connections_leave_no_descriptor_and_no_nat_entry_by_nft_redirect() -> Result<()> {
    leave_nothing(Plan::shop_with_one_server(), "nft-redirect")
}

#[test]
fn ten_thousand_connections_leave_no_descriptor_and_no_nat_entry_by_iptables() -> Result<()> {
    leave_nothing(Plan::shop_with_one_server(), "iptables-nft")
}

#[test]
fn ten_thousand_connections_leave_no_descriptor_and_no_nat_entry_by_tun() -> Result<()> {
    leave_nothing(shop_without_strict_ports(), "tun")
}

fn leave_nothing(plan: Plan, backend: &str) -> Result<()> {
    let mesh = MachineMesh::prepare(plan, backend)?;
    mesh.start_daemons()?;
    // What a first connection opens for good is not a leak.
    ask(&mesh, "checkout")?;
    let descriptors = |machine: &str| mesh.daemon(machine).open_descriptors();
    let before = [descriptors("web")?, descriptors("api-1")?];
    let load = ["load", "--target", "payments.shop.mesh:80", "--per-request", "--size", "64", "--requests", "10000"];
    let load: LoadReport = report(&mesh.machine("web").run(&mesh.testkit("web", "checkout", &load))?)?;
    ensure!(load.ok == 10_000 && load.failed == 0, "{load:?}");
    for (machine, before) in ["web", "api-1"].into_iter().zip(before) {
        let settled = || descriptors(machine).is_ok_and(|now| now <= before);
        until(DEADLINE, &format!("no more than {before} descriptors on {machine}"), settled)
            .with_context(|| format!("{:?} are left", descriptors(machine)))?;
        let tracked = mesh.machine(machine).command("cat", &["/proc/net/nf_conntrack"])?;
        let lasting: Vec<&str> = tracked.lines().filter(|entry| is_lasting(entry)).collect();
        // The connection between the daemons is one.
        ensure!(lasting.len() < 10, "{} entries on {machine}, such as {}", lasting.len(), lasting[0]);
        say(&format!(
            "{backend}, {machine}: {} connections tracked, {} lasting",
            tracked.lines().count(),
            lasting.len()
        ))?;
    }
    let LoadReport { requests_per_second, p99_us, .. } = load;
    say(&format!("{backend}: 10,000 sequential connections, {requests_per_second:.0} a second, p99 {p99_us} us"))
}

#[test]
fn also_on_a_busy_host_clients_that_do_not_wait_for_an_answer_are_identified() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    ask(&mesh, "checkout")?;
    let quiet = leave_at_once(&mesh)?;
    let web = mesh.machine("web");
    for number in 0..4 {
        web.start_unit(&format!("busy-{number}.service"), &units::service("/bin/sh -c 'while :; do :; done'", &[]))?;
    }
    let busy = leave_at_once(&mesh)?;
    say(&format!("clients that leave at once: {quiet} of {LEAVING} unidentified, {busy} on a busy host"))?;
    ensure!(quiet + busy < UNIDENTIFIED_MAX, "{quiet} on a quiet host, {busy} on a busy one");
    let before = mesh.daemon("web").metrics()?;
    let load = ["load", "--target", "payments.shop.mesh:80", "--per-request", "--size", "64", "--requests", "1000"];
    let load: LoadReport = report(&web.run(&mesh.testkit("web", "checkout", &load))?)?;
    ensure!(load.ok == 1000 && load.failed == 0, "clients that wait for an answer: {load:?}");
    let after = mesh.daemon("web").metrics()?;
    ensure!(unidentified(&after) <= unidentified(&before), "one that waits was not identified");
    // Not knowing is refusing: none may pass for another.
    ensure!(after.sum("meshd_refused_total", &[("error", "unenrolled")]) < 1.0, "one was taken for somebody else");
    Ok(())
}

/// How many of so many clients meshd could not identify: they had closed when it looked.
fn leave_at_once(mesh: &MachineMesh) -> Result<f64> {
    let metrics = || mesh.daemon("web").metrics();
    let before = metrics()?;
    let leave = ["leave", "--target", "payments.shop.mesh:80", "--connections", &LEAVING.to_string()];
    let left: LoadReport = report(&mesh.machine("web").run(&mesh.testkit("web", "checkout", &leave))?)?;
    ensure!(left.ok == LEAVING, "{left:?}");
    let goal = closed(&before) + f64::from(u32::try_from(LEAVING)?);
    until(DEADLINE, "every connection closed and counted", || metrics().is_ok_and(|now| closed(&now) >= goal))
        .with_context(|| metrics().map_or_else(|error| error.to_string(), |now| format!("{} counted", closed(&now))))?;
    Ok(unidentified(&metrics()?) - unidentified(&before))
}

fn closed(metrics: &Metrics) -> f64 {
    metrics.sum("tcp_close_total", &[("direction", "outbound"), ("peer", "src")])
}

fn unidentified(metrics: &Metrics) -> f64 {
    metrics.sum("meshd_refused_total", &[("error", "identify_unknown")])
}

/// Of TCP, and in none of the states that the kernel keeps a while for late packets.
fn is_lasting(entry: &str) -> bool {
    let mut words = entry.split_whitespace();
    words.nth(2) == Some("tcp") && !words.nth(2).is_some_and(|state| ["TIME_WAIT", "CLOSE"].contains(&state))
}

/// A measurement, shown also when the test passes.
fn say(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
