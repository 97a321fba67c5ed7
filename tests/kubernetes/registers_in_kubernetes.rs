//! Hosts that register what they serve in a real Kubernetes API: an EndpointSlice each, kept by a Lease; dead for readers when
//! they die, and never in each other's way.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use meshd_tests::daemon::UID;
use meshd_tests::kubernetes::{Cluster, ISSUER};
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::DEADLINE;
use crate::registering::{Registering, prepare};

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes");
const BINDING: &str = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings";
const SERVICES: &str = "/api/v1/namespaces/shop/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/meshd-system/leases";
const ENTRIES: &str = "/apis/networking.istio.io/v1/namespaces/shop/workloadentries";

/// A mesh that knows services from Kubernetes alone, where its servers register themselves.
struct Bed {
    mesh: Mesh,
    cluster: Cluster,
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
        let is_there = |it: Value| {
            it["endpoints"][0]["addresses"][0] == address && it["endpoints"][0]["conditions"]["ready"] == true
        };
        let waited =
            until(DEADLINE, &format!("{host} to be registered, and ready"), || self.slice(host).is_ok_and(is_there));
        waited.with_context(|| format!("{:?}\n{}", self.slice(host), self.mesh.daemon(host).log()))
    }

    /// Among those that the server lists: one that does not answer says nothing.
    fn is_gone(&self, host: &str) -> Result<()> {
        let name = format!("meshd.payments.{host}");
        let is_gone = |list: Value| {
            list["items"].as_array().is_some_and(|all| all.iter().all(|it| it["metadata"]["name"] != name))
        };
        until(DEADLINE, &format!("no registration of {host}"), || self.object(SLICES).is_ok_and(is_gone))?;
        ensure!(self.lease(host).is_err(), "its Lease is left: {:?}", self.lease(host));
        Ok(())
    }

    fn write_copy(&self, epoch: u64) -> Result<()> {
        let address = self.mesh.host("api-2").address().to_string();
        let copy = json!({
            "metadata": { "annotations": { "meshd.dev/epoch": epoch.to_string(), "meshd.dev/lease-holder": "copy" } },
            "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
        });
        self.cluster.change("PATCH", &format!("{SLICES}/meshd.payments.api-1"), &copy).map(drop)
    }

    fn epoch(&self, host: &str) -> Result<u64> {
        Ok(note(&self.slice(host)?, "epoch").parse()?)
    }
}

impl Bed {
    fn make() -> Result<Self> {
        Self::make_in(|_| Ok(()))
    }

    fn make_in(before: impl FnOnce(&Cluster) -> Result<()>) -> Result<Self> {
        let (lab, mesh) = prepare()?;
        let cluster = Cluster::start(&lab.host("store"))?;
        before(&cluster)?;
        let bed = Self { mesh, cluster };
        bed.populate()?;
        for (host, account) in [("web", "meshd-reader"), ("api-1", "meshd-registrar"), ("api-2", "meshd-registrar")] {
            let kubeconfig = bed.write_kubeconfig(host, account)?;
            let source = format!("kind = \"kubernetes\"\nkubeconfig = {kubeconfig:?}\nauthority = [\"shop\"]\n");
            bed.configure(host, &source)?;
        }
        bed.start()
    }

    /// What an operator applies: the roles, and a Service that selects nobody.
    fn populate(&self) -> Result<()> {
        ["reader.yaml", "registrar.yaml"]
            .iter()
            .try_for_each(|file| self.cluster.apply(&Path::new(DEPLOY).join(file)))?;
        self.cluster.create("/api/v1/namespaces", &json!({ "metadata": { "name": "shop" } }))?;
        let service = json!({
            "metadata": { "name": "payments" }, "spec": { "ports": [{ "name": "web", "port": 80, "appProtocol": "http" }] },
        });
        self.cluster.create(SERVICES, &service).map(drop)
    }

