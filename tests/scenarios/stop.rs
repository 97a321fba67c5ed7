//! A meshd that is stopped properly loses nothing.

use anyhow::{Result, ensure};
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use nix::sys::signal::Signal;

#[test]
fn a_stopped_server_side_loses_no_request() -> Result<()> {
    let mesh = Mesh::start(Plan::shop())?;
    let load = Load::start(&mesh, 8)?;
    load.reaches("api-1", 100)?;
    mesh.daemon("api-1").stop()?;
    load.reaches("api-2", 200)?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_host_that_came_back_is_used_again() -> Result<()> {
    let mesh = Mesh::start(Plan::shop())?;
    let load = Load::start(&mesh, 8)?;
    load.reaches("api-1", 100)?;
    mesh.daemon("api-1").stop()?;
    load.reaches("api-2", 200)?;
    mesh.daemon("api-1").start()?;
    load.reaches("api-1", 100)?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_transfer_in_progress_is_finished_before_a_stop() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let args = ["idle", "--target", "payments.shop.mesh:80", "--connections", "1"];
    let mut held = mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &args))?;
    mesh.daemon("api-1").signal(Signal::SIGTERM)?;
    ensure!(mesh.daemon("api-1").is_running(), "it did not wait for the open stream");
    ensure!(held.stop()?.success(), "the held connection ended: {}", held.output());
    mesh.daemon("api-1").stop()
}

#[test]
fn all_parts_run_until_they_are_stopped_and_that_is_no_defect() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let metrics = mesh.daemon("api-1").metrics()?;
    for task in ["renewal", "denials", "capture", "discovery", "dns", "metrics", "admin", "workload_api", "reload"] {
        let labels = [("task", task)];
        ensure!(metrics.sum("meshd_task_running", &labels) == 1.0, "{task} does not run");
        ensure!(metrics.sum("meshd_task_failures_total", &labels) == 0.0, "{task} has ended");
    }
    mesh.daemon("api-1").stop()?;
    let log = mesh.daemon("api-1").log();
    ensure!(!log.contains("by a defect"), "{log}");
    Ok(())
}
