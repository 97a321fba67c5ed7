//! A peer that swallows packets.

use anyhow::{Result, ensure};
use meshd_tests::fault::Fault;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;

const CONNECTIONS: u64 = 4;
/// The one bound in time among the scenarios: it is what was promised.
const WITHIN: [&str; 2] = ["--timeout-ms", "3000"];

#[test]
fn a_black_holed_peer_is_left_within_three_seconds() -> Result<()> {
    is_left(|mesh| mesh.host("api-1").black_hole(mesh.host("web").address()))
}

#[test]
fn a_peer_whose_cable_was_pulled_is_left_within_three_seconds() -> Result<()> {
    is_left(|mesh| mesh.host("api-1").link_down())
}

/// What each proxy thread had just handed to the peer may be lost with it; then the other server has all the traffic.
fn is_left(fault: impl FnOnce(&Mesh) -> Result<Fault>) -> Result<()> {
    let mesh = Mesh::start(Plan { threads: 2, ..Plan::shop() })?;
    let load = Load::start_with(&mesh, CONNECTIONS, &WITHIN)?;
    load.reaches("api-1", 50)?;
    let _fault = fault(&mesh)?;
    load.reaches("api-2", 500)?;
    let report = load.end()?;
    ensure!(report.failed <= 2 * CONNECTIONS, "during the fault: {report:?}");

    let args = [&WITHIN[..], &["--requests", "500"]].concat();
    let report = Load::start_with(&mesh, CONNECTIONS, &args)?.finish()?;
    ensure!(report.ok == 500, "after it was left: {report:?}");
    Ok(())
}
