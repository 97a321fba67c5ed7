//! meshd killed, hosts rebooted: systemd brings them back, and the mesh with them.

use anyhow::{Context, Result, ensure};
use meshd_tests::load::{LoadReport, report};
use meshd_tests::machine::{MachineDaemon, MachineMesh};
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask};

#[test]
fn a_meshd_killed_in_the_midst_of_traffic_is_brought_back_and_traffic_with_it() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let web = mesh.machine("web");
    let load = ["load", "--target", "payments.shop.mesh:80", "--per-request", "--connections", "4"];
    let load = web.spawn(&mesh.testkit("web", "checkout", &load))?;
    for machine in ["web", "api-1", "web", "api-1", "web", "api-1"] {
        let daemon = mesh.daemon(machine);
        until(DEADLINE, "traffic", || opened(&daemon) > 50.0).with_context(|| load.output())?;
        let before = daemon.pid()?;
        daemon.kill()?;
        let back = || daemon.pid().is_ok_and(|pid| pid != before && pid != 0) && daemon.is_ready();
        until(DEADLINE, &format!("another meshd on {machine}"), back).with_context(|| daemon.log())?;
        ask(&mesh, "billing")?;
    }
    web.systemctl(&["stop", "checkout.service"])?;
    let load: LoadReport = report(&load.finish(DEADLINE)?)?;
    ensure!(load.ok > 300, "hardly any traffic: {load:?}");
    Ok(())
}

fn opened(daemon: &MachineDaemon<'_>) -> f64 {
    daemon.metrics().map_or(0.0, |metrics| metrics.sum("tcp_open_total", &[("peer", "src")]))
}

#[test]
fn rebooted_hosts_are_in_the_mesh_again_without_the_pki() -> Result<()> {
    let mut mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    ask(&mesh, "checkout")?;
    let booted = mesh.machine("web").read("/proc/sys/kernel/random/boot_id")?;
    mesh.stop_pki()?;
    for machine in ["web", "api-1"] {
        mesh.machine_mut(machine).reboot()?;
        mesh.daemon(machine).wait_ready()?;
    }
    ask(&mesh, "checkout")?;
    ask(&mesh, "billing")?;
    let boots = mesh.machine("web").command("journalctl", &["--list-boots", "--no-pager", "--quiet"])?;
    ensure!(boots.lines().count() == 2, "it did not boot twice: {boots}{booted}");
    Ok(())
}
