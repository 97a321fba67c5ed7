//! Hosts that register what they serve in a real etcd cluster: found by name, gone when they die, and never in each
//! other's way.

use std::fs;
use std::os::unix::fs::chown;

use anyhow::{Context, Result, ensure};
use meshd_tests::daemon::UID;
use meshd_tests::etcd::Etcd;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::DEADLINE;
use crate::registering::{Registering, document, prepare};

const PAYMENTS: &str = "/meshd-discovery/v1/shop/payments";

/// A mesh that knows services from etcd alone, where its servers register themselves.
struct Bed {
    mesh: Mesh,
    etcd: Etcd,
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
        let is_there = || self.registered(host).is_some_and(|it| it["address"] == address && it["health"] == "healthy");
        let waited = until(DEADLINE, &format!("{host} to be registered, and healthy"), is_there);
        waited.with_context(|| format!("{:?}\n{}", self.registered(host), self.mesh.daemon(host).log()))
    }

    fn is_gone(&self, host: &str) -> Result<()> {
        let key = format!("{PAYMENTS}/endpoints/{host}");
        // An etcd that does not answer says nothing.
        let is_gone = || self.etcd.ctl("root", &["get", &key]).is_ok_and(|got| got.success() && got.stdout.is_empty());
        until(DEADLINE, &format!("no registration of {host}"), is_gone)
    }

    fn write_copy(&self, epoch: u64) -> Result<()> {
        let address = self.mesh.host("api-2").address();
        let copy = format!(r#"{{"address":"{address}","ports":[{{"port":80,"target":8080}}],"epoch":{epoch}}}"#);
        self.write(&["put", &format!("{PAYMENTS}/endpoints/api-1"), &copy])
    }

    fn epoch(&self, host: &str) -> Result<u64> {
        self.registered(host).and_then(|it| it["epoch"].as_u64()).context("not registered")
    }
}

impl Bed {
    fn make() -> Result<Self> {
        let (lab, mesh) = prepare()?;
        let etcd = Etcd::start(&lab.host("store"), 3)?;
        let bed = Self { mesh, etcd };
        bed.admit()?;
        bed.write(&["put", &format!("{PAYMENTS}/service"), &document()?])?;
        let source = bed.source()?;
        ["web", "api-1", "api-2"].iter().try_for_each(|host| bed.configure(host, &source))?;
        bed.start()
    }

    /// A user for all hosts.
    fn admit(&self) -> Result<()> {
        let (cert, key) = self.etcd.add_user("hosts", "/meshd-discovery/")?;
        [cert, key, self.etcd.authority()].iter().try_for_each(|file| Ok(chown(file, Some(UID), Some(UID))?))
    }

    fn source(&self) -> Result<String> {
        let endpoints = self.etcd.endpoints().iter().map(|url| format!("{url:?}")).collect::<Vec<_>>().join(", ");
        let authority = self.etcd.authority();
        let directory = authority.parent().context("a file in a directory")?;
        let (cert, key) = (directory.join("hosts.pem"), directory.join("hosts.key"));
        Ok(format!(
            "kind = \"etcd\"\nendpoints = [{endpoints}]\nauthority = [\"shop\"]\nca = {authority:?}\ncert = {cert:?}\n\
             key = {key:?}\n"
        ))
    }

    /// Once more where a leader is being elected.
    fn write(&self, what: &[&str]) -> Result<()> {
        until(DEADLINE, "a write to etcd", || self.etcd.ctl("root", what).is_ok_and(|done| done.success()))
    }

    /// What is registered for payments on a host.
    fn registered(&self, host: &str) -> Option<Value> {
        let got =
            self.etcd.ctl("root", &["get", "--print-value-only", &format!("{PAYMENTS}/endpoints/{host}")]).ok()?;
        serde_json::from_str(&got.stdout).ok()
    }

