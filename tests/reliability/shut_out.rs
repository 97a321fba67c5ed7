//! A host is banned, an identity denied: both are cut off everywhere within seconds, and nobody else notices.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, MESH_PORT, Plan, Workload};
use meshd_tests::process::Process;
use meshd_tests::wait::until;

use crate::witness::Witness;
use crate::{DEADLINE, asks_payments, figure_promised, scale};

/// From the operator's word to the last cut connection.
const PROMISED: Duration = Duration::from_secs(5);
const APIS: [&str; 2] = ["api-1", "api-2"];

fn plan() -> Plan {
    let mut plan = Plan::shop();
    // Of the same identity as what is under load: the ban is of the host and not of whom it serves.
    plan.hosts.push(HostPlan { name: "depot".to_owned(), workloads: vec![Workload::client("checkout", 2003)] });
    plan
}

fn hold(mesh: &Mesh, host: &str, name: &str) -> Result<Process> {
    let idle = ["idle", "--target", "payments.shop.mesh:80", "--connections", "32"];
    mesh.host(host).start_testkit(&mesh.testkit(host, name, &idle))
}

/// Mesh connections from a host that the kernel of another knows.
fn open_from(mesh: &Mesh, caller: &str, at: &str) -> Result<usize> {
    let (port, address) = (format!(":{MESH_PORT}"), mesh.host(caller).address().to_string());
    let asked = ["-Htn", "state", "established", "sport", "=", &port, "and", "dst", &address];
    Ok(mesh.host(at).command("ss", &asked)?.lines().count())
}

fn held_by_billing(mesh: &Mesh) -> f64 {
    let labels = [("direction", "outbound"), ("peer", "src"), ("unit", "billing.service")];
    mesh.daemon("web").metrics().map_or(-1.0, |metrics| metrics.sum("tcp_open_connections", &labels))
}

#[test]
fn a_banned_host_and_a_denied_identity_are_cut_off_everywhere_and_nobody_else_notices() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    let load = Witness::start(&mesh)?;
    let times = scale(1, 20);
    let (mut slowest_ban, mut slowest_denial) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..times {
        let (_of_depot, _of_billing) = (hold(&mesh, "depot", "checkout")?, hold(&mesh, "web", "billing")?);
        for api in APIS {
            ensure!(open_from(&mesh, "depot", api)? > 0, "depot holds nothing open to {api}");
        }
        ensure!(held_by_billing(&mesh) == 32.0, "billing holds {} connections", held_by_billing(&mesh));

        let said = Instant::now();
        mesh.pki(&["host", "ban", "depot", "--reason", "stolen"])?;
        let is_cut = || APIS.iter().all(|api| open_from(&mesh, "depot", api).is_ok_and(|open| open == 0));
        until(DEADLINE, "depot cut off", is_cut)?;
        slowest_ban = slowest_ban.max(said.elapsed());
        ensure!(asks_payments(&mesh, "depot", "checkout").is_err(), "a banned host is served");

        let (said, billing) = (Instant::now(), mesh.spiffe_id("billing"));
        mesh.deny(&["--identity", &billing])?;
        until(DEADLINE, "billing cut off", || held_by_billing(&mesh) == 0.0)?;
        slowest_denial = slowest_denial.max(said.elapsed());
        ensure!(asks_payments(&mesh, "web", "billing").is_err(), "a denied identity is served");

        mesh.pki(&["host", "unban", "depot"])?;
        mesh.pki(&["deny", "remove", "--identity", &billing])?;
        until(DEADLINE, "depot served again", || asks_payments(&mesh, "depot", "checkout").is_ok())?;
        until(DEADLINE, "billing served again", || asks_payments(&mesh, "web", "billing").is_ok())?;
    }
    let text = format!(
        "{times} times: the slowest ban of a host cut everything in {slowest_ban:.1?}, of an identity in {slowest_denial:.1?}"
    );
    figure_promised(&text, slowest_ban.max(slowest_denial) < PROMISED)?;
    load.end(&mesh, &format!("a host banned and an identity denied {times} times"))
}
