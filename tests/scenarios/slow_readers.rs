//! Readers that stopped do not stop their neighbours.

use anyhow::{Result, ensure};
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;

#[test]
fn eight_stopped_readers_on_one_pooled_connection_do_not_slow_the_others() -> Result<()> {
    // One thread on each side, so that there is one connection to share.
    let mesh = Mesh::start(Plan { threads: 1, ..Plan::shop_with_one_server() })?;
    let target = ["--target", "payments.shop.mesh:80", "--connections"];
    let stall = [&["stall"], &target[..], &["8", "--size", "200000000"]].concat();
    let mut stalled = mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &stall))?;

    let load = [&["load"], &target[..], &["4", "--requests", "2000", "--size", "16384"]].concat();
    let finished = mesh.host("web").run(&mesh.testkit("web", "checkout", &load))?;
    let load: LoadReport = report(&finished)?;
    ensure!(load.ok == 2000 && load.failed == 0, "{load:?}");

    ensure!(stalled.is_running(), "the stopped readers are gone: {}", stalled.output());
    let shared = mesh.host("web").command("ss", &["-Htn", "state", "established", "dport", "=", ":15008"])?;
    ensure!(shared.lines().count() == 1, "they did not share a connection:\n{shared}");
    Ok(())
}
