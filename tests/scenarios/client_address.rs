//! What applications learn about who calls them.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::host::Host;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, App, HostPlan, Plan, Serve, ServicePlan, Workload};
use meshd_tests::process::{Process, Program};
use meshd_tests::wait::until;

use crate::DEADLINE;

/// Of `Wanted::answer_mark`, as every tool prints it.
const ANSWER_MARK: &str = "4c0000";
const PLAIN: u16 = 80;
const LOOPBACK: u16 = 81;
const HOST_ADDRESS: u16 = 82;
const OTHER_FAMILY: u16 = 83;
const ANNOUNCED: u16 = 84;
const HAPROXY: u16 = 85;

/// checkout on web calls payments on api-1, whose ports differ in what the application is told.
fn plan() -> Plan {
    let serve_as = |service, port, deliver: &str, client_address| Serve {
        client_address,
        ..Serve::new(service, port, deliver, false)
    };
    let serve = |port, deliver: &str, client_address| serve_as("payments.shop", port, deliver, client_address);
    let strict = |serve: Serve| Serve { strict: true, ..serve };
    let payments = Workload {
        app: Some(App::WhoCalls { listen: "[::]:8080", proxy_header: false }),
        serve: vec![
            strict(serve(PLAIN, "127.0.0.1:8080", "none")),
            strict(serve(LOOPBACK, "127.0.0.1:8080", "transparent")),
            strict(serve(HOST_ADDRESS, "10.87.0.13:8080", "transparent")),
            strict(serve(OTHER_FAMILY, "[::1]:8080", "transparent")),
            strict(serve(HAPROXY, "127.0.0.1:8085", "proxy-v2")),
        ],
        ..Workload::client("payments", 2001)
    };
    let announced = Workload {
        app: Some(App::WhoCalls { listen: "127.0.0.1:8084", proxy_header: true }),
        serve: vec![strict(serve_as("announced.shop", ANNOUNCED, "127.0.0.1:8084", "proxy-v2"))],
        ..Workload::client("announced", 2002)
    };
    let ports = vec![PLAIN, LOOPBACK, HOST_ADDRESS, OTHER_FAMILY, HAPROXY];
    let on_api_1 = |service| ServicePlan { hosts: vec!["api-1".to_owned()], ..service };
    let announced_service = ServicePlan { ports: vec![ANNOUNCED], ..ServicePlan::new("announced", ANNOUNCED) };
    let mut plan = Plan::shop_with_one_server();
    plan.hosts[1] = HostPlan { name: "api-1".to_owned(), workloads: vec![payments, announced] };
    plan.services =
        vec![on_api_1(ServicePlan { ports, ..ServicePlan::new("payments", PLAIN) }), on_api_1(announced_service)];
    plan
}

fn ask(mesh: &Mesh, service: &str, port: u16) -> Result<String> {
    let url = format!("http://{service}.shop.mesh:{port}/");
    mesh.curl("web", "checkout", &["--fail", &url])?.expect_success(&url)
}

#[test]
fn an_application_sees_the_callers_host_when_it_asks_to() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    let web = mesh.host("web").address();
    for (port, expected) in [
        (PLAIN, "from 127.0.0.1\n".to_owned()),
        (LOOPBACK, format!("from {web}\n")),
        (HOST_ADDRESS, format!("from {web}\n")),
    ] {
        let seen = ask(&mesh, "payments", port)?;
        ensure!(seen == expected, "port {port} sees {seen:?}, not {expected:?}");
    }
    Ok(())
}

#[test]
fn the_callers_of_a_transparent_delivery_may_be_ipv6() -> Result<()> {
    let plan = plan();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let payments = plan.services[0].clone();
    let mut mesh = Mesh::prepare(lab, plan)?;
    let server = mesh.host("api-1").address6().to_string();
    let api = mesh.daemon("api-1");
    let both = "mesh_listen = [\"0.0.0.0:15008\", \"[::]:15008\"]\nthreads =";
    fs::write(api.config(), fs::read_to_string(api.config())?.replace("threads =", both))?;
    let enrolment = fs::read_to_string(api.etc("enrol.d/harness.toml"))?;
    api.enrol(&enrolment.replace("10.87.0.13:8080", &format!("[{server}]:8080")))?;
    mesh.daemon("web").resource("payments.yaml", &plan::document(&payments, &[server]))?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    let web = mesh.host("web").address6();
    for port in [OTHER_FAMILY, HOST_ADDRESS] {
        let seen = ask(&mesh, "payments", port)?;
        ensure!(seen == format!("from {web}\n"), "port {port} sees {seen:?}");
    }
    Ok(())
}