    fn write_kubeconfig(&self, host: &str, account: &str) -> Result<PathBuf> {
        let etc = |name: &str| self.mesh.daemon(host).etc(name);
        let (path, authority, token) = (etc("kubeconfig"), etc("kubernetes-ca.pem"), etc("kubernetes.token"));
        fs::copy(self.cluster.authority(), &authority)?;
        fs::write(&token, self.cluster.token(("meshd-system", account), ISSUER, None)?)?;
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{ "name": "it", "cluster": {
                "server": self.cluster.url(), "certificate-authority": authority } }],
            "users": [{ "name": "it", "user": { "tokenFile": token } }],
            "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
        });
        fs::write(&path, config.to_string())?;
        for file in [&path, &authority, &token] {
            chown(file, Some(UID), Some(UID))?;
        }
        Ok(path)
    }

    fn object(&self, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.cluster.get(path)?)?)
    }

    fn slice(&self, host: &str) -> Result<Value> {
        self.object(&format!("{SLICES}/meshd.payments.{host}"))
    }

    fn lease(&self, host: &str) -> Result<Value> {
        self.object(&format!("{LEASES}/{host}"))
    }
}

fn note<'a>(object: &'a Value, name: &str) -> &'a str {
    object["metadata"]["annotations"][format!("meshd.dev/{name}")].as_str().unwrap_or_default()
}

#[test]
fn a_host_is_found_by_what_it_serves_and_dead_for_readers_with_its_lease() -> Result<()> {
    let bed = Bed::make()?;
    let said = bed.slice("api-1")?;
    ensure!(note(&said, "identity") == bed.mesh.spiffe_id("payments") && note(&said, "mesh-port") == "15008", "{said}");
    ensure!(said["ports"][0]["name"] == "web" && said["ports"][0]["port"] == 8080, "{said}");
    ensure!(said["endpoints"][0]["zone"] == "rack-1" && note(&said, "version") == "7", "{said}");
    // So long after its last beat a dead host is dead for everybody, by what it wrote itself.
    let lease = bed.lease("api-1")?;
    ensure!(lease["spec"]["leaseDurationSeconds"].as_u64() < Some(10), "{lease}");
    ensure!(lease["spec"]["holderIdentity"] == note(&said, "lease-holder"), "{lease}");
    bed.comes_to("api-1", "held")?;
    let power = bed.dies("api-1")?;
    // Long before: a dial that fails has another endpoint tried.
    ensure!(bed.asks()?.contains("api-2"));
    bed.is_used_by_web("api-1", false)?;
    ensure!(bed.is_used("api-2"), "{:?}", bed.known());
    // Nobody took the slice away: readers know by the Lease, and are not wrong while the server is away.
    ensure!(bed.slice("api-1")?["endpoints"][0]["conditions"]["ready"] == true);
    drop(power);
    bed.mesh.daemon("api-1").start()?;
    bed.is_used_by_web("api-1", true)?;
    let now = bed.slice("api-1")?;
    ensure!(note(&now, "epoch").parse::<u64>()? > note(&said, "epoch").parse()?, "{now}");
    ensure!(bed.lease("api-1")?["spec"]["holderIdentity"] != lease["spec"]["holderIdentity"]);
    bed.answers("api-1")
}

#[test]
fn hosts_are_stopped_one_after_the_other_under_load_and_no_request_fails() -> Result<()> {
    Bed::make()?.hosts_stop_one_after_the_other_under_load()
}

#[test]
fn an_old_owner_that_goes_on_leaves_slice_and_lease_of_the_later_one_alone() -> Result<()> {
    let bed = Bed::make()?;
    bed.an_old_owner_goes_on_and_leaves_the_later_one_alone()?;
    // A copy that goes on renewing the Lease of the name: this host says so, and leaves it alone.
    let taken = json!({ "spec": { "holderIdentity": format!("api-1/{}", u64::MAX / 2), "renewTime": "2030-01-01T00:00:00.000000Z" } });
    bed.cluster.change("PATCH", &format!("{LEASES}/api-1"), &taken)?;
    bed.checks("api-1", "another meshd keeps the Lease meshd-system/api-1")?;
    // It stood still for its whole time since: this host takes it back.
    bed.comes_to("api-1", "held")
}