    /// For how long etcd keeps what nobody keeps alive.
    fn lease_s(&self, host: &str) -> Result<u64> {
        let json = |what: &[&str]| -> Result<Value> {
            let said = self.etcd.ctl("root", &[what, &["-w", "json"]].concat())?.expect_success("etcdctl")?;
            Ok(serde_json::from_str(&said)?)
        };
        let key = json(&["get", &format!("{PAYMENTS}/endpoints/{host}")])?;
        let lease = key["kvs"][0]["lease"].as_i64().with_context(|| format!("no lease: {key}"))?;
        let lease = json(&["lease", "timetolive", &format!("{lease:x}")])?;
        lease["granted-ttl"].as_u64().with_context(|| format!("{lease}"))
    }
}

#[test]
fn a_host_is_found_by_what_it_serves_and_gone_with_its_lease_when_it_dies() -> Result<()> {
    let bed = Bed::make()?;
    let said = bed.registered("api-1").context("not registered")?;
    ensure!(said["ports"][0]["port"] == 80 && said["ports"][0]["target"] == 8080, "{said}");
    ensure!(said["zone"] == "rack-1" && said["version"] == "7" && said["meshPort"] == 15008, "{said}");
    ensure!(said["identity"] == bed.mesh.spiffe_id("payments"), "{said}");
    ensure!(bed.phase("api-1")? == "held");
    let metrics = bed.mesh.daemon("api-1").metrics()?;
    ensure!(metrics.sum("meshd_registration_held", &[("service", "payments.shop")]) == 1.0);
    // So long after its last beat a dead host is gone for everybody, by what the server says itself.
    ensure!(bed.lease_s("api-1")? < 10, "{:?}", bed.lease_s("api-1"));
    let power = bed.dies("api-1")?;
    // Long before its lease ends: a dial that fails has another endpoint tried.
    ensure!(bed.asks()?.contains("api-2"));
    bed.is_gone("api-1")?;
    until(DEADLINE, "web to know", || bed.known().is_ok_and(|rows| rows.len() == 1))?;
    ensure!(bed.asks()?.contains("api-2"));
    // The next life takes its name over.
    drop(power);
    bed.mesh.daemon("api-1").start()?;
    bed.is_registered("api-1")?;
    bed.answers("api-1")
}

#[test]
fn hosts_are_stopped_one_after_the_other_under_load_and_no_request_fails() -> Result<()> {
    Bed::make()?.hosts_stop_one_after_the_other_under_load()
}

#[test]
fn an_old_owner_that_goes_on_after_its_lease_leaves_the_later_one_alone() -> Result<()> {
    Bed::make()?.an_old_owner_goes_on_and_leaves_the_later_one_alone()
}

#[test]
fn in_an_etcd_that_comes_back_empty_hosts_are_registered_again_and_traffic_never_noticed() -> Result<()> {
    let mut bed = Bed::make()?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    bed.etcd.restart_empty()?;
    bed.admit()?;
    bed.all_are_there_again(load)
}

#[test]
fn a_host_whose_program_is_not_there_says_so_and_gets_no_calls() -> Result<()> {
    Bed::make()?.a_host_without_its_program_gets_no_calls()
}

#[test]
fn a_program_says_whether_a_host_is_well_and_what_it_said_is_shown() -> Result<()> {
    let bed = Bed::make()?;
    let daemon = bed.mesh.daemon("api-1");
    let marker = daemon.etc("well");
    let text = fs::read_to_string(daemon.etc("enrol.d/harness.toml"))?;
    let exec = format!("exec = [\"/bin/ls\", {:?}]", marker.display().to_string());
    daemon.enrol(&text.replace("http = \"/healthz\"", &exec))?;
    daemon.signal(Signal::SIGHUP)?;
    let says = |what: &str| daemon.run(&["status"]).is_ok_and(|status| status.stdout.contains(what));
    let failed = "payments.shop is unhealthy here: its check fails: exit status: 2";
    until(DEADLINE, "the reason in meshd status", || says(failed) && says("No such file or directory"))?;
    fs::write(&marker, "")?;
    bed.is_registered("api-1")?;
    fs::remove_file(&marker)?;
    until(DEADLINE, "it to be registered as unhealthy", || {
        bed.registered("api-1").is_some_and(|it| it["health"] == "unhealthy")
    })?;
    bed.is_used_by_web("api-1", false)?;
    fs::write(&marker, "")?;
    bed.is_registered("api-1")?;
    bed.answers("api-1")
}
