//! Protocols meshd knows nothing about.

use anyhow::{Result, ensure};
use meshd_tests::load::{BulkReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;

#[test]
fn a_server_may_speak_first_and_a_half_close_reaches_it() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let talk = mesh.testkit("web", "checkout", &["talk", "--target", "smtp.shop.mesh:25", "--say", "hello"]);
    let heard = mesh.host("web").run(&talk)?.expect_success("talking to smtp")?;
    let lines: Vec<&str> = heard.lines().collect();
    ensure!(lines == ["220 smtp on api-1 ready", "hello", "221 smtp on api-1 bye"], "heard {lines:?}");
    Ok(())
}

#[test]
fn large_bodies_arrive_whole() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let args = ["bulk", "--target", "payments.shop.mesh:80", "--connections", "4", "--bytes", "100000000"];
    let finished = mesh.host("web").run(&mesh.testkit("web", "checkout", &args))?;
    let bulk: BulkReport = report(&finished)?;
    ensure!(bulk.bytes == 100_000_000 && bulk.failed == 0, "{bulk:?}");
    Ok(())
}
