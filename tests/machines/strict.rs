//! Strict ports of owners known by their unit.

use anyhow::{Context, Result};
use meshd_tests::machine::{MachineMesh, units};
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask, ensure_refused};

#[test]
fn a_strict_port_of_a_unit_is_closed_to_everyone_but_the_mesh_also_after_a_reboot() -> Result<()> {
    let mut mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    closed_but_to_the_mesh(&mesh)?;
    mesh.machine_mut("api-1").reboot()?;
    mesh.daemon("api-1").wait_ready()?;
    closed_but_to_the_mesh(&mesh)
}

fn closed_but_to_the_mesh(mesh: &MachineMesh) -> Result<()> {
    let own = format!("http://{}:8080/", mesh.machine("api-1").host().address());
    for (machine, unit, url) in [
        ("api-1", "stray", "http://127.0.0.1:8080/"),
        ("api-1", "smtp-client", &own),
        ("web", "stray", &own),
        ("web", "checkout", &own),
    ] {
        let answer = mesh.curl(machine, unit, &["--max-time", "5", url])?;
        ensure_refused(&answer).with_context(|| format!("{url} from {unit} on {machine}"))?;
    }
    ask(mesh, "checkout")
}

#[test]
fn the_unit_that_owns_a_strict_port_may_call_it_itself_also_in_a_new_cgroup() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    let server = mesh.machine("api-1");
    // What reloads a unit runs in its cgroup.
    let settings = ["User=payments", "ExecReload=/usr/bin/curl --silent --fail --max-time 5 http://127.0.0.1:8080/"];
    let serve = "/usr/bin/testkit echo-http --listen 0.0.0.0:8080 --name payments-on-api-1";
    server.install_unit("payments.service", &units::service(serve, &settings))?;
    for _ in 0..3 {
        server.systemctl(&["restart", "payments.service"])?;
        until(DEADLINE, "the owner to be let in", || server.systemctl(&["reload", "payments.service"]).is_ok())
            .with_context(|| server.command("nft", &["list", "ruleset"]).unwrap_or_default())?;
        closed_but_to_the_mesh(&mesh)?;
    }
    Ok(())
}
