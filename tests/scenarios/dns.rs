//! Names of the mesh from meshd, all others from the host's own servers, and nobody's port 53 but its own.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::dns::{NO_ERROR, NO_SUCH_NAME, REFUSED, SERVER_FAILURE};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::Process;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask};

const OURS: &str = "127.0.0.1:53";
const OUTSIDE: &str = "www.example.org";
const OUTSIDE_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
/// A service of the cluster that the mesh does not know.
const CLUSTER: &str = "registry.kube-system.svc.cluster.local";
const CLUSTER_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 8);

/// A mesh, and on api-1 the server that web's resolv.conf names behind meshd.
fn mesh_with_server() -> Result<(Mesh, Process)> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let server = start_server(&mesh)?;
    let resolv_conf = format!("nameserver 127.0.0.1\nnameserver {}\n", mesh.host("api-1").address());
    fs::write(mesh.host("web").directory().join("etc/resolv.conf"), resolv_conf)?;
    // The file is looked at once a second.
    until(DEADLINE, "the server to be asked", || {
        look_up(&mesh, OURS, OUTSIDE, &[]).is_ok_and(|(code, _)| code == NO_ERROR)
    })?;
    Ok((mesh, server))
}

fn start_server(mesh: &Mesh) -> Result<Process> {
    let host = mesh.host("api-1");
    let listen = format!("{}:53", host.address());
    let names = [format!("{OUTSIDE}={OUTSIDE_ADDRESS}"), format!("{CLUSTER}={CLUSTER_ADDRESS}")];
    let args = ["dns", "--listen", &listen, "--name", &names[0], "--name", &names[1]];
    host.start_testkit(&host.testkit(&args).unit("named.service"))
}

/// What checkout on web hears: code and address.
fn look_up(mesh: &Mesh, server: &str, name: &str, more: &[&str]) -> Result<(u8, Option<Ipv4Addr>)> {
    let args = [&["lookup", "--server", server, name], more].concat();
    let answer = mesh.host("web").run(&mesh.testkit("web", "checkout", &args))?.expect_success("lookup")?;
    let mut words = answer.split_whitespace();
    let code = words.next().context("no code")?.parse()?;
    Ok((code, words.next().map(str::parse).transpose()?))
}

fn counted(mesh: &Mesh, outcome: &str) -> Result<f64> {
    Ok(mesh.daemon("web").metrics()?.sum("meshd_dns_queries_total", &[("outcome", outcome)]))
}

#[test]
fn names_of_the_mesh_of_kubernetes_and_of_everybody_are_answered_over_udp_and_tcp() -> Result<()> {
    let (mesh, server) = mesh_with_server()?;
    let forwarded = counted(&mesh, "forwarded")?;
    let payments = mesh.virtual_address("web", "payments.shop.mesh")?;
    for transport in [&[][..], &["--tcp"]] {
        for (name, expected) in [
            ("payments.shop.mesh", (NO_ERROR, Some(payments))),
            ("payments.shop.svc.cluster.local", (NO_ERROR, Some(payments))),
            (OUTSIDE, (NO_ERROR, Some(OUTSIDE_ADDRESS))),
            (CLUSTER, (NO_ERROR, Some(CLUSTER_ADDRESS))),
            ("orders.shop.mesh", (NO_SUCH_NAME, None)),
            ("orders.shop.svc.cluster.local", (NO_SUCH_NAME, None)),
            ("www.example.com", (NO_SUCH_NAME, None)),
        ] {
            let heard = look_up(&mesh, OURS, name, transport)?;
            ensure!(heard == expected, "{name} {transport:?}: {heard:?} instead of {expected:?}");
        }
    }
    let heard = server.stdout();
    let web = mesh.host("web").address();
    for line in [format!("udp {web} {OUTSIDE}"), format!("tcp {web} {OUTSIDE}"), format!("tcp {web} {CLUSTER}")] {
        ensure!(heard.lines().any(|said| said == line), "the server did not hear `{line}`:\n{heard}");
    }
    ensure!(!heard.contains(".mesh") && !heard.contains("payments"), "names of the mesh left the host:\n{heard}");
    let forwarded = counted(&mesh, "forwarded")? - forwarded;
    ensure!(forwarded == 8.0, "8 questions were for the server, counted {forwarded}");
    ensure!(counted(&mesh, "nxdomain")? >= 2.0, "orders.shop.mesh is not counted");
    Ok(())
}

