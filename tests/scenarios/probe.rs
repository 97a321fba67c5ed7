//! `meshd probe`: a name as an enrolled unit sees it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use meshd_tests::host::Host;
use meshd_tests::mesh::{Mesh, STRAY_UID};
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Process, Program};

use crate::PAYMENTS;
use crate::enrol::{enrolled, enrolled_but_not_permitted, fresh, shop_without};

/// Exit codes of the error list (docs/enrolment.md).
const UNENROLLED: i32 = 10;
const NO_SERVICE: i32 = 12;
const CONNECT_REFUSED: i32 = 14;

/// Something that runs in the unit, without which it has no cgroup.
fn occupy(host: &Host, unit: &str) -> Result<Process> {
    host.start_testkit(&host.testkit(&["echo-http", "--listen", "127.0.0.1:7100", "--name", unit]).unit(unit))
}

fn probe(mesh: &Mesh, caller: &str, url: &str) -> Result<Finished> {
    mesh.daemon("web").run(&["probe", "--as", caller, url])
}

fn ensure_says(finished: &Finished, exit: i32, facts: &[&str]) -> Result<()> {
    let said = format!("{}{}", finished.stdout, finished.stderr);
    ensure!(finished.exit_code() == Some(exit), "exit code {:?}:\n{said}", finished.exit_code());
    for fact in facts {
        ensure!(said.contains(fact), "missing `{fact}` in:\n{said}");
    }
    Ok(())
}

/// The cgroup of the unit a program runs in.
fn cgroup_of(program: &Process) -> Result<PathBuf> {
    let cgroup = fs::read_to_string(format!("/proc/{}/cgroup", program.pid()))?;
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup2")?;
    let mut mounts = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].into_iter().map(|mount| Path::new(mount).join(path));
    mounts.find(|directory| directory.join("cgroup.procs").exists()).context("no such cgroup")
}

fn processes_of(program: &Process) -> Result<Vec<String>> {
    Ok(fs::read_to_string(cgroup_of(program)?.join("cgroup.procs"))?.lines().map(str::to_owned).collect())
}

#[test]
fn a_probe_gets_what_the_unit_would_get_and_tells_each_step() -> Result<()> {
    let mesh = shop_without("web")?;
    let unit = format!("{}.service", fresh("shopper"));
    let running = occupy(&mesh.host("web"), &unit)?;
    enrolled(&mesh, "web", &[&unit, "--as", "ns/shop/sa/checkout"])?;
    let id = mesh.spiffe_id("checkout");
    let http = probe(&mesh, &unit, PAYMENTS)?;
    ensure_says(&http, 0, &[&id, "90-cli.toml", "payments.shop, 1 endpoints", "200 OK", "payments on api-1"])?;
    ensure_says(&http, 0, &["outcome   ok", &mesh.spiffe_id("payments")])?;
    let tcp = probe(&mesh, &unit, "tcp://smtp.shop.mesh:25")?;
    ensure_says(&tcp, 0, &["220 smtp on api-1 ready", "first byte after"])?;

    let server = mesh.daemon("api-1").access_log();
    ensure!(server.iter().filter(|event| event.client_id.as_deref() == Some(&id)).count() == 2, "{server:?}");
    ensure!(processes_of(&running)? == [running.pid().to_string()], "a probe stayed in the unit");
    let log = mesh.daemon("web").log();
    let audited = log.lines().any(|line| line.contains("audit") && line.contains(&unit) && line.contains(PAYMENTS));
    ensure!(audited, "no audit line in:\n{log}");
    Ok(())
}

#[test]
fn a_refused_probe_exits_with_the_reason_and_says_what_to_do() -> Result<()> {
    let mesh = shop_without("web")?;
    let unit = format!("{}.service", fresh("stranger"));
    let running = occupy(&mesh.host("web"), &unit)?;
    let not_enrolled = probe(&mesh, &unit, PAYMENTS)?;
    ensure_says(&not_enrolled, UNENROLLED, &["not enrolled", &format!("meshd enrol {unit} --as")])?;
    enrolled_but_not_permitted(&mesh, "web", &[&unit, "--as", "ns/shop/sa/stranger"])?;
    let not_permitted = probe(&mesh, &unit, PAYMENTS)?;
    ensure_says(&not_permitted, UNENROLLED, &["no certificate", "meshd-pki entry add --host web ns/shop/sa/stranger"])?;
    ensure_says(&probe(&mesh, &unit, "http://nothing.shop.mesh/")?, NO_SERVICE, &["knows no nothing.shop.mesh"])?;
    ensure_says(&probe(&mesh, &unit, "tcp://payments.shop.mesh:99")?, NO_SERVICE, &[])?;
    ensure!(processes_of(&running)? == [running.pid().to_string()], "a probe stayed in the unit");
    Ok(())
}

#[test]
fn a_probe_tells_that_the_far_side_is_gone() -> Result<()> {
    let mesh = shop_without("web")?;
    let unit = format!("{}.service", fresh("shopper"));
    let _running = occupy(&mesh.host("web"), &unit)?;
    enrolled(&mesh, "web", &[&unit, "--as", "ns/shop/sa/checkout"])?;
    mesh.daemon("api-1").kill()?;
    let gone = probe(&mesh, &unit, PAYMENTS)?;
    ensure_says(&gone, CONNECT_REFUSED, &["outcome   connect_refused", "remedy", "meshd check"])
}

#[test]
fn a_probe_can_be_a_user_and_needs_root_a_daemon_and_a_unit_that_runs() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    enrolled(&mesh, "web", &["--uid", "4711", "--as", "ns/shop/sa/billing"])?;
    let as_user = probe(&mesh, "uid:4711", PAYMENTS)?;
    ensure_says(&as_user, 0, &[&mesh.spiffe_id("billing"), "uid:4711", "200 OK"])?;

    let off = format!("{}.service", fresh("off"));
    ensure_says(&probe(&mesh, &off, PAYMENTS)?, 1, &["does not run", "start it"])?;
    let daemon = mesh.daemon("web");
    let args = ["probe", "--as", "uid:4711", PAYMENTS];
    let meshd = Program::new(mesh.host("web").binary("meshd")).args(args).arg("--config").arg(daemon.config());
    let user = mesh.host("web").run(&meshd.unit("shell.service").uid(STRAY_UID))?;
    ensure_says(&user, 1, &["are you root?"])?;
    daemon.stop()?;
    ensure_says(&probe(&mesh, "uid:4711", PAYMENTS)?, 1, &["does meshd run?"])
}

#[test]
fn a_probe_of_a_frozen_unit_ends_and_says_so() -> Result<()> {
    let mesh = shop_without("web")?;
    let unit = format!("{}.service", fresh("frozen"));
    let running = occupy(&mesh.host("web"), &unit)?;
    enrolled(&mesh, "web", &[&unit, "--as", "ns/shop/sa/checkout"])?;
    let freezer = cgroup_of(&running)?.join("cgroup.freeze");
    fs::write(&freezer, "1")?;
    let frozen = probe(&mesh, &unit, PAYMENTS);
    fs::write(&freezer, "0")?;
    ensure_says(&frozen?, 1, &["said nothing", "is the unit frozen"])?;
    ensure!(processes_of(&running)? == [running.pid().to_string()], "a probe stayed in the unit");
    Ok(())
}
