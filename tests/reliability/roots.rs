//! Roots replaced under load, while hosts are stopped, cut off, or just joining.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, Workload};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::witness::Witness;
use crate::{DEADLINE, asks_payments, figure, roots, scale};

/// Hosts beside those under load: one is stopped for a while, one joins late.
fn plan() -> Plan {
    let mut plan = Plan { rehearse: Some("15s"), ..Plan::shop() };
    for (name, uid) in [("depot", 2003), ("late", 2003)] {
        plan.hosts.push(HostPlan { name: name.to_owned(), workloads: vec![Workload::client("checkout", uid)] });
    }
    plan
}

#[test]
fn roots_are_replaced_under_load_and_no_connection_notices() -> Result<()> {
    let plan = plan();
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    let first = ["web", "api-1", "api-2", "depot"];
    mesh.start_pki()?;
    first.iter().try_for_each(|host| mesh.join(host))?;
    mesh.start_hosts(&first)?;
    let load = Witness::start(&mesh)?;
    let pki = mesh.pki_process()?.pid();

    until(DEADLINE, "a root to be prepared", || roots(&mesh).is_ok_and(|(_, count)| count > 1))?;
    mesh.daemon("depot").stand_still()?;
    let cut_off = mesh.host("api-2").black_hole(mesh.host("pki").address())?;
    mesh.join("late")?;
    mesh.start_hosts(&["late"])?;
    asks_payments(&mesh, "late", "checkout")?;
    mesh.daemon("depot").signal(Signal::SIGCONT)?;
    drop(cut_off);

    let (wanted, mut seen, mut most) = (scale(1, 30), Vec::new(), 0);
    while seen.len() <= wanted {
        let signs = || roots(&mesh).ok().filter(|(id, _)| Some(id) != seen.last());
        let mut found = None;
        until(DEADLINE, "the next root to sign", || {
            found = signs();
            found.is_some()
        })?;
        let (id, count) = found.context("no root")?;
        most = most.max(count);
        seen.push(id);
    }
    for host in ["web", "depot", "late"] {
        asks_payments(&mesh, host, "checkout")?;
    }
    ensure!(most <= 4, "{most} roots in the bundle");
    ensure!(mesh.pki_process()?.is_running() && mesh.pki_process()?.pid() == pki, "the PKI is not the process it was");
    figure(&format!("{wanted} rotations of the root, at most {most} roots in the bundle"));
    load.end(&mesh, &format!("{wanted} rotations of the root"))
}
