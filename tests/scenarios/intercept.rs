//! Plans: shown, applied, confirmed, taken back when nobody confirms, reverted.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan};
use meshd_tests::wait::until;
use nix::sys::signal::Signal;

use crate::crash::kernel_state;
use crate::{DEADLINE, ask, ensure_refused};

/// The shop before anything is strict: whoever can reach payments' port may call it.
fn open_shop() -> Plan {
    let mut plan = Plan::shop_with_one_server();
    for workload in plan.hosts.iter_mut().flat_map(|host| &mut host.workloads) {
        workload.serve.iter_mut().for_each(|serve| serve.strict = false);
    }
    plan
}

/// api-1 as Plan::shop has it: payments' port is strict, which locks the operators of these tests out.
fn strict_enrolment(mesh: &Mesh) -> String {
    let plan = Plan::shop_with_one_server();
    let host = plan.hosts.iter().find(|host| host.name == "api-1");
    plan::enrolment(host.map_or(&[], |host| &host.workloads), mesh.lab().has_units())
}

/// How an operator gets in: a port of api-1, from another host.
fn gets_in(mesh: &Mesh) -> bool {
    let url = format!("http://{}:8080/", mesh.host("api-1").address());
    mesh.curl("web", "stray", &["--fail", "--max-time", "3", &url]).is_ok_and(|answer| answer.success())
}

fn locked_out(mesh: &Mesh) -> Result<()> {
    ensure!(!gets_in(mesh), "nobody is locked out, so nothing is shown");
    Ok(())
}

/// The processes that wait for a confirmation on behalf of a host.
fn timers(config: &Path) -> usize {
    let is_one = |words: &str| words.contains("--unless-confirmed") && words.contains(&config.display().to_string());
    let Ok(processes) = fs::read_dir("/proc") else { return 0 };
    let commands = processes.flatten().filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    commands.filter(|words| is_one(&String::from_utf8_lossy(words))).count()
}

#[test]
fn a_plan_nobody_confirms_gives_way_to_the_last_confirmed_one() -> Result<()> {
    let mesh = Mesh::start(open_shop())?;
    let api = mesh.daemon("api-1");
    api.run(&["intercept", "confirm"])?.expect_success("confirming the open plan")?;
    api.enrol(&strict_enrolment(&mesh))?;
    let said = api.run(&["intercept", "apply", "--confirm-within", "2s"])?.expect_success("applying")?;
    ensure!(said.contains("meshd intercept confirm"), "does not say how to confirm: {said}");
    locked_out(&mesh)?;
    until(DEADLINE, "callers to get in again", || gets_in(&mesh))?;
    ask(&mesh)?;

    let status = api.json("intercept status")?;
    ensure!(status["held"]["hash"] == status["plan"] && status["timer"].is_null(), "not held: {status}");
    let held = || api.metrics().is_ok_and(|metrics| metrics.sum("meshd_capture_held", &[]) == 1.0);
    until(DEADLINE, "the daemon to know", held)?;
    api.signal(Signal::SIGHUP)?;
    until(DEADLINE, "a reload", || api.log().contains("enrolment reloaded"))?;
    ensure!(gets_in(&mesh), "a reload put the plan back that nobody confirmed");
    api.restart()?;
    ensure!(gets_in(&mesh), "a restart put the plan back that nobody confirmed");
    let check = api.run(&["check"])?;
    ensure!(!check.success() && check.stdout.contains("held back"), "check is content: {}", check.stdout);
    Ok(())
}

#[test]
fn a_plan_is_taken_back_also_when_meshd_is_killed_meanwhile() -> Result<()> {
    let mesh = Mesh::start(open_shop())?;
    let api = mesh.daemon("api-1");
    api.enrol(&strict_enrolment(&mesh))?;
    api.run(&["intercept", "apply", "--confirm-within", "3s"])?.expect_success("applying")?;
    api.kill()?;
    locked_out(&mesh)?;
    until(DEADLINE, "callers to get in again", || gets_in(&mesh))?;
    // Nothing was ever confirmed, so nothing but virtual IPs is in force until somebody decides.
    api.start()?;
    ensure!(gets_in(&mesh), "a restart put the plan back that nobody confirmed");
    ensure!(api.log().contains("held back"), "the daemon does not say so:\n{}", api.log());
    ask(&mesh)?;
    api.run(&["intercept", "apply", "--confirm-within", "60s"])?.expect_success("applying again")?;
    locked_out(&mesh)?;
    api.run(&["intercept", "confirm"])?.expect_success("confirming")?;
    ensure!(api.json("intercept status")?["held"].is_null(), "still held after it was confirmed");
    Ok(())
}

