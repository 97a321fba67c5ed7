//! Names of the mesh on hosts with systemd-resolved and without, for programs that just look them up.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::machine::{Machine, MachineMesh, units};
use meshd_tests::plan::Plan;
use meshd_tests::process::{Process, Program};
use meshd_tests::wait::until;

use crate::DEADLINE;

const MESH: &str = "payments.shop.mesh";
const KUBERNETES: &str = "payments.shop.svc.cluster.local";
const OUTSIDE: &str = "www.example.org";
const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const LINK: &str = "/sys/class/net/meshd-dns";
/// What runs into it waits for a server that is silent: less than glibc and resolved wait for one.
const SWALLOWED: &str = "4";
const GETENT_FOUND_NOTHING: i32 = 2;

/// A mesh whose web was not started yet, and the server that answers for the world outside.
fn prepare() -> Result<(MachineMesh, Process)> {
    let (mesh, server) = prepare_as_its_own_user()?;
    mesh.daemon("web").run_as_root()?;
    Ok((mesh, server))
}

fn prepare_as_its_own_user() -> Result<(MachineMesh, Process)> {
    let mesh = MachineMesh::prepare(Plan::shop_with_one_server(), &backend::chosen())?;
    let host = mesh.administrator();
    let (listen, name) = (format!("{}:53", host.address()), format!("{OUTSIDE}={OUTSIDE_ADDRESS}"));
    let server = host.start_testkit(&host.testkit(&["dns", "--listen", &listen, "--name", &name]))?;
    Ok((mesh, server))
}

fn integrate(mesh: &MachineMesh, how: &str) -> Result<()> {
    let config = "/etc/meshd/meshd.toml";
    let web = mesh.machine("web");
    web.write(config, &format!("{}\n[dns]\nintegration = \"{how}\"\n", web.read(config)?))
}

/// The host's own file names a server that knows nothing of the mesh.
fn use_resolv_conf(mesh: &MachineMesh) -> Result<String> {
    let hosts = format!("nameserver {}\n", mesh.administrator().address());
    mesh.machine("web").write(RESOLV_CONF, &hosts)?;
    Ok(hosts)
}

fn reboot(mesh: &mut MachineMesh) -> Result<()> {
    mesh.machine_mut("web").reboot()?;
    mesh.daemon("web").wait_ready()
}

fn use_resolved(mesh: &MachineMesh) -> Result<()> {
    let (web, server) = (mesh.machine("web"), mesh.administrator().address());
    web.write("/etc/systemd/resolved.conf.d/server.conf", &format!("[Resolve]\nDNS={server}\nDNSSEC=no\n"))?;
    web.systemctl(&["unmask", "systemd-resolved.service"])?;
    web.systemctl(&["start", "systemd-resolved.service"])?;
    web.command("ln", &["-sf", "/run/systemd/resolve/stub-resolv.conf", "/etc/resolv.conf"]).map(drop)
}

/// What a program that nobody enrolled finds, or nothing if there is nothing; waiting in vain is an error.
fn look_up(machine: &Machine, name: &str) -> Result<Option<Ipv4Addr>> {
    let done = machine.run(&Program::new("timeout").args([SWALLOWED, "getent", "ahostsv4", name]))?;
    if done.status.code() == Some(GETENT_FOUND_NOTHING) {
        return Ok(None);
    }
    let found = done.expect_success(&format!("looking up {name}"))?;
    first_address(&found).map(Some)
}

fn first_address(found: &str) -> Result<Ipv4Addr> {
    found.split_whitespace().next().and_then(|word| word.parse().ok()).with_context(|| format!("no address: {found}"))
}

fn all_resolve(machine: &Machine) -> Result<bool> {
    let (mesh, kubernetes) = (look_up(machine, MESH)?, look_up(machine, KUBERNETES)?);
    let virtual_ip = mesh.is_some_and(|address| address.octets()[..2] == [240, 240]);
    Ok(virtual_ip && kubernetes == mesh && look_up(machine, OUTSIDE)? == Some(OUTSIDE_ADDRESS))
}

