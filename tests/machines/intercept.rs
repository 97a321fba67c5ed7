//! Plans on a host with a real systemd and a real sshd.

use anyhow::{Result, ensure};
use meshd_tests::machine::MachineMesh;
use meshd_tests::plan::{self, Plan};
use meshd_tests::wait::until;

use crate::{DEADLINE, ask, shop_without_strict_ports};

#[test]
fn an_unconfirmed_plan_applied_over_ssh_is_taken_back_by_systemd() -> Result<()> {
    let strict = Plan::shop_with_one_server();
    let mesh = MachineMesh::start(shop_without_strict_ports())?;
    let (api, machine) = (mesh.daemon("api-1"), mesh.machine("api-1"));
    let url = format!("http://{}:8080/", machine.host().address());
    let gets_in =
        || mesh.curl("web", "stray", &["--fail", "--max-time", "5", &url]).is_ok_and(|answer| answer.success());
    api.run(&["intercept", "confirm"])?.expect_success("confirming the open plan")?;
    let host = strict.hosts.iter().find(|host| host.name == "api-1");
    api.enrol(&plan::enrolment(host.map_or(&[], |host| &host.workloads), true))?;

    let apply = mesh.ssh("api-1", "meshd intercept apply --confirm-within 5s")?.finish(DEADLINE)?;
    let said = apply.expect_success("applying over ssh")?;
    ensure!(said.contains("meshd intercept confirm"), "{said}");
    let timers = machine.systemctl(&["list-timers", "--all", "--no-legend"])?;
    ensure!(timers.contains("run-"), "systemd keeps no timer for it:\n{timers}");
    ensure!(!gets_in(), "nobody is locked out, so nothing is shown");
    api.stop()?;
    until(DEADLINE, "callers to get in again", gets_in)?;
    api.start()?;
    ensure!(gets_in(), "a restart put the plan back that nobody confirmed");
    ask(&mesh, "checkout")
}

#[test]
fn the_port_of_a_real_sshd_cannot_become_strict() -> Result<()> {
    let mesh = MachineMesh::start(Plan::shop_with_one_server())?;
    mesh.daemon("api-1").enrol(
        "[[workload]]\nunit = \"ssh.service\"\nnamespace = \"shop\"\nname = \"payments\"\n  [[workload.serve]]\n  \
         service = \"admin.shop\"\n  port = 22\n  deliver = \"127.0.0.1:22\"\n  mode = \"strict\"\n",
    )?;
    let answer = mesh.ssh("api-1", "meshd intercept apply")?.finish(DEADLINE)?;
    ensure!(!answer.success() && answer.stderr.contains("lock you out"), "applied: {answer:?}");
    mesh.ssh("api-1", "true")?.finish(DEADLINE)?.expect_success("logging in")?;
    Ok(())
}
