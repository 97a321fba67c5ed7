//! Hosts that register what they serve in a real Consul, through one agent: found by name, critical when they die, and never
//! in each other's way.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use meshd_tests::consul::{Agent, Consul};
use meshd_tests::daemon::UID;
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::wait::until;
use serde_json::{Value, json};

use crate::DEADLINE;
use crate::registering::{Registering, document, prepare};

const HOSTS: [&str; 3] = ["web", "api-1", "api-2"];
const RULES: &str = "agent_prefix \"\" { policy = \"read\" } service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" } \
                     key_prefix \"meshd-discovery/v1/\" { policy = \"read\" } service \"payments\" { policy = \"write\" }";
const ONLY_READ: &str = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" } \
                         key_prefix \"meshd-discovery/v1/\" { policy = \"read\" }";
const DOCUMENT: &str = "/v1/kv/meshd-discovery/v1/shop/payments/service";

/// A mesh that knows services from Consul alone, where its servers register themselves.
pub(crate) struct Bed {
    pub(crate) mesh: Mesh,
    pub(crate) consul: Consul,
    /// Of each host, if it has one.
    pub(crate) agents: BTreeMap<&'static str, Agent>,
    token_file: PathBuf,
}

impl Registering for Bed {
    fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    fn mesh_mut(&mut self) -> &mut Mesh {
        &mut self.mesh
    }

    fn is_registered(&self, host: &str) -> Result<()> {
        let address = self.mesh.host(host).address().to_string();
        let is_there = |all: Vec<Value>| matches!(&all[..], [one] if one["Service"]["Address"] == address && worst(one) == "passing");
        let waited = until(DEADLINE, &format!("{host} to be registered once, and healthy"), || {
            self.registered(host).is_ok_and(is_there)
        });
        waited.with_context(|| format!("{:?}\n{}", self.registered(host), self.mesh.daemon(host).log()))
    }

    fn is_gone(&self, host: &str) -> Result<()> {
        until(DEADLINE, &format!("no registration of {host}"), || self.registered(host).is_ok_and(|all| all.is_empty()))
    }

    /// Through the same agent, under an ID that nobody but it may take away.
    fn write_copy(&self, epoch: u64) -> Result<()> {
        let copy = json!({
            "ID": format!("meshd:payments.shop:api-1:{epoch}-0"), "Name": "payments", "Port": 8080,
            "Address": self.mesh.host("api-2").address().to_string(),
            "Meta": { "meshd-namespace": "shop", "meshd-instance": "api-1", "meshd-transport": "meshd",
                      "meshd-port": "80", "meshd-epoch": epoch.to_string() },
        });
        let token = fs::read_to_string(&self.token_file)?;
        let registered = self.consul.call(Some(&token), "PUT", "/v1/agent/service/register", Some(&copy))?;
        ensure!(registered.0 == 200, "{registered:?}");
        Ok(())
    }

    fn epoch(&self, host: &str) -> Result<u64> {
        let epoch = &self.only(host)?["Service"]["Meta"]["meshd-epoch"];
        Ok(epoch.as_str().context("no epoch")?.parse()?)
    }
}

impl Bed {
    fn make() -> Result<Self> {
        let (lab, mesh) = prepare()?;
        let consul = Consul::start(&lab.host("store"))?;
        chown(consul.authority(), Some(UID), Some(UID))?;
        let access = format!("address = {:?}\nca = {:?}\n", consul.url(), consul.authority());
        Self { token_file: token_file(&lab), mesh, consul, agents: BTreeMap::new() }.begin(&access)
    }

    /// Three servers, and an agent on each host where meshd looks for it.
    pub(crate) fn make_with_agents() -> Result<Self> {
        let (lab, mesh) = prepare()?;
        let consul = Consul::start_cluster(&lab.host("store"), 3)?;
        let agents = HOSTS.iter().map(|host| Ok((*host, consul.start_agent(&lab.host(host))?)));
        let agents = agents.collect::<Result<_>>()?;
        Self { token_file: token_file(&lab), mesh, consul, agents }.begin("")
    }

    fn begin(self, access: &str) -> Result<Self> {
        self.admit("hosts")?;
        let token_file = &self.token_file;
        let source = format!("kind = \"consul\"\n{access}token_file = {token_file:?}\nauthority = [\"shop\"]\n");
        HOSTS.iter().try_for_each(|host| self.configure(host, &source))?;
        self.start()
    }

    /// A token for all hosts, and the document.
    fn admit(&self, name: &str) -> Result<()> {
        let token = self.consul.token(name, RULES)?;
        let new = self.token_file.with_extension("new");
        fs::write(&new, token)?;
        chown(&new, Some(UID), Some(UID))?;
        fs::rename(new, &self.token_file)?;
        self.consul.put_key(DOCUMENT, &document()?)
    }

    /// What is registered for payments on a host, of all lives.
    fn registered(&self, host: &str) -> Result<Vec<Value>> {
        let all = self.consul.manage("GET", "/v1/health/service/payments", None)?;
        let all = all.as_array().context("no list")?.clone();
        Ok(all.into_iter().filter(|entry| entry["Service"]["Meta"]["meshd-instance"] == host).collect())
    }

