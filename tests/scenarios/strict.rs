//! Ports that only the mesh may call.

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask, ensure_refused, iptables};

#[test]
fn a_strict_port_is_closed_to_everyone_but_the_mesh() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let server = mesh.host("api-1");
    let own = format!("http://{}:8080/", server.address());
    let own6 = format!("http://[{}]:8080/", server.address6());
    for (host, url) in [("api-1", "http://127.0.0.1:8080/"), ("api-1", &own), ("web", &own), ("api-1", &own6)] {
        let answer = mesh.curl(host, "stray", &["--max-time", "3", url])?;
        ensure_refused(&answer).with_context(|| format!("{url} from {host}"))?;
    }
    ask(&mesh)?;
    Ok(())
}

#[test]
fn users_named_in_local_ok_may_call_it_locally() -> Result<()> {
    let mut plan = Plan::shop_with_one_server();
    for workload in plan.hosts.iter_mut().flat_map(|host| &mut host.workloads) {
        for serve in &mut workload.serve {
            serve.local_ok = vec![2002];
        }
    }
    let mesh = Mesh::start(plan)?;
    for (unit, allowed) in [("smtp", true), ("stray", false)] {
        let answer = mesh.curl("api-1", unit, &["--max-time", "3", "http://127.0.0.1:8080/"])?;
        ensure!(answer.success() == allowed, "{unit}: {answer:?}");
    }
    Ok(())
}

#[test]
fn a_strict_port_stays_closed_while_meshd_is_down() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    mesh.daemon("api-1").kill()?;
    let own = format!("http://{}:8080/", mesh.host("api-1").address());
    for (host, url) in [("api-1", "http://127.0.0.1:8080/"), ("web", &own)] {
        ensure_refused(&mesh.curl(host, "stray", &["--max-time", "3", url])?)?;
    }
    Ok(())
}

#[test]
fn a_rule_that_gets_ahead_of_a_strict_port_does_not_open_it() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let open = ["-I", "INPUT", "1", "-p", "tcp", "--dport", "8080", "-j", "ACCEPT"];
    iptables::command(&mesh, "api-1", "iptables", &open)?;
    let strict = format!("http://{}:8080/", mesh.host("api-1").address());
    let refused = || mesh.curl("web", "stray", &["--max-time", "3", &strict]).is_ok_and(|answer| !answer.success());
    until(DEADLINE, "the strict port to be closed", refused)?;
    ask(&mesh)?;
    Ok(())
}