#[test]
fn a_confirmed_plan_stays_and_arms_nothing_the_next_time() -> Result<()> {
    let mesh = Mesh::start(open_shop())?;
    let api = mesh.daemon("api-1");
    api.enrol(&strict_enrolment(&mesh))?;
    api.run(&["intercept", "apply", "--confirm-within", "2s"])?.expect_success("applying")?;
    ensure!(timers(&api.config()) == 1, "no process waits");
    api.run(&["intercept", "confirm"])?.expect_success("confirming")?;
    until(DEADLINE, "the timer's process to end", || timers(&api.config()) == 0)?;
    locked_out(&mesh)?;
    let said = api.run(&["intercept", "apply"])?.expect_success("applying again")?;
    ensure!(said.contains("confirmed before"), "{said}");
    ensure!(timers(&api.config()) == 0 && api.json("intercept status")?["timer"].is_null(), "armed again");
    api.restart()?;
    locked_out(&mesh)?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn an_unconfirmed_plan_falls_also_when_its_timer_was_killed() -> Result<()> {
    let mesh = Mesh::start(open_shop())?;
    let api = mesh.daemon("api-1");
    api.enrol(&strict_enrolment(&mesh))?;
    api.run(&["intercept", "apply", "--confirm-within", "2s"])?.expect_success("applying")?;
    let waits = |process: &fs::DirEntry| {
        let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        words.contains("--unless-confirmed") && words.contains(&api.config().display().to_string())
    };
    let timer = fs::read_dir("/proc")?.flatten().find(waits).context("no process waits")?;
    let pid: i32 = timer.file_name().to_string_lossy().parse()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL)?;
    locked_out(&mesh)?;
    until(DEADLINE, "the daemon to take the plan back", || gets_in(&mesh))?;
    Ok(())
}

#[test]
fn a_plan_that_would_close_ssh_is_refused_everywhere() -> Result<()> {
    let mesh = Mesh::start(open_shop())?;
    let (api, host) = (mesh.daemon("api-1"), mesh.host("api-1"));
    let sshd = host.testkit(&["greeter", "--listen", "0.0.0.0:2222", "--name", "sshd"]).unit("sshd.service");
    let _sshd = host.start_testkit(&sshd)?;
    let good = fs::read_to_string(api.etc("enrol.d/harness.toml"))?;
    let enrolled = |port: u16| {
        format!(
            "[[workload]]\nuid = 4242\nnamespace = \"shop\"\nname = \"payments\"\n  [[workload.serve]]\n  \
             service = \"admin.shop\"\n  port = 80\n  deliver = \"127.0.0.1:{port}\"\n  mode = \"strict\"\n"
        )
    };
    // Found by its unit, which hosts without cgroup2 cannot tell.
    let ports: &[u16] = if mesh.lab().has_units() { &[22, 2222] } else { &[22] };
    for port in ports {
        api.enrol(&enrolled(*port))?;
        for verb in ["plan", "apply"] {
            let answer = api.run(&["intercept", verb])?;
            let expected = format!("port {port} is how operators log in");
            ensure!(!answer.success(), "{verb} went on: {}", answer.stdout);
            for word in ["harness.toml:", "workload.serve.mode", &expected, "permissive"] {
                ensure!(answer.stderr.contains(word), "{verb} does not say `{word}`: {}", answer.stderr);
            }
        }
        ensure!(timers(&api.config()) == 0, "a refused plan armed a timer");
    }
    api.stop()?;
    let answer = api.run(&["run"])?;
    ensure!(!answer.success() && answer.stderr.contains("log in to this host"), "it started: {}", answer.stderr);
    api.enrol(&good)?;
    api.start()?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn a_plan_shows_what_happens_to_open_connections() -> Result<()> {
    let mesh = Mesh::start(open_shop())?;
    let (web, host) = (mesh.host("web"), mesh.host("api-1"));
    let sshd = host.start_testkit(&host.testkit(&["greeter", "--listen", "0.0.0.0:22", "--name", "sshd"]))?;
    let at = |port: u16| SocketAddr::from((host.address(), port));
    let from_web = web.within(|| [8080, 22].map(|port| TcpStream::connect(at(port))))?;
    let on_host = host.within(|| [8080, 2525].map(|port| TcpStream::connect(("127.0.0.1", port))))?;
    let open: Vec<TcpStream> = from_web.into_iter().chain(on_host).collect::<std::io::Result<_>>()?;

    let api = mesh.daemon("api-1");
    api.enrol(&strict_enrolment(&mesh))?;
    let plan = api.json("intercept plan")?;
    let effect = |client: SocketAddr| {
        let flows = plan["flows"].as_array().map_or(&[][..], Vec::as_slice);
        let flow = flows.iter().find(|flow| flow["client"] == client.to_string().as_str());
        flow.map_or(String::new(), |flow| format!("{} {}", flow["effect"], flow["reason"]))
    };
    let expected = ["would_break\" \"port 8080", "excluded\" \"ssh", "would_break\" \"port 8080", "counted"];
    for (connection, expected) in open.iter().zip(expected) {
        let (client, server) = (connection.local_addr()?, connection.peer_addr()?);
        ensure!(effect(client).contains(expected), "{client} -> {server}: {}, not {expected}: {plan}", effect(client));
    }
    ensure!(plan["rules"].as_str().is_some_and(|rules| rules.contains("8080")), "no rules: {plan}");
    ensure!(plan["confirmed"] == false && plan["plan"] != api.json("intercept status")?["plan"], "{plan}");
    let page = api.run(&["intercept", "plan"])?.expect_success("plan as a table")?;
    ensure!(page.contains("WOULD BREAK") && page.contains(&open[0].local_addr()?.to_string()), "{page}");
    ensure!(gets_in(&mesh), "showing a plan put it in force");
    drop((open, sshd));
    Ok(())
}

#[test]
fn a_connection_to_a_virtual_ip_is_shown_as_captured() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let target = format!("{}:80", mesh.virtual_address("web", "payments.shop.mesh")?);
    let held = mesh.testkit("web", "checkout", &["idle", "--target", &target]);
    let held = mesh.host("web").spawn(&held)?;
    let captured = || {
        let plan = mesh.daemon("web").json("intercept plan").unwrap_or_default();
        let flows = plan["flows"].as_array().cloned().unwrap_or_default();
        flows.iter().any(|flow| flow["effect"] == "captured" && flow["server"] == target.as_str())
    };
    until(DEADLINE, &format!("a captured connection to {target}; {}", held.output()), captured)?;
    Ok(())
}

