//! `meshd enrol` and `unenrol`: by unit, by port, by pattern of scopes; in force at once.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::lab::Lab;
use meshd_tests::load::{self, LoadReport};
use meshd_tests::mesh::{Mesh, STRAY_UID};
use meshd_tests::plan::{Plan, enrolment};
use meshd_tests::process::{Finished, Process, Program};
use meshd_tests::wait::until;

use crate::{DEADLINE, PAYMENTS, ask, ensure_refused};

const CHECKOUT: &str = "ns/shop/sa/checkout";

/// A unit's name that no other lab of this machine has: cgroups are shared by all.
pub(crate) fn fresh(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The shop where the PKI permits everything and nobody on `host` is enrolled yet.
pub(crate) fn shop_without(host: &str) -> Result<Mesh> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    mesh.daemon(host).enrol("")?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    Ok(mesh)
}

pub(crate) fn enrol(mesh: &Mesh, host: &str, args: &[&str]) -> Result<Finished> {
    mesh.daemon(host).run(&[&["enrol"], args].concat())
}

/// What it said, in order and whole.
pub(crate) fn enrolled(mesh: &Mesh, host: &str, args: &[&str]) -> Result<String> {
    enrol(mesh, host, args)?.expect_success(&format!("meshd enrol {args:?}"))
}

/// The same when the PKI refuses the identity, which a playbook tells by the exit code.
pub(crate) fn enrolled_but_not_permitted(mesh: &Mesh, host: &str, args: &[&str]) -> Result<String> {
    let told = enrol(mesh, host, args)?;
    ensure!(told.exit_code() == Some(3), "meshd enrol {args:?}: {told:?}");
    Ok(told.stdout)
}

fn ensure_not_done(finished: &Finished, reason: &str) -> Result<()> {
    ensure!(!finished.success() && finished.stderr.contains(reason), "expected `{reason}`: {finished:?}");
    Ok(())
}

/// A program that listens and answers with the unit's name.
fn listen(mesh: &Mesh, host: &str, unit: &str, address: &str) -> Result<Process> {
    let host = mesh.host(host);
    host.start_testkit(&host.testkit(&["echo-http", "--listen", address, "--name", unit]).unit(unit))
}

fn calls_payments(mesh: &Mesh, name: &str) -> Result<Finished> {
    mesh.curl("web", name, &["--fail", "--max-time", "5", PAYMENTS])
}

fn arrived_as(mesh: &Mesh, name: &str) -> bool {
    let id = mesh.spiffe_id(name);
    mesh.daemon("api-1").access_log().iter().any(|event| event.client_id.as_deref() == Some(&id))
}

#[test]
fn a_running_unit_is_enrolled_and_unenrolled_without_any_restart() -> Result<()> {
    let mesh = shop_without("web")?;
    let name = fresh("shopper");
    let unit = format!("{name}.service");
    let _running = listen(&mesh, "web", &unit, "127.0.0.1:7000")?;
    ensure_refused(&calls_payments(&mesh, &name)?)?;

    let said = enrolled(&mesh, "web", &[&unit, "--as", CHECKOUT])?;
    for fact in [format!("{unit} is {}", mesh.spiffe_id("checkout")), "the PKI has permitted it".to_owned()] {
        ensure!(said.contains(&fact), "missing `{fact}` in:\n{said}");
    }
    calls_payments(&mesh, &name)?.expect_success("the first connection after meshd enrol")?;
    until(DEADLINE, "payments to see checkout", || arrived_as(&mesh, "checkout"))?;

    let open = ["load", "--target", "payments.shop.mesh:80", "--connections", "1", "--rate", "50"];
    let mut open = mesh.host("web").start_testkit(&mesh.testkit("web", &name, &open))?;
    let bytes = || sent_by(&mesh, &unit);
    until(DEADLINE, "the open connection in use", || bytes() > 0.0)?;
    mesh.daemon("web").run(&["unenrol", &unit])?.expect_success("meshd unenrol")?;
    ensure_refused(&calls_payments(&mesh, &name)?)?;
    let before = bytes();
    until(DEADLINE, "the open connection to go on", || bytes() > before)?;
    open.stop()?;
    let report: LoadReport = load::report(&open.finish(DEADLINE)?)?;
    ensure!(report.ok > 0 && report.failed == 0, "the open connection was cut: {report:?}");
    Ok(())
}

