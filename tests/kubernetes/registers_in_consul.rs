//! Hosts that register what they serve in a real Consul, through one agent: found by name, critical when they die, and never
//! in each other's way.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::consul::Consul;
use meshd_tests::daemon::UID;
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::DEADLINE;
use crate::registering::{Registering, document};

const HOSTS: &str = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" } \
                     key_prefix \"meshd-discovery/v1/\" { policy = \"read\" } service \"payments\" { policy = \"write\" }";
const ONLY_READ: &str = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" } \
                         key_prefix \"meshd-discovery/v1/\" { policy = \"read\" }";
const DOCUMENT: &str = "/v1/kv/meshd-discovery/v1/shop/payments/service";

/// A mesh that knows services from Consul alone, where its servers register themselves.
struct Bed {
    mesh: Mesh,
    consul: Consul,
    token_file: PathBuf,
}

impl Registering for Bed {
    fn mesh(&self) -> &Mesh {
        &self.mesh
    }
}

impl Bed {
    fn make() -> Result<Self> {
        let lab = Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store"])?);
        let mesh = Mesh::prepare(lab.clone(), Plan::shop())?;
        let consul = Consul::start(&lab.host("store"))?;
        let token_file = lab.host("store").directory().join("consul.token");
        let mut bed = Self { mesh, consul, token_file };
        bed.admit("hosts")?;
        chown(bed.consul.authority(), Some(UID), Some(UID))?;
        let source = format!(
            "kind = \"consul\"\naddress = {:?}\nca = {:?}\ntoken_file = {:?}\nauthority = [\"shop\"]\n",
            bed.consul.url(),
            bed.consul.authority(),
            bed.token_file
        );
        ["web", "api-1", "api-2"].iter().try_for_each(|host| bed.configure(host, &source))?;
        for host in ["web", "api-1", "api-2"] {
            let config = bed.mesh.daemon(host).config();
            let text = fs::read_to_string(&config)?;
            fs::write(config, format!("imports = [\"payments.shop\"]\n{text}"))?;
        }
        bed.mesh.start_pki()?;
        bed.mesh.join_all()?;
        bed.mesh.start_all()?;
        for host in ["api-1", "api-2"] {
            bed.is_registered(host)?;
            bed.answers(host)?;
        }
        Ok(bed)
    }

    /// A token for all hosts, and the document.
    fn admit(&self, name: &str) -> Result<()> {
        let token = self.consul.token(name, HOSTS)?;
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

    fn only(&self, host: &str) -> Result<Value> {
        let mut all = self.registered(host)?;
        ensure!(all.len() == 1, "{all:?}");
        all.pop().context("not registered")
    }
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
    let bed = Bed::make()?;
    let load = Load::start_with(&bed.mesh, 4, &["--rate", "100"])?;
    for (stopped, other) in [("api-1", "api-2"), ("api-2", "api-1")] {
        load.reaches(stopped, 5)?;
        bed.mesh.daemon(stopped).stop()?;
        bed.is_gone(stopped)?;
        load.reaches(other, 10)?;
        bed.mesh.daemon(stopped).start()?;
        bed.is_registered(stopped)?;
    }
    let report = load.end()?;
    ensure!(report.failed == 0 && report.ok > 40, "{report:?}");
    Ok(())
}

#[test]
fn an_old_owner_that_goes_on_leaves_the_later_one_alone_and_takes_its_own_away() -> Result<()> {
    let bed = Bed::make()?;
    let daemon = bed.mesh.daemon("api-1");
    daemon.stand_still()?;
    bed.is_used_by_web("api-1", false)?;
    // What a copy of the machine would write through the same agent, and what nobody but it may take away.
    let later = u64::MAX / 4;
    let id = format!("meshd:payments.shop:api-1:{later}-0");
    let address = bed.mesh.host("api-2").address().to_string();
    let copy = json!({
        "ID": id, "Name": "payments", "Address": address, "Port": 8080,
        "Meta": { "meshd-namespace": "shop", "meshd-instance": "api-1", "meshd-transport": "meshd", "meshd-port": "80",
                  "meshd-epoch": later.to_string() },
    });
    let registered = bed.consul.call(
        Some(&fs::read_to_string(&bed.token_file)?),
        "PUT",
        "/v1/agent/service/register",
        Some(&copy),
    )?;
    ensure!(registered.0 == 200, "{registered:?}");
    daemon.signal(Signal::SIGCONT)?;
    bed.comes_to("api-1", "superseded")?;
    bed.checks("api-1", "another meshd registered it later")?;
    until(DEADLINE, "the later one alone", || bed.only("api-1").is_ok_and(|it| it["Service"]["ID"] == *id))
        .with_context(|| format!("{:?}", bed.registered("api-1")))?;
    // Nor does it take it away when it ends.
    daemon.stop()?;
    ensure!(bed.only("api-1")?["Service"]["ID"] == *id);
    // A daemon that is started is a new life, and later than all before.
    daemon.start()?;
    bed.is_registered("api-1")?;
    let epoch = bed.only("api-1")?["Service"]["Meta"]["meshd-epoch"].as_str().unwrap_or_default().parse::<u64>()?;
    ensure!(epoch > later, "{epoch}");
    Ok(())
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
    for host in ["api-1", "api-2"] {
        bed.is_registered(host)?;
        bed.comes_to(host, "held")?;
        load.reaches(host, 5)?;
    }
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    Ok(())
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
    bed.has_program("api-1", false)?;
    bed.is_used_by_web("api-1", false)?;
    ensure!(worst(&bed.only("api-1")?) == "critical");
    bed.comes_to("api-1", "held")?;
    for _ in 0..10 {
        ensure!(bed.asks()?.contains("api-2"));
    }
    bed.has_program("api-1", true)?;
    bed.is_registered("api-1")?;
    bed.answers("api-1")?;
    bed.consul.set_rules("hosts", ONLY_READ)?;
    bed.checks("api-1", "add `service \"payments\" { policy = \"write\" }` to its policy")?;
    ensure!(bed.row("api-1")?["error"].as_str().is_some_and(|error| error.contains("does not let this token")));
    bed.consul.set_rules("hosts", HOSTS)?;
    bed.is_registered("api-1")?;
    bed.comes_to("api-1", "held")
}
