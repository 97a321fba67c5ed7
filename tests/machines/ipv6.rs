//! Hosts without IPv4.

use anyhow::{Result, ensure};
use meshd_tests::machine::MachineMesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Program;
use meshd_tests::wait::until_some;

use crate::{DEADLINE, PAYMENTS, ask, clients, ensure_answered};

#[test]
fn a_mesh_of_hosts_that_have_only_ipv6_works() -> Result<()> {
    let mesh = MachineMesh::start(Plan { ipv6_only: true, ..Plan::shop_with_one_server() })?;
    for machine in ["web", "api-1"] {
        let addresses = mesh.machine(machine).command("ip", &["-4", "-o", "address", "show"])?;
        ensure!(addresses.lines().all(|line| line.contains(" lo ")), "{machine} has IPv4: {addresses}");
    }
    ask(&mesh, "checkout")?;
    let answer = mesh.curl("web", "checkout", &["--fail", "--ipv6", PAYMENTS])?;
    ensure_answered(&answer.expect_success("asking the AAAA address")?)?;

    let lookup = Program::new("getent").args(["ahostsv6", "payments.shop.mesh"]);
    let found = mesh.machine("web").run(&lookup)?.expect_success("looking up payments")?;
    ensure!(found.starts_with("fd"), "not a virtual IPv6 address: {found}");
    ensure!(clients(&mesh)? == [mesh.spiffe_id("checkout"), mesh.spiffe_id("checkout")], "{:?}", clients(&mesh));

    let outbound = || mesh.daemon("web").access_log().ok()?.into_iter().find(|event| !event.is_inbound());
    let event = until_some(DEADLINE, "the connection in web's access log", outbound)?;
    let server = mesh.machine("api-1").host().address6().to_string();
    ensure!(event.endpoint.as_ref().is_some_and(|endpoint| endpoint.contains(&server)), "went elsewhere: {event:?}");
    Ok(())
}