#[test]
fn a_caller_of_another_family_is_delivered_and_counted_as_hidden() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    let seen = ask(&mesh, "payments", OTHER_FAMILY)?;
    ensure!(seen == "from ::1\n", "sees {seen:?}");
    let api = mesh.daemon("api-1");
    ensure!(api.metrics()?.sum("meshd_hidden_callers_total", &[]) >= 1.0, "not counted");
    ensure!(api.log().contains("client_address"), "not told: {}", api.log());
    Ok(())
}

#[test]
fn an_address_of_the_host_is_still_reached_directly() -> Result<()> {
    let mut plan = plan();
    for serve in plan.hosts.iter_mut().flat_map(|host| &mut host.workloads).flat_map(|workload| &mut workload.serve) {
        serve.strict = false;
    }
    let mesh = Mesh::start(plan)?;
    let web = mesh.host("web").address();
    let direct = format!("http://{}:8080/", mesh.host("api-1").address());
    for caller in ["checkout", "stray"] {
        let seen = mesh.curl("web", caller, &["--fail", "--max-time", "5", &direct])?.expect_success(&direct)?;
        ensure!(seen == format!("from {web}\n"), "{caller} is seen as {seen:?}");
    }
    ask(&mesh, "payments", HOST_ADDRESS)?;
    Ok(())
}

#[test]
fn a_proxy_header_tells_address_and_spiffe_id() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    let seen = ask(&mesh, "announced", ANNOUNCED)?;
    let (web, checkout) = (mesh.host("web").address(), mesh.spiffe_id("checkout"));
    let expected = format!("from 127.0.0.1 for {web} to 127.0.0.1:8084 as {checkout}\n");
    ensure!(seen == expected, "sees {seen:?}, not {expected:?}");
    Ok(())
}

#[test]
fn haproxy_understands_the_header() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    let _haproxy = start_haproxy(&mesh.host("api-1"))?;
    let seen = ask(&mesh, "payments", HAPROXY)?;
    let expected = format!("{} for 127.0.0.1:8085\n", mesh.host("web").address());
    ensure!(seen == expected, "haproxy sees {seen:?}, not {expected:?}");
    Ok(())
}

fn start_haproxy(host: &Host) -> Result<Process> {
    let config = host.directory().join("haproxy.cfg");
    let text = "defaults\n  mode http\n  timeout client 10s\n  timeout connect 10s\n  timeout server 10s\n\
                frontend who\n  bind 127.0.0.1:8085 accept-proxy\n  \
                http-request return status 200 content-type text/plain lf-string \"%[src] for %[dst]:%[dst_port]\\n\"\n";
    fs::write(&config, text)?;
    let program = Program::new("haproxy").args(["-db", "-f"]).arg(&config).unit("payments.service");
    let mut process = host.spawn(&program)?;
    // Its port is strict: trying to connect would tell nothing.
    let listens = || host.command("ss", &["-Hltn", "sport = :8085"]).is_ok_and(|found| !found.trim().is_empty());
    until(DEADLINE, "haproxy to listen", || listens() || !process.is_running())?;
    ensure!(process.is_running(), "haproxy ended: {}", process.output());
    Ok(process)
}

#[test]
fn nothing_of_it_is_left_when_it_is_not_wanted_any_more() -> Result<()> {
    let mesh = Mesh::start(plan())?;
    let api = mesh.daemon("api-1");
    let rules = || -> Result<String> {
        let host = mesh.host("api-1");
        let mut all = host.netfilter()?;
        for family in ["-4", "-6"] {
            all += &host.command("ip", &[family, "rule"])?;
        }
        Ok(all)
    };
    let before = rules()?;
    ensure!(before.contains("lookup 7472") && before.contains(ANSWER_MARK), "nothing to remove:\n{before}");
    let enrolment = fs::read_to_string(api.etc("enrol.d/harness.toml"))?;
    api.enrol(&enrolment.replace("\"transparent\"", "\"none\""))?;
    api.signal(nix::sys::signal::Signal::SIGHUP)?;
    let gone = || rules().is_ok_and(|rules| !rules.contains("7472") && !rules.contains(ANSWER_MARK));
    until(DEADLINE, "the rules to go", gone).with_context(|| rules().unwrap_or_default())?;
    let seen = ask(&mesh, "payments", LOOPBACK)?;
    ensure!(seen == "from 127.0.0.1\n", "sees {seen:?}");
    Ok(())
}