fn sent_by(mesh: &Mesh, unit: &str) -> f64 {
    let labels = [("direction", "outbound"), ("peer", "src"), ("unit", unit)];
    mesh.daemon("web").metrics().map_or(0.0, |metrics| metrics.sum("tcp_read_bytes_total", &labels))
}

#[test]
fn an_identity_the_pki_does_not_permit_is_told_with_the_command_that_permits_it() -> Result<()> {
    let mesh = shop_without("web")?;
    let said = enrolled_but_not_permitted(&mesh, "web", &["stranger.service", "--as", "ns/shop/sa/stranger"])?;
    let command = "meshd-pki entry add --host web ns/shop/sa/stranger";
    ensure!(said.contains("the PKI refuses it") && said.contains(command), "{said}");
    Ok(())
}

#[test]
fn enrol_touches_no_other_file_and_changes_nothing_when_it_cannot_hold() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let daemon = mesh.daemon("web");
    let (others, ours) = (daemon.etc("enrol.d/harness.toml"), daemon.etc("enrol.d/90-cli.toml"));
    let before = fs::read_to_string(&others)?;
    let who = before.lines().nth(1).context("no selector")?;
    let who = who.trim_start_matches("unit = ").trim_matches('"');
    let elsewhere = enrol(&mesh, "web", &[who, "--as", CHECKOUT])?;
    ensure_not_done(&elsewhere, "harness.toml:1")?;
    ensure_not_done(&daemon.run(&["unenrol", who])?, "harness.toml:1")?;
    let user =
        Program::new(mesh.host("web").binary("meshd")).args(["enrol", "--list", "--config"]).arg(daemon.config());
    let unreadable = mesh.host("web").run(&user.unit("shell.service").uid(STRAY_UID))?;
    ensure_not_done(&unreadable, "run this as root")?;
    ensure!(!unreadable.stderr.contains("meshd join"), "{unreadable:?}");
    let forged = ["x.service", "--as", CHECKOUT, "--serve", "x.shop:80=127.0.0.1:9", "--client-address", "proxy-v2"];
    ensure_not_done(&enrol(&mesh, "web", &forged)?, "set mode = \"strict\"")?;
    let loops = ["x.service", "--as", CHECKOUT, "--serve", "x.shop:80=127.0.0.1:15008"];
    ensure_not_done(&enrol(&mesh, "web", &loops)?, "meshd's own listeners")?;
    ensure!(!ours.exists(), "something was written");

    enrolled(&mesh, "web", &["x.service", "--as", CHECKOUT])?;
    let kept = fs::read_to_string(&ours)?;
    // Readable for root, not for the daemon: it refuses what we judged to be right.
    let secret = daemon.etc("enrol.d/50-secret.toml");
    fs::write(&secret, "")?;
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600))?;
    ensure_not_done(&enrol(&mesh, "web", &["y.service", "--as", CHECKOUT])?, "the daemon refused")?;
    ensure!(fs::read_to_string(&ours)? == kept, "the old file was not restored");
    ensure!(fs::read_to_string(&others)? == before, "another file was changed");
    fs::remove_file(&secret)?;

    let list = daemon.run(&["enrol", "--list", "-o", "json"])?.expect_success("meshd enrol --list")?;
    let list: serde_json::Value = serde_json::from_str(&list)?;
    let origins: Vec<&str> = list.as_array().into_iter().flatten().filter_map(|row| row["origin"].as_str()).collect();
    ensure!(origins.len() == 3 && origins.iter().any(|origin| origin.ends_with("90-cli.toml:4")), "{origins:?}");
    Ok(())
}

#[test]
fn without_a_daemon_it_takes_effect_at_the_next_start() -> Result<()> {
    let mesh = shop_without("web")?;
    let name = fresh("later");
    mesh.daemon("web").stop()?;
    let said = enrolled(&mesh, "web", &[&format!("{name}.service"), "--as", CHECKOUT])?;
    ensure!(said.contains("no meshd runs on this host"), "{said}");
    mesh.daemon("web").start()?;
    calls_payments(&mesh, &name)?.expect_success("a unit enrolled while meshd was down")?;
    Ok(())
}