    fn only(&self, host: &str) -> Result<Value> {
        let mut all = self.registered(host)?;
        ensure!(all.len() == 1, "{all:?}");
        all.pop().context("not registered")
    }
}

fn token_file(lab: &Lab) -> PathBuf {
    lab.host("store").directory().join("consul.token")
}

/// Of all checks of an instance.
fn worst(entry: &Value) -> &'static str {
    let checks = entry["Checks"].as_array().into_iter().flatten();
    if checks.into_iter().any(|check| check["Status"] == "critical") { "critical" } else { "passing" }
}

#[test]
fn a_host_is_found_by_what_it_serves_and_critical_as_soon_as_nobody_keeps_it() -> Result<()> {
    let bed = Bed::make()?;
    let said = bed.only("api-1")?;
    let meta = &said["Service"]["Meta"];
    ensure!(
        meta["meshd-namespace"] == "shop" && meta["meshd-zone"] == "rack-1" && meta["meshd-version"] == "7",
        "{said}"
    );
    ensure!(meta["meshd-identity"] == bed.mesh.spiffe_id("payments") && said["Service"]["Port"] == 8080, "{said}");
    bed.comes_to("api-1", "held")?;
    let power = bed.dies("api-1")?;
    // Long before: a dial that fails has another endpoint tried.
    ensure!(bed.asks()?.contains("api-2"));
    bed.is_used_by_web("api-1", false)?;
    let left = bed.only("api-1")?;
    let checks = left["Checks"].as_array().context("no checks")?;
    let of_host = checks.iter().find(|check| check["Name"] == "meshd keeps it").context("no such check")?;
    // That is what it was that made it critical, and its time is what bounds how long a dead host is called.
    ensure!(of_host["Status"] == "critical" && of_host["Output"] == "TTL expired", "{left}");
    // The next life takes its name over, and what the former left.
    drop(power);
    bed.mesh.daemon("api-1").start()?;
    bed.is_registered("api-1")?;
    ensure!(bed.only("api-1")?["Service"]["ID"] != said["Service"]["ID"]);
    bed.answers("api-1")
}

#[test]
fn hosts_are_stopped_one_after_the_other_under_load_and_no_request_fails() -> Result<()> {
    Bed::make()?.hosts_stop_one_after_the_other_under_load()
}

#[test]
fn an_old_owner_that_goes_on_leaves_the_later_one_alone_and_takes_its_own_away() -> Result<()> {
    Bed::make()?.an_old_owner_goes_on_and_leaves_the_later_one_alone()
}

#[test]
fn in_an_agent_that_comes_back_empty_hosts_are_registered_again_and_traffic_never_noticed() -> Result<()> {
    let mut bed = Bed::make()?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    // What an operator removes by mistake is back with the next beat.
    let forgotten = bed.only("api-1")?["Service"]["ID"].as_str().unwrap_or_default().to_owned();
    let path = format!("/v1/agent/service/deregister/{forgotten}");
    ensure!(bed.consul.call(Some(&fs::read_to_string(&bed.token_file)?), "PUT", &path, None)?.0 == 200);
    bed.is_registered("api-1")?;
    bed.consul.restart_empty()?;
    bed.admit("hosts")?;
    bed.all_are_there_again(load)
}

#[test]
fn a_host_that_dies_after_its_token_was_replaced_and_the_old_one_deleted_is_critical_as_soon() -> Result<()> {
    let bed = Bed::make()?;
    let old = fs::read_to_string(&bed.token_file)?;
    let (said, daemon) = (bed.only("api-1")?, bed.mesh.daemon("api-1"));
    bed.admit("later-hosts")?;
    until(DEADLINE, "the registration by the other token", || daemon.log().contains("registered anew with it"))
        .with_context(|| daemon.log())?;
    ensure!(bed.only("api-1")?["Service"]["ID"] == said["Service"]["ID"], "{said}");
    let (status, token) = bed.consul.call(Some(&old), "GET", "/v1/acl/token/self", None)?;
    ensure!(status == 200, "{token}");
    let token: Value = serde_json::from_str(&token)?;
    let accessor = token["AccessorID"].as_str().context("no accessor")?;
    bed.consul.manage("DELETE", &format!("/v1/acl/token/{accessor}"), None)?;
    let _power = bed.dies("api-1")?;
    bed.is_used_by_web("api-1", false)?;
    ensure!(worst(&bed.only("api-1")?) == "critical");
    Ok(())
}

#[test]
fn a_host_whose_program_is_not_there_is_critical_and_gets_no_calls_and_a_denied_token_is_named() -> Result<()> {
    let bed = Bed::make()?;
    bed.a_host_without_its_program_gets_no_calls()?;
    bed.consul.set_rules("hosts", ONLY_READ)?;
    bed.checks("api-1", "add `service \"payments\" { policy = \"write\" }` to its policy")?;
    ensure!(bed.row("api-1")?["error"].as_str().is_some_and(|error| error.contains("does not let this token")));
    bed.consul.set_rules("hosts", RULES)?;
    bed.is_registered("api-1")?;
    bed.comes_to("api-1", "held")
}