#[test]
fn while_the_api_server_is_away_nobody_is_dead_and_an_empty_one_is_filled_again() -> Result<()> {
    let mut bed = Bed::make()?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    bed.cluster.signal(Signal::SIGSTOP)?;
    bed.checks("web", "the API server")?;
    bed.checks("api-1", "the API server")?;
    ensure!(bed.is_used("api-1") && bed.is_used("api-2"), "{:?}", bed.known());
    bed.cluster.signal(Signal::SIGCONT)?;
    bed.comes_to("api-1", "held")?;
    bed.cluster.kill_apiserver()?;
    bed.cluster.start_apiserver()?;
    ["api-1", "api-2"].iter().try_for_each(|host| bed.comes_to(host, "held"))?;
    bed.cluster.restart_empty()?;
    bed.populate()?;
    // Tokens are bound to accounts that are gone.
    for (host, account) in [("web", "meshd-reader"), ("api-1", "meshd-registrar"), ("api-2", "meshd-registrar")] {
        bed.write_kubeconfig(host, account)?;
    }
    bed.all_are_there_again(load)
}

#[test]
fn a_host_whose_program_is_not_there_gets_no_calls_and_what_is_forbidden_or_missing_is_named() -> Result<()> {
    let bed = Bed::make()?;
    bed.a_host_without_its_program_gets_no_calls()?;
    // smtp is served there, too.
    bed.checks("api-1", "there is no Service shop/smtp in the cluster")?;
    let binding = bed.object(&format!("{BINDING}/meshd-registrar"))?;
    bed.cluster.change("DELETE", &format!("{BINDING}/meshd-registrar"), &json!({}))?;
    bed.checks("api-1", "get of endpointslices in namespace shop is forbidden")?;
    bed.checks("api-1", "apply deploy/kubernetes/registrar.yaml")?;
    let (role, subjects) = (&binding["roleRef"], &binding["subjects"]);
    let again = json!({ "metadata": { "name": "meshd-registrar" }, "roleRef": role, "subjects": subjects });
    bed.cluster.create(BINDING, &again)?;
    bed.comes_to("api-1", "held")
}

#[test]
fn where_istio_knows_workload_entries_each_healthy_host_is_one() -> Result<()> {
    let bed = Bed::make_in(|cluster| {
        cluster.create("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", &workload_entries())?;
        until(DEADLINE, "the kind to be served", || cluster.get(ENTRIES).is_ok())
    })?;
    let entry = || bed.object(&format!("{ENTRIES}/meshd.payments.api-1"));
    until(DEADLINE, "a WorkloadEntry", || entry().is_ok())?;
    let spec = entry()?["spec"].clone();
    ensure!(spec["address"] == bed.mesh.host("api-1").address().to_string() && spec["ports"]["web"] == 8080, "{spec}");
    ensure!(spec["serviceAccount"] == "payments" && spec["locality"] == "rack-1" && spec["weight"] == 100, "{spec}");
    bed.has_program("api-1", false)?;
    until(DEADLINE, "none of a host that is not well", || entry().is_err() && bed.object(ENTRIES).is_ok())?;
    bed.has_program("api-1", true)?;
    until(DEADLINE, "it again", || entry().is_ok())?;
    bed.mesh.daemon("api-1").stop()?;
    until(DEADLINE, "none of a host that left", || entry().is_err() && bed.object(ENTRIES).is_ok())
}

/// Istio's kind, with the fields of its API and nothing else.
fn workload_entries() -> Value {
    let text = || json!({ "type": "string" });
    let map = |of: Value| json!({ "type": "object", "additionalProperties": of });
    let spec = json!({
        "type": "object", "properties": {
            "address": text(), "ports": map(json!({ "type": "integer" })), "labels": map(text()), "network": text(),
            "locality": text(), "weight": { "type": "integer" }, "serviceAccount": text(),
        },
    });
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": "workloadentries.networking.istio.io" },
        "spec": {
            "group": "networking.istio.io", "scope": "Namespaced",
            "names": { "plural": "workloadentries", "singular": "workloadentry", "kind": "WorkloadEntry",
                       "listKind": "WorkloadEntryList" },
            "versions": [{
                "name": "v1", "served": true, "storage": true,
                "schema": { "openAPIV3Schema": { "type": "object", "properties": { "spec": spec } } },
            }],
        },
    })
}