fn wait_for_names(mesh: &MachineMesh, when: &str) -> Result<()> {
    let web = mesh.machine("web");
    until(DEADLINE, &format!("every name {when}"), || all_resolve(web).unwrap_or(false)).with_context(|| {
        let status = web.command("resolvectl", &["status", "--no-pager"]).unwrap_or_default();
        format!("{:?}\n{status}\n{}", all_resolve(web), mesh.daemon("web").log())
    })
}

#[test]
fn with_resolved_every_program_has_names_whatever_happens_to_resolved_and_meshd() -> Result<()> {
    let (mesh, _server) = prepare()?;
    use_resolved(&mesh)?;
    let web = mesh.machine("web");
    ensure!(look_up(web, OUTSIDE)? == Some(OUTSIDE_ADDRESS), "resolved does not work by itself");
    mesh.start_daemons()?;
    wait_for_names(&mesh, "when meshd has started")?;
    ensure!(!web.path("/etc/systemd/system/checkout.service.d")?.exists(), "units were touched as well");

    web.systemctl(&["restart", "systemd-resolved.service"])?;
    wait_for_names(&mesh, "after resolved was restarted")?;
    web.command("resolvectl", &["revert", "meshd-dns"])?;
    wait_for_names(&mesh, "after somebody took them from the link")?;
    web.command("ip", &["link", "delete", "meshd-dns"])?;
    wait_for_names(&mesh, "after somebody took the link away")?;

    mesh.daemon("web").stop()?;
    ensure!(look_up(web, MESH)?.is_none(), "a name of the mesh without meshd");
    ensure!(look_up(web, OUTSIDE)? == Some(OUTSIDE_ADDRESS), "nothing but meshd stopped");
    mesh.daemon("web").start()?;
    wait_for_names(&mesh, "when meshd runs again")?;
    mesh.daemon("web").run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    ensure!(!web.path(LINK)?.exists(), "the link is left");
    ensure!(look_up(web, MESH)?.is_none(), "names are left");
    ensure!(look_up(web, OUTSIDE)? == Some(OUTSIDE_ADDRESS), "reverted too much");
    Ok(())
}

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Beside the original while meshd is named there.
const SAVED: &str = "/etc/resolv.conf.meshd-saved";
const POLKIT_RULE: &str = "/etc/polkit-1/rules.d/50-meshd.rules";

const ANSWERS: &str = "/run/answers";
const DROP_IN: &str = "/etc/systemd/system/shopper.service.d/50-meshd-dns.conf";

/// Looks up both names when it starts, and stays.
fn shopper() -> String {
    let look_up = |name: &str| format!("getent ahostsv4 {name} || echo none {name}");
    let command = format!("/bin/sh -c '{}; {}'", look_up(MESH), look_up(OUTSIDE));
    let settings = ["RemainAfterExit=yes", &format!("StandardOutput=truncate:{ANSWERS}")];
    units::service(&command, &settings).replace("Type=exec", "Type=oneshot")
}

/// Whether the unit, started now, finds the service; everything else it must find.
fn finds_payments(web: &Machine) -> Result<bool> {
    web.systemctl(&["restart", "shopper.service"])?;
    let answers = web.read(ANSWERS)?;
    ensure!(answers.contains(&OUTSIDE_ADDRESS.to_string()), "not even the world outside: {answers}");
    Ok(!answers.contains(&format!("none {MESH}")))
}

#[test]
fn without_resolved_an_enrolled_unit_has_names_from_its_next_start_and_the_hosts_file_stays() -> Result<()> {
    let (mesh, _server) = prepare()?;
    let (web, daemon) = (mesh.machine("web"), mesh.daemon("web"));
    let hosts = use_resolv_conf(&mesh)?;
    web.install_unit("shopper.service", &shopper())?;
    mesh.start_daemons()?;
    ensure!(!finds_payments(web)?, "found before it was enrolled");

    daemon.run(&["enrol", "shopper.service", "--as", "ns/shop/sa/checkout"])?.expect_success("meshd enrol")?;
    let there = || web.path(DROP_IN).is_ok_and(|path| path.exists());
    until(DEADLINE, "the drop-in", there).with_context(|| daemon.log())?;
    until(DEADLINE, "the name in the unit", || finds_payments(web).unwrap_or(false)).with_context(|| daemon.log())?;
    ensure!(look_up(web, MESH)?.is_none(), "everybody has the names");
    ensure!(web.read(RESOLV_CONF)? == hosts, "the host's own file was changed");
    ensure!(!web.path(LINK)?.exists(), "resolved was looked for, too");

    daemon.run(&["unenrol", "shopper.service"])?.expect_success("meshd unenrol")?;
    until(DEADLINE, "the drop-in's removal", || !there()).with_context(|| daemon.log())?;
    until(DEADLINE, "the unit without the name", || finds_payments(web).is_ok_and(|found| !found))?;
    ensure!(web.path("/etc/systemd/system/checkout.service.d")?.exists(), "others lost theirs");
    daemon.run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    ensure!(!web.path("/etc/systemd/system/checkout.service.d")?.exists(), "drop-ins are left");
    Ok(())
}

