//! Hosts whose firewall is iptables, as Docker and ufw leave it: neither side may spoil the other's rules.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask, ensure_refused};

/// Published ports as Docker writes them. Its destination is nobody: whoever gets there has lost its way.
const DOCKER: &str = "*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80
COMMIT
";

/// Everything is refused but the mesh (meshd-vip is the device of the TUN backend); the operator once opened the port that is strict now.
const UFW: &str = "*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-user-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-user-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -p PING -j ACCEPT
-A ufw-user-input -i meshd-vip -j ACCEPT
-A ufw-user-input -p tcp -m tcp --dport 15008 -j ACCEPT
-A ufw-user-input -p tcp -m tcp --dport 8080 -j ACCEPT
COMMIT
";

#[test]
fn docker_and_ufw_keep_every_rule_and_the_mesh_works_beside_them() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    for host in ["web", "api-1"] {
        restore(&mesh, host, "iptables", DOCKER)?;
        restore(&mesh, host, "iptables", &UFW.replace("PING", "icmp"))?;
        restore(&mesh, host, "ip6tables", &UFW.replace("PING", "ipv6-icmp"))?;
    }
    let before = ["web", "api-1"].map(|host| saved(&mesh, host));
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    ask(&mesh)?;
    let server = mesh.host("api-1");
    let addresses = [server.address().to_string(), format!("[{}]", server.address6())];
    for address in addresses.iter().filter(|_| backend::can_be_strict()) {
        let answer = mesh.curl("web", "stray", &["--max-time", "3", &format!("http://{address}:8080/")])?;
        ensure_refused(&answer).with_context(|| format!("the strict port at {address}"))?;
    }
    for (host, before) in ["web", "api-1"].into_iter().zip(before) {
        mesh.daemon(host).kill()?;
        mesh.daemon(host).run(&["intercept", "revert"])?.expect_success("meshd intercept revert")?;
        let (before, after) = (before?, saved(&mesh, host)?);
        ensure!(before.contains("-j DOCKER") && before.contains("ufw-user-input"), "nothing was there:\n{before}");
        ensure!(after == before, "{host} has now:\n{after}\nbefore it was:\n{before}");
    }
    Ok(())
}

#[test]
fn flushed_tables_are_filled_again() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let rules = |host: &str| mesh.host(host).netfilter();
    let before = [rules("web")?, rules("api-1")?];
    for host in ["web", "api-1"] {
        for program in ["iptables", "ip6tables"] {
            for flush in [&["-F"][..], &["-t", "nat", "-F"]] {
                command(&mesh, host, program, flush)?;
            }
        }
    }
    let healed = || Ok::<_, anyhow::Error>([rules("web")?, rules("api-1")?] == before);
    until(DEADLINE, "meshd to put its rules back", || healed().unwrap_or(false))?;
    ask(&mesh)?;
    Ok(())
}

/// The host's firewall is kept by the variant under test; where that is none, by the usual one.
fn variant() -> &'static str {
    if backend::chosen() == "iptables-legacy" { "legacy" } else { "nft" }
}

/// `iptables` or `ip6tables`, with what the program's other names have behind it.
fn program(program: &str, rest: &str) -> String {
    format!("{program}-{}{rest}", variant())
}

pub(crate) fn command(mesh: &Mesh, host: &str, name: &str, args: &[&str]) -> Result<String> {
    let lock = format!("XTABLES_LOCKFILE={}", mesh.daemon(host).iptables_lock().display());
    let program = program(name, "");
    mesh.host(host).command("env", &[&[&lock, program.as_str(), "--wait"], args].concat())
}

fn restore(mesh: &Mesh, host: &str, name: &str, rules: &str) -> Result<()> {
    let file = mesh.host(host).directory().join("firewall");
    std::fs::write(&file, rules)?;
    let file = file.display().to_string();
    mesh.host(host).command(&program(name, "-restore"), &["--noflush", &file])?;
    Ok(())
}

/// Both families, without times and counters.
fn saved(mesh: &Mesh, host: &str) -> Result<String> {
    let mut all = String::new();
    for name in ["iptables", "ip6tables"] {
        let saved = ["nat", "filter"].map(|table| mesh.host(host).command(&program(name, "-save"), &["-t", table]));
        for line in saved.into_iter().collect::<Result<Vec<_>>>()?.concat().lines() {
            let without_counters = line.split(" [").next().unwrap_or_default();
            if !line.starts_with('#') {
                all.push_str(without_counters);
                all.push('\n');
            }
        }
    }
    Ok(all)
}