#[test]
fn what_was_reverted_stays_removed_until_it_is_applied() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    let host = mesh.host("web");
    let before = kernel_state(&host)?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    let web = mesh.daemon("web");
    web.run(&["intercept", "revert"])?.expect_success("reverting")?;
    let ensure_nothing = |when: &str| -> Result<()> {
        let now = kernel_state(&host)?;
        ensure!(now == before, "{when} there is:\n{now}\nbefore it was:\n{before}");
        Ok(())
    };
    ensure_nothing("after a revert")?;
    // What would have the daemon heal or apply: a change of routes and rules, and a reload.
    host.command("ip", &["route", "add", "192.0.2.0/24", "dev", "lo"])?;
    host.command("ip", &["route", "del", "192.0.2.0/24", "dev", "lo"])?;
    web.signal(Signal::SIGHUP)?;
    until(DEADLINE, "a reload", || web.log().contains("enrolment reloaded"))?;
    ensure_nothing("after a reload")?;
    ensure!(web.metrics()?.sum("meshd_capture_healed_total", &[]) == 0.0, "it was healed");
    ensure!(web.log().contains("audit"), "a revert is not on record:\n{}", web.log());
    web.run(&["intercept", "apply"])?.expect_success("applying")?;
    ask(&mesh)?;
    web.run(&["intercept", "revert"])?.expect_success("reverting again")?;
    web.restart()?;
    ask(&mesh)?;
    Ok(())
}

#[test]
fn revert_leaves_nothing_after_a_change_of_table_and_range_and_with_a_broken_record() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    let before = kernel_state(&mesh.host("web"))?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    let web = mesh.daemon("web");
    web.kill()?;
    let text = fs::read_to_string(web.config())?;
    let moved = text.replace("[capture]\n", "[capture]\ntable = 7472\nvip4 = \"240.241.0.0/16\"\n");
    fs::write(web.config(), moved)?;
    web.start()?;
    ask(&mesh)?;
    web.kill()?;
    let revert = || -> Result<()> {
        web.run(&["intercept", "revert"])?.expect_success("reverting")?;
        let now = kernel_state(&mesh.host("web"))?;
        ensure!(now == before, "left behind:\n{now}\nbefore it was:\n{before}");
        Ok(())
    };
    revert()?;
    web.start()?;
    web.kill()?;
    fs::write(web.etc("../state/capture/state.json"), "{ broken")?;
    let answer = web.run(&["run"])?;
    ensure!(!answer.success() && answer.stderr.contains("intercept revert"), "no remedy: {}", answer.stderr);
    revert()?;
    web.start()?;
    ask(&mesh)?;
    ensure_refused(&mesh.curl("web", "stray", &[crate::PAYMENTS])?)
}