#[test]
fn with_units_an_enrolled_unit_has_names_again_after_a_reboot() -> Result<()> {
    let (mut mesh, _server) = prepare()?;
    use_resolv_conf(&mesh)?;
    integrate(&mesh, "units")?;
    mesh.machine("web").install_unit("shopper.service", &shopper())?;
    mesh.start_daemons()?;
    let enrol = ["enrol", "shopper.service", "--as", "ns/shop/sa/checkout"];
    mesh.daemon("web").run(&enrol)?.expect_success("meshd enrol")?;
    let finds = |mesh: &MachineMesh| finds_payments(mesh.machine("web")).unwrap_or(false);
    until(DEADLINE, "the name in the unit", || finds(&mesh)).with_context(|| mesh.daemon("web").log())?;

    reboot(&mut mesh)?;
    ensure!(mesh.machine("web").path(DROP_IN)?.exists(), "the drop-in did not outlive the reboot");
    ensure!(finds_payments(mesh.machine("web"))?, "the unit has no names after the reboot");
    Ok(())
}

#[test]
fn with_host_every_program_has_names_also_after_a_reboot_until_a_revert() -> Result<()> {
    let (mut mesh, _server) = prepare()?;
    let hosts = use_resolv_conf(&mesh)?;
    integrate(&mesh, "host")?;
    mesh.start_daemons()?;
    wait_for_names(&mesh, "when meshd has started")?;
    reboot(&mut mesh)?;
    wait_for_names(&mesh, "after a reboot")?;
    let web = mesh.machine("web");
    ensure!(web.read(SAVED)? == hosts, "the original is not kept");

    mesh.daemon("web").kill()?;
    wait_for_names(&mesh, "when a killed meshd is back")?;
    mesh.daemon("web").stop()?;
    ensure!(web.read(RESOLV_CONF)? == hosts, "a stop did not put the original back");
    mesh.daemon("web").start()?;
    wait_for_names(&mesh, "when meshd runs again")?;
    mesh.daemon("web").run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    ensure!(web.read(RESOLV_CONF)? == hosts && !web.path(SAVED)?.exists(), "a revert did not put the original back");
    Ok(())
}

/// The rule operators are told to install.
fn documented_rule() -> Result<&'static str> {
    let docs = include_str!("../../docs/dns.md");
    let (_, rest) = docs.split_once("```js\n").context("docs/dns.md has no polkit rule")?;
    Ok(rest.split_once("```").context("the polkit rule does not end")?.0)
}

#[test]
fn with_resolved_a_meshd_that_is_not_root_needs_the_documented_polkit_rule() -> Result<()> {
    let (mesh, _server) = prepare_as_its_own_user()?;
    use_resolved(&mesh)?;
    let (web, daemon) = (mesh.machine("web"), mesh.daemon("web"));
    mesh.start_daemons()?;
    let told = || daemon.log().contains("names of the mesh may not resolve on this host");
    until(DEADLINE, "the refusal in the log", told).with_context(|| daemon.log())?;
    ensure!(look_up(web, MESH)?.is_none(), "a name of the mesh without leave");
    ensure!(look_up(web, OUTSIDE)? == Some(OUTSIDE_ADDRESS), "the refusal cost the world outside");
    web.write(POLKIT_RULE, documented_rule()?)?;
    wait_for_names(&mesh, "when polkit gives leave")
}
