//! Who still calls in clear: the kernel counts, `meshd ledger` tells.

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::{Mesh, STRAY_UID};
use meshd_tests::plan::{self, App, Plan, Workload};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{DEADLINE, ask, ensure_refused};

const SMTP: u16 = 2525;

/// smtp is permissive, and listens on every address.
fn plan() -> Plan {
    let mut plan = Plan::shop_with_one_server();
    for workload in smtp(&mut plan) {
        workload.app = Some(App::Greeter { listen: "0.0.0.0:2525" });
    }
    plan
}

fn smtp(plan: &mut Plan) -> impl Iterator<Item = &mut Workload> {
    plan.hosts.iter_mut().flat_map(|host| &mut host.workloads).filter(|workload| workload.name == "smtp")
}

fn call(mesh: &Mesh, host: &str, unit: &str, target: &str) -> Result<()> {
    let talk = mesh.testkit(host, unit, &["talk", "--target", target]);
    mesh.host(host).run(&talk)?.expect_success(&format!("{unit} on {host} calling {target}"))?;
    Ok(())
}

fn call_remotely(mesh: &Mesh) -> Result<()> {
    call(mesh, "web", "stray", &format!("{}:{SMTP}", mesh.host("api-1").address()))
}

/// The row of a port of api-1.
fn row(mesh: &Mesh, port: u16) -> Result<Value> {
    let ledger = mesh.daemon("api-1").json("ledger")?;
    let rows = ledger["ports"].as_array().context("no ports in the ledger")?;
    rows.iter().find(|row| row["port"] == port).cloned().with_context(|| format!("no port {port} in {ledger}"))
}

fn calls(mesh: &Mesh) -> Result<u64> {
    row(mesh, SMTP)?["plaintext_connections"].as_u64().context("no count")
}

#[test]
fn plaintext_callers_of_a_permissive_port_are_in_the_ledger_and_meshed_ones_are_not() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    call(&mesh, "web", "checkout", "smtp.shop.mesh:25")?;
    ask(&mesh)?;
    ensure!(calls(&mesh)? == 0, "a meshed call is in the ledger: {}", row(&mesh, SMTP)?);

    let server = mesh.host("api-1");
    call_remotely(&mesh)?;
    call_remotely(&mesh)?;
    call(&mesh, "web", "stray", &format!("[{}]:{SMTP}", server.address6())).unwrap_err();
    call(&mesh, "api-1", "stray", "127.0.0.1:2525")?;
    call(&mesh, "web", "checkout", "smtp.shop.mesh:25")?;

    let smtp = row(&mesh, SMTP)?;
    let count = |key: &str, value: Value| {
        let callers = smtp["callers"].as_array().into_iter().flatten();
        let connections =
            callers.filter(|caller| caller[key] == value).filter_map(|caller| caller["connections"].as_u64());
        connections.sum::<u64>()
    };
    ensure!(smtp["services"][0] == "smtp.shop" && smtp["unit"] == "smtp.service", "{smtp}");
    ensure!(count("address", mesh.host("web").address().to_string().into()) == 2, "{smtp}");
    // Nothing listens there: an attempt is a caller that strict would hurt.
    ensure!(count("address", mesh.host("web").address6().to_string().into()) == 1, "{smtp}");
    ensure!(count("uid", STRAY_UID.into()) == 1, "{smtp}");
    ensure!(smtp["plaintext_connections"] == 4, "{smtp}");
    let labels = [("port", "2525"), ("service", "smtp.shop")];
    let counted = mesh.daemon("api-1").metrics()?.sum("meshd_plaintext_connections_total", &labels);
    ensure!((counted - 4.0).abs() < 0.5, "the metric says {counted}");
    let table = mesh.daemon("api-1").run(&["ledger"])?.expect_success("meshd ledger")?;
    ensure!(table.contains(&format!("local uid {STRAY_UID}")), "{table}");
    Ok(())
}

#[test]
fn refused_callers_of_a_strict_port_are_counted() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    ask(&mesh)?;
    ensure!(row(&mesh, 8080)?["refused"] == 0, "the mesh was refused");
    let own = format!("http://{}:8080/", mesh.host("api-1").address());
    for (host, url) in [("api-1", "http://127.0.0.1:8080/"), ("web", &own)] {
        ensure_refused(&mesh.curl(host, "stray", &["--max-time", "3", url])?)?;
    }
    let payments = row(&mesh, 8080)?;
    ensure!(payments["refused"] == 2 && payments["mode"] == "strict", "{payments}");
    let counted = mesh.daemon("api-1").metrics()?.sum("meshd_strict_refused_total", &[("port", "8080")]);
    ensure!((counted - 2.0).abs() < 0.5, "the metric says {counted}");
    Ok(())
}

#[test]
fn the_ledger_survives_reload_and_crash_and_knows_who_called_meanwhile() -> Result<()> {
    let mut plan = plan();
    let mesh = Mesh::start(plan.clone())?;
    let daemon = mesh.daemon("api-1");
    call_remotely(&mesh)?;
    // Another rule of the same table: it is replaced as a whole, and counts from zero.
    for workload in
        plan.hosts.iter_mut().flat_map(|host| &mut host.workloads).filter(|workload| workload.name == "payments")
    {
        workload.serve[0].local_ok = vec![4711];
    }
    let api = plan.hosts.iter().find(|host| host.name == "api-1").context("no api-1")?;
    daemon.enrol(&plan::enrolment(&api.workloads, mesh.lab().has_units()))?;
    daemon.signal(Signal::SIGHUP)?;
    until(DEADLINE, "the reload", || daemon.log().contains("enrolment reloaded"))?;
    let rules = mesh.host("api-1").netfilter()?;
    ensure!(rules.contains("4711"), "the rules were not replaced:\n{rules}");
    call_remotely(&mesh)?;
    ensure!(calls(&mesh)? == 2, "after a reload: {}", row(&mesh, SMTP)?);

    daemon.kill()?;
    call_remotely(&mesh)?;
    daemon.start()?;
    ensure!(calls(&mesh)? == 3, "after a crash: {}", row(&mesh, SMTP)?);
    daemon.restart()?;
    call_remotely(&mesh)?;
    ensure!(calls(&mesh)? == 4, "after a restart: {}", row(&mesh, SMTP)?);
    Ok(())
}

#[test]
fn a_port_is_ready_to_be_strict_when_nobody_called_it_for_long_enough() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    let ready = |args: &[&str]| Ok::<_, anyhow::Error>(mesh.daemon("api-1").run(args)?.exit_code());
    call_remotely(&mesh)?;
    ensure!(ready(&["ledger", "--clean-for", "7d"])? == Some(1), "a port that was just called is clean");
    ensure!(ready(&["ledger", "--clean-for", "7d", "--port", "8080"])? == Some(0), "a strict port is not clean");
    ensure!(ready(&["ledger", "--clean-for", "0s"])? == Some(0), "nothing is clean for no time");
    let unknown = mesh.daemon("api-1").run(&["ledger", "--port", "22"])?;
    ensure!(!unknown.success() && unknown.stderr.contains("no service is delivered to port 22"), "{unknown:?}");
    Ok(())
}
