//! Who may use the mesh.

use anyhow::Result;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Program;
use meshd_tests::wait::until;

use crate::{DEADLINE, PAYMENTS, ask, ensure_refused, refused};

#[test]
fn a_unit_that_is_not_enrolled_is_refused_and_meshd_says_why() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    ensure_refused(&mesh.curl("web", "stray", &[PAYMENTS])?)?;
    let log_names_it = || mesh.daemon("web").log().lines().any(|line| line.contains("stray.service"));
    until(DEADLINE, "a log line that names stray.service", log_names_it)?;
    until(DEADLINE, "the refusal counted", || refused(&mesh, "web", "unenrolled").is_ok_and(|count| count >= 1.0))?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn root_is_not_exempt() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let curl = Program::new("curl").args(["--silent", "--show-error", "--max-time", "5", PAYMENTS]);
    ensure_refused(&mesh.host("web").run(&curl.unit("cron.service"))?)
}