#[test]
fn whoever_listens_on_an_enrolled_port_serves_and_calls_as_that_workload() -> Result<()> {
    let mesh = shop_without("web")?;
    let name = fresh("legacy");
    let unit = format!("{name}.service");
    let legacy = listen(&mesh, "web", &unit, "127.0.0.1:7000")?;
    let said = enrolled(&mesh, "web", &["--port", "7000", "--as", CHECKOUT])?;
    ensure!(said.contains(&format!("{unit} listens on 7000")), "{said}");
    calls_payments(&mesh, &name)?.expect_success("the owner of the port")?;
    ensure_refused(&calls_payments(&mesh, "stray")?)?;
    // A unit that restarts is still itself before it listens again, also when a user is quicker.
    drop(legacy);
    calls_payments(&mesh, &name)?.expect_success("the owner of the port while it restarts")?;
    let session = fresh("session");
    let squatter = listen(&mesh, "web", &format!("{session}.scope"), "127.0.0.1:7000")?;
    let curl = Program::new("curl").args(["--silent", "--show-error", "--max-time", "5", PAYMENTS]);
    ensure_refused(&mesh.host("web").run(&curl.unit(&format!("{session}.scope")))?)?;
    drop(squatter);

    // Another unit takes the port over: the identity stays where it is, loudly, also when meshd starts anew.
    let heir = fresh("heir");
    let _heir = listen(&mesh, "web", &format!("{heir}.service"), "127.0.0.1:7000")?;
    let claims = || mesh.daemon("web").metrics().map_or(0.0, |metrics| metrics.sum("meshd_port_claims_total", &[]));
    let refused_and_told = |mesh: &Mesh| -> Result<()> {
        until(DEADLINE, "the heir to be seen", || claims() == 1.0)?;
        ensure_refused(&calls_payments(mesh, &heir)?)?;
        calls_payments(mesh, &name)?.expect_success("the owner of the port while another unit listens there")?;
        let status = mesh.daemon("web").run(&["status"])?.expect_success("meshd status")?;
        let told = format!("{heir}.service listens there now and is not taken for it");
        ensure!(status.contains(&told) && mesh.daemon("web").log().contains(&told), "{status}");
        Ok(())
    };
    refused_and_told(&mesh)?;
    mesh.daemon("web").stop()?;
    mesh.daemon("web").start()?;
    refused_and_told(&mesh)?;
    ensure_not_done(&enrol(&mesh, "web", &["--port", "7000", "--as", CHECKOUT])?, "enrol it again")?;

    // Until an operator says so.
    mesh.daemon("web").run(&["unenrol", "--port", "7000"])?.expect_success("meshd unenrol")?;
    enrolled(&mesh, "web", &["--port", "7000", "--as", CHECKOUT])?;
    calls_payments(&mesh, &heir)?.expect_success("the new owner of the port")?;
    ensure_refused(&calls_payments(&mesh, &name)?)
}

#[test]
fn a_port_is_never_a_login_sessions_nor_two_units_at_once() -> Result<()> {
    let mesh = shop_without("web")?;
    let session = fresh("session");
    let _session = listen(&mesh, "web", &format!("{session}.scope"), "127.0.0.1:7001")?;
    let said = enrolled(&mesh, "web", &["--port", "7001", "--as", CHECKOUT])?;
    ensure!(said.contains("login session"), "{said}");
    let curl = Program::new("curl").args(["--silent", "--show-error", "--max-time", "5", PAYMENTS]);
    ensure_refused(&mesh.host("web").run(&curl.unit(&format!("{session}.scope")))?)?;
    let status = mesh.daemon("web").run(&["status"])?.expect_success("meshd status")?;
    ensure!(status.contains("port:7001") && status.contains("login session"), "{status}");

    let units = [fresh("one"), fresh("two")].map(|name| format!("{name}.service"));
    let _one = listen(&mesh, "web", &units[0], "127.0.0.1:7002")?;
    let _two = listen(&mesh, "web", &units[1], "127.0.0.2:7002")?;
    ensure_not_done(&enrol(&mesh, "web", &["--port", "7002", "--as", CHECKOUT])?, "enrol the units, one each")?;
    enrolled(&mesh, "web", &[&units[0], "--as", CHECKOUT])?;
    drop(_two);
    let taken = enrol(&mesh, "web", &["--port", "7002", "--as", "ns/shop/sa/billing"])?;
    ensure_not_done(&taken, &format!("{} is enrolled already", units[0]))?;
    Ok(())
}

