//! What would come back to the daemon it came from, and what only looks like it.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{self, Plan, ServicePlan, Workload};
use meshd_tests::process::Program;
use meshd_tests::wait::until;

use crate::{DEADLINE, PAYMENTS, ask, ensure_refused, refused};

const CAPTURE: u16 = 15001;
/// Where other meshes capture inbound connections; here nobody listens.
const NO_INBOUND_CAPTURE: u16 = 15006;

#[test]
fn capture_ports_dialled_directly_are_refused() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let web = mesh.host("web");
    ensure!(web.within(|| is_closed(NO_INBOUND_CAPTURE))?, "15006 is open");
    if backend::chosen() == "tun" {
        // It listens at an address of its device.
        ensure!(web.within(|| is_closed(CAPTURE))?, "15001 is open on loopback");
    } else {
        web.within(is_reset)??;
        ensure!(refused(&mesh, "web", "loop")? >= 1.0, "not counted");
    }
    ask(&mesh)?;
    Ok(())
}

fn is_closed(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

fn is_reset() -> Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", CAPTURE)).context("nobody listens for captured connections")?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let answer = stream.read(&mut [0; 64]);
    ensure!(matches!(&answer, Err(error) if error.kind() == ErrorKind::ConnectionReset), "{answer:?}");
    Ok(())
}

#[test]
fn a_service_of_the_same_host_is_reached_with_mutual_tls_all_the_same() -> Result<()> {
    let mut plan = Plan::shop_with_one_server();
    plan.hosts[1].workloads.push(Workload::client("checkout", 2003));
    let mesh = Mesh::start(plan)?;
    let answer = mesh.curl("api-1", "checkout", &["--fail", PAYMENTS])?.expect_success("a neighbour's answer")?;
    ensure!(answer.starts_with("payments on api-1"), "another's answer: {answer}");
    for (direction, own, peer) in [("outbound", "checkout", "server_id"), ("inbound", "payments", "client_id")] {
        let other = if own == "checkout" { "payments" } else { "checkout" };
        let (unit, other) = (format!("{own}.service"), mesh.spiffe_id(other));
        let labels = [("direction", direction), ("tls", "true"), ("unit", unit.as_str()), (peer, other.as_str())];
        let counted =
            || mesh.daemon("api-1").metrics().is_ok_and(|metrics| metrics.sum("tcp_open_total", &labels) >= 1.0);
        until(DEADLINE, &format!("the {direction} half with {other}"), counted)?;
    }
    Ok(())
}

#[test]
fn an_endpoint_that_is_a_virtual_ip_is_refused_as_a_loop() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let service = ServicePlan { hosts: vec![], ..ServicePlan::new("payments", 80) };
    let own = mesh.virtual_address("web", "payments.shop.mesh")?.to_string();
    mesh.daemon("web").resource("payments.yaml", &plan::document(&service, &[own]))?;
    until(DEADLINE, "the loop to be refused", || {
        let answer = mesh.curl("web", "checkout", &["--max-time", "5", PAYMENTS]);
        answer.is_ok_and(|answer| !answer.success()) && refused(&mesh, "web", "loop").is_ok_and(|count| count >= 1.0)
    })?;
    let good = ServicePlan { hosts: vec!["api-1".to_owned()], ..service };
    mesh.daemon("web").resource("payments.yaml", &plan::document(&good, &mesh.endpoints(&good)))?;
    until(DEADLINE, "the right endpoint to be used", || ask(&mesh).is_ok())
}

#[test]
fn a_second_meshd_on_a_host_is_refused_with_the_first_ones_process() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let web = mesh.daemon("web");
    let elsewhere = web.config().with_file_name("second.toml");
    let text = fs::read_to_string(web.config())?;
    fs::write(&elsewhere, text.replace("/meshd/run\"", "/meshd/run-2\""))?;
    let first = format!("process {}", web.pid()?);
    for config in [web.config(), elsewhere] {
        let second = Program::new(web.host().binary("meshd")).args(["run", "--config"]).arg(&config);
        let second = web.host().run(&second.unit("second.service"))?;
        ensure_refused(&second)?;
        for word in [&first, "another meshd", "stop it first"] {
            ensure!(second.stderr.contains(word), "does not say `{word}`: {second:?}");
        }
    }
    ask(&mesh)?;
    Ok(())
}
