//! Hosts whose firewall is iptables, as Docker and ufw leave it: neither side may spoil the other's rules.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::backend;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::Value;

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
    let rules = |host: &str| Ok::<_, anyhow::Error>(without_life(&mesh.host(host).netfilter()?));
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

/// Without the number that says since when they count: another one when they were put back.
fn without_life(rules: &str) -> String {
    let says_life = |line: &&str| line.contains("MESHD_LIFE ") || line.trim().starts_with("meta mark 0x");
    let counts = |line: &str| line.split_once("meshd:").map_or(line.to_owned(), |(before, _)| before.to_owned());
    rules.lines().filter(|line| !says_life(line)).map(counts).collect::<Vec<_>>().join("\n")
}

const SMTP: u16 = 2525;

/// api-1 keeps its rules by iptables, and smtp is permissive there.
fn start_with_permissive_port() -> Result<Mesh> {
    let plan = Plan::shop_with_one_server();
    let lab = Arc::new(Lab::new(&plan.host_names())?);
    let mut mesh = Mesh::prepare(lab, plan)?;
    mesh.daemon("api-1").use_backend(&backend::some_iptables())?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    Ok(mesh)
}

/// So many calls in clear. Nothing listens there but on loopback: an attempt is a call.
fn call(mesh: &Mesh, times: u32) -> Result<()> {
    let server = SocketAddr::from((mesh.host("api-1").address(), SMTP));
    mesh.host("web").within(|| (0..times).for_each(|_| drop(TcpStream::connect(server))))
}

/// Calls by web's address, and by nobody known; they must add up to all.
fn counted(mesh: &Mesh) -> Result<(u64, u64)> {
    let ledger = mesh.daemon("api-1").json("ledger")?;
    let rows = ledger["ports"].as_array().context("no ports in the ledger")?;
    let row = rows.iter().find(|row| row["port"] == SMTP).context("no such port")?;
    let calls = |address: Value| {
        let callers = row["callers"].as_array().into_iter().flatten();
        let its = callers.filter(|caller| caller["address"] == address && caller["uid"] == Value::Null);
        its.filter_map(|caller| caller["connections"].as_u64()).sum::<u64>()
    };
    let (by_web, by_others) = (calls(mesh.host("web").address().to_string().into()), calls(Value::Null));
    ensure!(row["plaintext_connections"] == by_web + by_others, "{row}");
    Ok((by_web, by_others))
}

#[test]
fn calls_while_meshd_was_away_are_in_the_ledger_without_a_name() -> Result<()> {
    let mesh = start_with_permissive_port()?;
    call(&mesh, 2)?;
    ensure!(counted(&mesh)? == (2, 0), "while meshd runs: {:?}", counted(&mesh)?);
    mesh.daemon("api-1").kill()?;
    call(&mesh, 3)?;
    mesh.daemon("api-1").start()?;
    call(&mesh, 4)?;
    ensure!(counted(&mesh)? == (6, 3), "after a crash: {:?}", counted(&mesh)?);
    let ready = mesh.daemon("api-1").run(&["ledger", "--clean-for", "1h", "--port", "2525"])?;
    ensure!(ready.exit_code() == Some(1), "a port that was called while meshd was away is clean");
    Ok(())
}

/// Far more than the kernel keeps for a daemon that does not listen.
#[test]
fn calls_the_kernel_could_not_tell_of_are_in_the_ledger_all_the_same() -> Result<()> {
    const CALLS: u32 = 30_000;
    let mesh = start_with_permissive_port()?;
    let daemon = mesh.daemon("api-1");
    daemon.stand_still()?;
    let called = call(&mesh, CALLS);
    daemon.signal(Signal::SIGCONT)?;
    called?;
    let (by_web, by_others) = counted(&mesh)?;
    ensure!(by_web > 0 && by_others > 0, "nothing was lost: {by_web} by web, {by_others} by others");
    ensure!(by_web + by_others == u64::from(CALLS), "{by_web} by web, {by_others} by others");
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