#[test]
fn a_port_serves_itself_and_only_its_owner_may_call_it_in_clear() -> Result<()> {
    let mesh = shop_without("api-1")?;
    let name = fresh("store");
    let unit = format!("{name}.service");
    let host = mesh.host("api-1");
    let store = ["echo-http", "--listen", "0.0.0.0:7003", "--name", "payments on api-1"];
    let _store = host.start_testkit(&host.testkit(&store).unit(&unit))?;
    let mut args = vec!["--port", "7003", "--as", "ns/shop/sa/payments", "--serve", "payments.shop:80"];
    if backend::can_be_strict() {
        args.push("--strict");
    }
    let said = enrolled(&mesh, "api-1", &args)?;
    ensure!(said.contains("serves payments.shop:80 from 127.0.0.1:7003"), "{said}");
    until(DEADLINE, "the workload reachable", || ask(&mesh).is_ok())?;
    let local = |name: &str| mesh.curl("api-1", name, &["--fail", "--max-time", "3", "http://127.0.0.1:7003/"]);
    if backend::can_tell_units() || !backend::can_be_strict() {
        local(&name)?.expect_success("the owner calling its own port")?;
    }
    if !backend::can_be_strict() {
        return Ok(());
    }
    ensure_refused(&local("stray")?)?;
    // Whoever takes the port of a unit that stopped may not even call itself in clear.
    drop(_store);
    let squatter = fresh("squatter");
    let _squatter = host.start_testkit(&host.testkit(&store).unit(&format!("{squatter}.service")))?;
    let claims = || mesh.daemon("api-1").metrics().map_or(0.0, |metrics| metrics.sum("meshd_port_claims_total", &[]));
    until(DEADLINE, "the squatter to be seen", || claims() == 1.0)?;
    ensure_refused(&local(&squatter)?)
}

#[test]
fn scopes_are_enrolled_by_pattern_also_those_that_start_later() -> Result<()> {
    let mesh = shop_without("web")?;
    let kind = fresh("docker");
    enrolled(&mesh, "web", &[&format!("{kind}-3f*.scope"), "--as", CHECKOUT])?;
    let call = |scope: &str| {
        let curl = Program::new("curl").args(["--silent", "--show-error", "--max-time", "5", "--fail", PAYMENTS]);
        mesh.host("web").run(&curl.unit(scope))
    };
    for id in ["3fa9c2", "3fb0"] {
        call(&format!("{kind}-{id}.scope"))?.expect_success("a container of that name")?;
    }
    ensure_refused(&call(&format!("{kind}-40aa.scope"))?)?;
    ensure_refused(&call(&format!("{kind}-3f.service"))?)?;
    // An exact name wins over the pattern.
    enrolled(&mesh, "web", &[&format!("{kind}-3fb0.scope"), "--as", "ns/shop/sa/billing"])?;
    call(&format!("{kind}-3fb0.scope"))?.expect_success("the container enrolled by its own name")?;
    until(DEADLINE, "payments to see both", || arrived_as(&mesh, "checkout") && arrived_as(&mesh, "billing"))
}

#[test]
fn a_strict_port_lets_in_every_scope_of_its_owners_pattern() -> Result<()> {
    let mesh = shop_without("api-1")?;
    let kind = fresh("libpod");
    let pattern = format!("{kind}-*.scope");
    let serve = "payments.shop:80=127.0.0.1:8080";
    enrolled(&mesh, "api-1", &[&pattern, "--as", "ns/shop/sa/payments", "--serve", serve, "--strict"])?;
    let call = |scope: &str| {
        let curl = Program::new("curl").args(["--silent", "--show-error", "--max-time", "3", "http://127.0.0.1:8080/"]);
        mesh.host("api-1").run(&curl.unit(scope))
    };
    // Each scope is let in once its cgroup is known, which is soon after it starts.
    for scope in [format!("{kind}-1.scope"), format!("{kind}-2.scope")] {
        until(DEADLINE, "the scope let in", || call(&scope).is_ok_and(|answer| answer.success()))?;
    }
    ensure_refused(&call("stray.service")?)
}

#[test]
fn the_harness_enrolment_and_the_cli_are_one_enrolment() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let name = fresh("extra");
    enrolled(&mesh, "web", &[&format!("{name}.service"), "--as", "ns/shop/sa/billing"])?;
    calls_payments(&mesh, &name)?.expect_success("enrolled by the command line")?;
    ask(&mesh)?;
    // The same unit in a file read earlier is a conflict the daemon tells, too, with both places.
    let twice = format!(
        "{}\n[[workload]]\nunit = \"{name}.service\"\nnamespace = \"shop\"\nname = \"billing\"\n",
        enrolment(&[], true)
    );
    mesh.daemon("web").enrol(&twice)?;
    let refused = enrol(&mesh, "web", &["other.service", "--as", CHECKOUT])?;
    ensure_not_done(&refused, "is enrolled twice: also at")
}