#[test]
fn a_kubernetes_name_leads_through_the_mesh() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let answer = mesh.curl("web", "checkout", &["--fail", "http://payments.shop.svc.cluster.local/"])?;
    let body = answer.expect_success("checkout asking payments by its Kubernetes name")?;
    ensure!(body.starts_with("payments on api-1"), "not the answer of payments: {body}");
    Ok(())
}

#[test]
fn while_the_server_is_away_questions_for_it_fail_and_the_mesh_has_its_names() -> Result<()> {
    let (mesh, mut server) = mesh_with_server()?;
    server.stop()?;
    ensure!(look_up(&mesh, OURS, OUTSIDE, &[])? == (SERVER_FAILURE, None), "{OUTSIDE} did not fail");
    ensure!(look_up(&mesh, OURS, OUTSIDE, &["--tcp"])? == (SERVER_FAILURE, None), "{OUTSIDE} did not fail over TCP");
    ensure!(counted(&mesh, "forward_failed")? >= 2.0, "failures are not counted");
    ask(&mesh)?;
    let _server = start_server(&mesh)?;
    ensure!(look_up(&mesh, OURS, OUTSIDE, &[])? == (NO_ERROR, Some(OUTSIDE_ADDRESS)), "{OUTSIDE} does not come back");
    Ok(())
}

#[test]
fn without_any_server_only_our_names_are_answered() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    ensure!(look_up(&mesh, OURS, OUTSIDE, &[])? == (REFUSED, None), "{OUTSIDE} is not refused");
    ensure!(look_up(&mesh, OURS, CLUSTER, &[])? == (NO_SUCH_NAME, None), "{CLUSTER} is not denied");
    ask(&mesh)?;
    Ok(())
}

#[test]
fn nobodys_questions_are_redirected() -> Result<()> {
    let (mesh, server) = mesh_with_server()?;
    let rules = mesh.host("web").netfilter()?;
    let captured = backend::chosen() == "tun" || rules.to_lowercase().contains("meshd");
    ensure!(captured, "nothing is captured at all:\n{rules}");
    let mut words = rules.split(|letter: char| !letter.is_ascii_alphanumeric());
    ensure!(!words.any(|word| matches!(word, "53" | "domain" | "udp")), "a rule about port 53:\n{rules}");
    // An enrolled unit that asks another server reaches that server, which does not know our names.
    let direct = SocketAddr::from((mesh.host("api-1").address(), 53)).to_string();
    for transport in [&[][..], &["--tcp"]] {
        let heard = look_up(&mesh, &direct, "payments.shop.mesh", transport)?;
        ensure!(heard == (NO_SUCH_NAME, None), "{transport:?}: {heard:?}");
    }
    let heard = server.stdout();
    ensure!(heard.contains("udp") && heard.contains("tcp"), "the server was not asked:\n{heard}");
    Ok(())
}

/// Who listens for others forwards for those it names only.
#[test]
fn a_meshd_that_listens_to_the_network_forwards_for_named_networks_only() -> Result<()> {
    let (mesh, _server) = mesh_with_server()?;
    let web = mesh.daemon("web");
    let listen = format!("{}:53", mesh.host("web").address());
    let text = fs::read_to_string(web.config())?;
    let from_api = |name: &str| -> Result<(u8, bool)> {
        let args = ["lookup", "--server", &listen, name];
        let answer = mesh.host("api-1").run(&mesh.testkit("api-1", "payments", &args))?.expect_success("lookup")?;
        let code = answer.split_whitespace().next().context("no code")?.parse()?;
        Ok((code, answer.split_whitespace().count() == 2))
    };
    for (networks, expected) in [("[]", (REFUSED, false)), ("[\"10.87.0.0/24\"]", (NO_ERROR, true))] {
        fs::write(web.config(), format!("{text}listen = \"{listen}\"\nforward_for = {networks}\n"))?;
        web.restart()?;
        let heard = from_api(OUTSIDE)?;
        ensure!(heard == expected, "forward_for = {networks}: {heard:?}");
        ensure!(from_api("payments.shop.mesh")? == (NO_ERROR, true), "our own names are for everybody");
    }
    Ok(())
}
