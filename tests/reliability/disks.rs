//! Full disks.

use std::sync::Arc;

use anyhow::{Result, ensure};
use meshd_tests::disk::SmallDisk;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, Workload};
use meshd_tests::wait::until;

use crate::endings::ends_watched;
use crate::kills::renewed_everywhere;
use crate::witness::Witness;
use crate::{DEADLINE, PAYMENTS, asks_payments};

#[test]
fn a_pki_whose_disk_is_full_renews_and_refuses_to_enrol_until_there_is_room() -> Result<()> {
    let mut plan = Plan { leaf_ttl: Some("24"), ..Plan::shop() };
    plan.hosts.push(HostPlan { name: "late".to_owned(), workloads: vec![Workload::client("checkout", 2003)] });
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    let disk = SmallDisk::over(&mesh.pki_state(), "8m")?;
    mesh.start_pki()?;
    crate::SERVERS.iter().try_for_each(|host| mesh.join(host))?;
    mesh.start_hosts(&crate::SERVERS)?;
    let load = Witness::start(&mesh)?;
    let token = mesh.token_of("late")?;

    disk.fill()?;
    renewed_everywhere(&mesh)?;
    let refused = mesh.daemon("late").join(&token)?;
    ensure!(!refused.success(), "a host enrolled, and nothing could be written: {refused:?}");
    let alarms = mesh.pki_metrics()?;
    ensure!(alarms.sum("meshd_pki_audit_failures_total", &[]) > 0.0, "no alarm of the audit log");

    disk.make_room()?;
    mesh.daemon("late").join(&token)?.expect_success("joining once there is room")?;
    mesh.start_hosts(&["late"])?;
    asks_payments(&mesh, "late", "checkout")?;
    renewed_everywhere(&mesh)?;
    load.end(&mesh, "disk of the PKI full, and room again")?;
    mesh.kill_pki()?;
    mesh.start_pki()?;
    renewed_everywhere(&mesh)
}

#[test]
fn a_host_whose_disk_is_full_renews_and_writes_as_soon_as_it_can() -> Result<()> {
    let plan = Plan { leaf_ttl: Some("24"), ..Plan::shop() };
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    mesh.start_pki()?;
    mesh.join_all()?;
    let disk = SmallDisk::over(&mesh.host("api-1").directory().join("meshd/state"), "8m")?;
    mesh.start_all()?;
    let load = Witness::start(&mesh)?;
    let is_told = || mesh.daemon("api-1").log().contains("new credentials are in use but not on disk");
    let at_first = ends_watched(&mesh, "api-1")?;

    disk.fill()?;
    until(DEADLINE, "a renewal that could not be written", is_told)?;
    renewed_everywhere(&mesh)?;
    disk.make_room()?;
    renewed_everywhere(&mesh)?;
    load.end(&mesh, "disk of a host full, and room again")?;
    mesh.stop_pki()?;
    // What it used last, and not what was on disk before that was full.
    let in_use = ends_watched(&mesh, "api-1")?;
    ensure!(in_use.iter().all(|(id, end)| at_first.get(id) < Some(end)), "not renewed: {at_first:?}, then {in_use:?}");
    mesh.daemon("api-1").restart()?;
    let on_disk = ends_watched(&mesh, "api-1")?;
    ensure!(on_disk == in_use, "in use were {in_use:?}, on disk {on_disk:?}");
    // On a slow machine its certificates may have ended by now.
    mesh.start_pki()?;
    let answers =
        || mesh.curl("web", "checkout", &["--fail", PAYMENTS]).is_ok_and(|said| said.stdout.contains("api-1"));
    until(DEADLINE, "an answer by api-1", answers)
}
