//! Containers on a bridge, as Docker makes it: left alone.

use anyhow::{Context, Result, ensure};
use meshd_tests::host::Host;
use meshd_tests::machine::{Machine, MachineMesh, units};
use meshd_tests::plan::Plan;
use meshd_tests::process::Process;

use crate::{ask, shop_without_strict_ports};

/// Bridge, NAT and published port (9000 to the container's 80) with the rules that Docker writes.
const DOCKER: &str = "\
sysctl -qw net.ipv4.ip_forward=1
ip link add docker0 type bridge
ip address add 172.17.0.1/16 dev docker0
ip link set docker0 up
ip netns add container
ip link add port type veth peer name eth0 netns container
ip link set port master docker0 up
ip -n container link set lo up
ip -n container link set eth0 up
ip -n container address add 172.17.0.2/16 dev eth0
ip -n container route add default via 172.17.0.1
iptables -t nat -N DOCKER
iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
iptables -t nat -A DOCKER -i docker0 -j RETURN
iptables -t nat -A DOCKER ! -i docker0 -p tcp --dport 9000 -j DNAT --to-destination 172.17.0.2:80
iptables -N DOCKER
iptables -P FORWARD DROP
iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A FORWARD -o docker0 -j DOCKER
iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
iptables -A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp --dport 80 -j ACCEPT
";
const CONTAINER: &str = "ip netns exec container /usr/bin/testkit echo-http --listen 0.0.0.0:80 --name container";

#[test]
fn containers_on_a_bridge_reach_out_and_are_reached_whatever_meshd_does_by_nft_tproxy() -> Result<()> {
    left_alone(Plan::shop_with_one_server(), "nft-tproxy")
}

#[test]
fn containers_on_a_bridge_reach_out_and_are_reached_whatever_meshd_does_by_nft_redirect() -> Result<()> {
    left_alone(Plan::shop_with_one_server(), "nft-redirect")
}

#[test]
fn containers_on_a_bridge_reach_out_and_are_reached_whatever_meshd_does_by_iptables() -> Result<()> {
    left_alone(Plan::shop_with_one_server(), "iptables-nft")
}

#[test]
fn containers_on_a_bridge_reach_out_and_are_reached_whatever_meshd_does_by_tun() -> Result<()> {
    left_alone(shop_without_strict_ports(), "tun")
}

fn left_alone(plan: Plan, backend: &str) -> Result<()> {
    let mesh = MachineMesh::prepare(plan, backend)?;
    let web = mesh.machine("web");
    web.command("sh", &["-euc", DOCKER])?;
    web.start_unit("docker.service", &units::service(&format!("/usr/sbin/{CONTAINER}"), &[]))?;
    let outside = mesh.administrator();
    let _server = serve_outside(&outside)?;

    works(web, &outside).context("before meshd runs")?;
    mesh.start_daemons()?;
    ask(&mesh, "checkout")?;
    works(web, &outside).context("while meshd runs")?;
    not_in_the_mesh(&mesh)?;
    mesh.daemon("web").stop()?;
    works(web, &outside).context("while meshd is stopped")?;
    mesh.daemon("web").run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
    works(web, &outside).context("after everything was reverted")?;
    let rules = web.command("iptables-save", &[])?;
    ensure!(rules.contains("-j MASQUERADE") && rules.contains("--to-destination 172.17.0.2:80"), "gone:\n{rules}");
    Ok(())
}

fn serve_outside(host: &Host) -> Result<Process> {
    host.start_testkit(&host.testkit(&["echo-http", "--listen", "0.0.0.0:9090", "--name", "outside"]))
}

/// From the container out, from outside to the published port, and from the machine itself to it.
fn works(web: &Machine, outside: &Host) -> Result<()> {
    let out = format!("http://{}:9090/", outside.address());
    let said = web.command("ip", &["netns", "exec", "container", "curl", "--silent", "--max-time", "5", &out]);
    ensure!(said.context("out of the container")? == "outside\n", "not the answer from outside");
    let published = format!("http://{}:9000/", web.host().address());
    let said = outside.command("curl", &["--silent", "--max-time", "5", &published]);
    ensure!(said.context("the published port from outside")? == "container\n", "not the container's answer");
    let said = web.command("curl", &["--silent", "--max-time", "5", &published]);
    ensure!(said.context("the published port from the machine itself")? == "container\n", "not the container's answer");
    Ok(())
}

/// The container is not enrolled, and virtual addresses are this host's own: none leaks out or is answered.
fn not_in_the_mesh(mesh: &MachineMesh) -> Result<()> {
    let web = mesh.machine("web");
    let found = web.command("getent", &["ahostsv4", "payments.shop.mesh"])?;
    let address = found.split_whitespace().next().context("payments has no address")?;
    let url = format!("http://{address}/");
    let curl =
        ["netns", "exec", "container", "curl", "--silent", "--max-time", "5", "--write-out", "%{exitcode}", &url];
    let said = web.command("sh", &["-c", &format!("ip {} || true", curl.map(|word| format!("'{word}'")).join(" "))])?;
    ensure!(said == "7", "not refused at once: curl said {said}");
    Ok(())
}
