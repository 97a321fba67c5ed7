//! Unmodified programs, names, identities.

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, PAYMENTS, ask};

#[test]
fn a_request_by_name_is_answered_through_the_mesh() -> Result<()> {
    let mesh = Mesh::start(Plan::shop())?;
    ask(&mesh)?;
    let labels = [("direction", "outbound"), ("srv_name", "payments"), ("srv_namespace", "shop"), ("tls", "true")];
    let counted = || mesh.daemon("web").metrics().is_ok_and(|metrics| metrics.sum("tcp_close_total", &labels) >= 1.0);
    until(DEADLINE, "the connection in web's metrics", counted)
}

#[test]
fn names_have_addresses_of_both_families_and_both_work() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    for family in ["--ipv4", "--ipv6"] {
        let answer = mesh.curl("web", "checkout", &[family, "--fail", PAYMENTS])?;
        answer.expect_success(&format!("asking with {family}"))?;
    }
    Ok(())
}

#[test]
fn two_units_of_one_host_arrive_with_two_identities() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    for unit in ["checkout", "billing"] {
        mesh.curl("web", unit, &["--fail", PAYMENTS])?.expect_success(unit)?;
    }
    for unit in ["checkout", "billing"] {
        let identity = mesh.spiffe_id(unit);
        let labels = [("direction", "inbound"), ("client_id", identity.as_str())];
        let seen = || mesh.daemon("api-1").metrics().is_ok_and(|metrics| metrics.sum("tcp_open_total", &labels) >= 1.0);
        until(DEADLINE, &format!("{identity} in api-1's metrics"), seen)?;
    }
    let events = mesh.daemon("api-1").access_log();
    let server = mesh.spiffe_id("payments");
    ensure!(events.iter().all(|event| event.server_id.as_ref() == Some(&server)), "served by another: {events:#?}");
    Ok(())
}

#[test]
fn both_servers_get_a_share() -> Result<()> {
    let mesh = Mesh::start(Plan::shop())?;
    let args =
        ["load", "--target", "payments.shop.mesh:80", "--per-request", "--connections", "4", "--requests", "400"];
    mesh.host("web").run(&mesh.testkit("web", "checkout", &args))?.expect_success("load")?;
    for host in ["api-1", "api-2"] {
        let opened = mesh.daemon(host).metrics()?.sum("tcp_open_total", &[("direction", "inbound"), ("peer", "src")]);
        ensure!(opened >= 20.0, "{host} got {opened} of 400 connections");
    }
    Ok(())
}
