//! Consul as it is run: three servers, and an agent on each host, through which meshd follows and registers.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use meshd_tests::consul::Agent;
use meshd_tests::load::Load;
use meshd_tests::wait::until;
use serde_json::{Value, json};

use crate::DEADLINE;
use crate::registering::Registering;
use crate::registers_in_consul::Bed;

impl Bed {
    fn agent(&mut self, host: &str) -> Result<&mut Agent> {
        self.agents.get_mut(host).context("no agent")
    }

    /// How many hosts web would send requests to.
    fn used(&self) -> usize {
        ["api-1", "api-2"].iter().filter(|host| self.is_used(host)).count()
    }

    fn agents_answer(&self) -> bool {
        let asks = ["-sf", "--max-time", "2", "http://127.0.0.1:8500/v1/status/leader"];
        self.agents.keys().all(|host| self.mesh.host(host).command("curl", &asks).is_ok())
    }

    /// Of an instance that gets no requests.
    fn change_is_followed(&self, what: &str) -> Result<()> {
        let node = json!({
            "Node": "elsewhere", "Address": "10.9.9.9",
            "Service": { "Service": "payments", "Port": 80, "Meta": {
                "meshd-namespace": "shop", "meshd-transport": "meshd", "meshd-weight": "0" } },
        });
        let is_known = |row: &Value| row["dial"].as_str().is_some_and(|dial| dial.starts_with("10.9.9.9"));
        let knows = || self.known().is_ok_and(|rows| rows.iter().any(is_known));
        let began = Instant::now();
        self.consul.manage("PUT", "/v1/catalog/register", Some(&node))?;
        until(DEADLINE, "web to know of an instance", knows).with_context(|| format!("{:?}", self.known()))?;
        println!("figure: after {what} web knew of a change in {} ms", began.elapsed().as_millis());
        self.consul.manage("PUT", "/v1/catalog/deregister", Some(&json!({ "Node": "elsewhere" })))?;
        until(DEADLINE, "web to know of its end", || self.known().is_ok() && !knows())
    }
}

#[test]
fn the_leading_server_of_three_is_killed_and_nothing_vanishes_and_every_change_comes() -> Result<()> {
    let mut bed = Bed::make_with_agents()?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    let leader = bed.consul.leader()?;
    bed.consul.kill_server(leader)?;
    let mut fewest = 2;
    until(DEADLINE, "another leader", || {
        fewest = fewest.min(bed.used());
        bed.consul.leader().is_ok_and(|now| now != leader)
    })?;
    ensure!(fewest == 2, "{fewest} of 2 hosts were left");
    bed.change_is_followed("an election")?;
    bed.hosts_stop_one_after_the_other_under_load()?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    bed.consul.start_server(leader)?;
    ["api-1", "api-2"].iter().try_for_each(|host| bed.comes_to(host, "held"))
}

#[test]
fn agents_restarted_with_their_data_take_nothing_away_and_changes_come_as_before() -> Result<()> {
    let mut bed = Bed::make_with_agents()?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    for host in ["web", "api-1"] {
        let agent = bed.agents.get_mut(host).context("no agent")?;
        agent.kill()?;
        agent.resume()?;
    }
    let mut fewest = 2;
    until(DEADLINE, "the host whose agent forgot nothing to be held, and web to follow", || {
        fewest = fewest.min(bed.used());
        let errors = |status: Value| status["sources"][0]["errors"] == json!([]);
        let follows = bed.mesh.daemon("web").json("status").is_ok_and(errors);
        follows && bed.agents_answer() && bed.phase("api-1").is_ok_and(|phase| phase == "held")
    })
    .with_context(|| format!("{:?}\n{:?}", bed.row("api-1"), bed.mesh.daemon("web").json("status")))?;
    ensure!(fewest == 2, "{fewest} of 2 hosts were left");
    bed.change_is_followed("a restart of its agent")?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
}

#[test]
fn a_host_that_dies_with_its_agent_is_gone_for_the_others_and_comes_back() -> Result<()> {
    let mut bed = Bed::make_with_agents()?;
    bed.agent("api-1")?.kill()?;
    let began = Instant::now();
    let power = bed.dies("api-1")?;
    // Long before: a dial that fails has another endpoint tried.
    ensure!(bed.asks()?.contains("api-2"));
    bed.is_used_by_web("api-1", false)?;
    println!("figure: a host that died with its agent was gone after {} ms", began.elapsed().as_millis());
    ensure!(bed.is_used("api-2"), "{:?}", bed.known());
    drop(power);
    bed.agent("api-1")?.resume()?;
    bed.mesh.daemon("api-1").start()?;
    bed.is_registered("api-1")?;
    bed.answers("api-1")
}
