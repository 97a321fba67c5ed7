//! Routes and policies from real backends: taken, kept when the backend fails, empties or goes, refused with the reason.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::consul::Consul;
use meshd_tests::daemon::UID;
use meshd_tests::etcd::Etcd;
use meshd_tests::host::Host;
use meshd_tests::kubernetes::{Cluster, ISSUER};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::DEADLINE;

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes");
const PROVIDES: &str = "provides = { routes = [\"shop\"], policies = [\"shop\"] }";
pub(crate) const POLICIES: &str = "/apis/meshd.dev/v1alpha1/namespaces/shop/servicepolicies";
pub(crate) const AUTHORIZATION: &str = "/apis/meshd.dev/v1alpha1/namespaces/shop/authorizationpolicies";

pub(crate) fn authorization(name: &str) -> Value {
    json!({
        "apiVersion": "meshd.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": {
            "targetRef": { "kind": "Service", "name": "payments" }, "action": "audit",
            "rules": [{ "from": [{ "namespaces": [name] }] }],
        },
    })
}

pub(crate) fn policy() -> Value {
    json!({
        "apiVersion": "meshd.dev/v1alpha1", "kind": "ServicePolicy",
        "metadata": { "name": "payments", "namespace": "shop" },
        "spec": { "targetRef": { "kind": "Service", "name": "payments" }, "timeouts": { "request": "10s" } },
    })
}

/// A backend whose documents web reads.
trait Backend: Sized {
    const KIND: &'static str;

    fn start(host: &Host) -> Result<Self>;
    /// Its `[[source]]`, without what it provides.
    fn source(&self, mesh: &Mesh) -> Result<String>;
    fn write(&self, document: &Value) -> Result<()>;
    fn write_bad(&self) -> Result<()>;
    fn remove(&self, kind: &str, names: &[&str]) -> Result<()>;
    fn stop(&self, signal: Signal) -> Result<()>;
}

fn path_of(document: &Value) -> String {
    let kind = document["kind"].as_str().unwrap_or_default().to_lowercase();
    format!("shop/{kind}/{}", document["metadata"]["name"].as_str().unwrap_or_default())
}

impl Backend for Etcd {
    const KIND: &'static str = "etcd";

    fn start(host: &Host) -> Result<Self> {
        Etcd::start(host, 1)
    }

    fn source(&self, _: &Mesh) -> Result<String> {
        let (cert, key) = self.add_user("reader", "/meshd-")?;
        for file in [&cert, &key, &self.authority()] {
            chown(file, Some(UID), Some(UID))?;
        }
        Ok(format!(
            "kind = \"etcd\"\nendpoints = {:?}\nca = {:?}\ncert = {cert:?}\nkey = {key:?}\n",
            self.endpoints(),
            self.authority()
        ))
    }

    fn write(&self, document: &Value) -> Result<()> {
        let key = format!("/meshd-resources/v1/{}", path_of(document));
        self.ctl("root", &["put", &key, &document.to_string()])?.expect_success("a write").map(drop)
    }

    fn write_bad(&self) -> Result<()> {
        let key = "/meshd-resources/v1/shop/servicepolicy/payments";
        self.ctl("root", &["put", key, "kind: ServicePolicy"])?.expect_success("a write").map(drop)
    }

    fn remove(&self, kind: &str, names: &[&str]) -> Result<()> {
        for name in names {
            let key = format!("/meshd-resources/v1/shop/{kind}/{name}");
            self.ctl("root", &["del", &key])?.expect_success("a delete")?;
        }
        Ok(())
    }

    fn stop(&self, signal: Signal) -> Result<()> {
        self.signal(0, signal)
    }
}

impl Backend for Consul {
    const KIND: &'static str = "consul";

    fn start(host: &Host) -> Result<Self> {
        Consul::start(host)
    }

    fn source(&self, mesh: &Mesh) -> Result<String> {
        let prefixes =
            ["discovery", "resources"].map(|kind| format!("key_prefix \"meshd-{kind}/v1/\" {{ policy = \"read\" }}"));
        let rules = format!(
            "service_prefix \"\" {{ policy = \"read\" }} node_prefix \"\" {{ policy = \"read\" }} {}",
            prefixes.join(" ")
        );
        let file = mesh.daemon("web").etc("consul.token");
        fs::write(&file, self.token("reader", &rules)?)?;
        for file in [&file, &self.authority()] {
            chown(file, Some(UID), Some(UID))?;
        }
        Ok(format!(
            "kind = \"consul\"\naddress = {:?}\nca = {:?}\ntoken_file = {file:?}\n",
            self.url(),
            self.authority()
        ))
    }

    fn write(&self, document: &Value) -> Result<()> {
        self.put_key(&format!("/v1/kv/meshd-resources/v1/{}", path_of(document)), &document.to_string())
    }

    fn write_bad(&self) -> Result<()> {
        self.put_key("/v1/kv/meshd-resources/v1/shop/servicepolicy/payments", "kind: ServicePolicy")
    }

    fn remove(&self, kind: &str, names: &[&str]) -> Result<()> {
        for name in names {
            self.manage("DELETE", &format!("/v1/kv/meshd-resources/v1/shop/{kind}/{name}"), None)?;
        }
        Ok(())
    }

    fn stop(&self, signal: Signal) -> Result<()> {
        self.signal(signal)
    }
}

impl Backend for Cluster {
    const KIND: &'static str = "kubernetes";

    fn start(host: &Host) -> Result<Self> {
        let cluster = Cluster::start(host)?;
        cluster.apply(&Path::new(DEPLOY).join("reader.yaml"))?;
        cluster.create("/api/v1/namespaces", &json!({ "metadata": { "name": "shop" } }))?;
        define(&cluster)?;
        Ok(cluster)
    }

    fn source(&self, mesh: &Mesh) -> Result<String> {
        let daemon = mesh.daemon("web");
        let (token, config) = (daemon.etc("kubernetes.token"), daemon.etc("kubeconfig"));
        fs::write(&token, self.token(("meshd-system", "meshd-reader"), ISSUER, None)?)?;
        let text = json!({
            "current-context": "mesh",
            "clusters": [{ "name": "mesh", "cluster": { "server": self.url(), "certificate-authority": self.authority() } }],
            "users": [{ "name": "mesh", "user": { "tokenFile": token } }],
            "contexts": [{ "name": "mesh", "context": { "cluster": "mesh", "user": "mesh" } }],
        });
        fs::write(&config, text.to_string())?;
        for file in [&token, &config, &self.authority()] {
            chown(file, Some(UID), Some(UID))?;
        }
        Ok(format!("kind = \"kubernetes\"\nkubeconfig = {config:?}\n"))
    }

    fn write(&self, document: &Value) -> Result<()> {
        let path = if document["kind"] == "ServicePolicy" { POLICIES } else { AUTHORIZATION };
        self.create(path, document).map(drop)
    }

    /// What the server cannot tell and hosts can: a policy is for its own namespace.
    fn write_bad(&self) -> Result<()> {
        let bad = json!({ "spec": { "targetRef": { "kind": "Namespace", "name": "bank" } } });
        self.change("PATCH", &format!("{AUTHORIZATION}/web"), &bad)
    }

    fn remove(&self, kind: &str, names: &[&str]) -> Result<()> {
        let collection = if kind == "servicepolicy" { POLICIES } else { AUTHORIZATION };
        for name in names {
            self.change("DELETE", &format!("{collection}/{name}"), &json!({}))?;
        }
        Ok(())
    }

    fn stop(&self, signal: Signal) -> Result<()> {
        self.signal(signal)
    }
}

/// Our kinds, as operators get them, and waits until the server knows them.
pub(crate) fn define(cluster: &Cluster) -> Result<()> {
    cluster.apply(&Path::new(DEPLOY).join("crds.yaml"))?;
    until(DEADLINE, "the kinds are served", || {
        [POLICIES, AUTHORIZATION, "/apis/meshd.dev/v1alpha1/meshservices"].iter().all(|path| cluster.get(path).is_ok())
    })
}

struct Bed<B> {
    mesh: Mesh,
    backend: B,
}

impl<B: Backend> Bed<B> {
    fn make() -> Result<Self> {
        let lab = Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store"])?);
        let mut mesh = Mesh::prepare(lab.clone(), Plan::shop())?;
        let backend = B::start(&lab.host("store"))?;
        let config = mesh.daemon("web").config();
        let text = fs::read_to_string(&config)?;
        fs::write(&config, format!("{text}\n[[source]]\n{}{PROVIDES}\n", backend.source(&mesh)?))?;
        backend.write(&policy())?;
        backend.write(&authorization("web"))?;
        backend.write(&authorization("backoffice"))?;
        mesh.start_pki()?;
        mesh.join_all()?;
        mesh.start_all()?;
        Ok(Self { mesh, backend })
    }

    fn status(&self) -> Result<Value> {
        self.mesh.daemon("web").json("status")
    }

    /// Of payments: its ServicePolicy, and how many decide who may call it.
    fn attached(&self) -> Result<(Option<String>, u64)> {
        let status = self.status()?;
        let mut services = status["services"].as_array().context("no services")?.iter();
        let payments = services.find(|service| service["name"] == "payments.shop").context("no payments")?;
        let policy = payments["policy"].as_str().map(str::to_owned);
        Ok((policy, payments["authorization"].as_u64().unwrap_or_default()))
    }

    fn source(&self) -> Result<Value> {
        let status = self.status()?;
        let mut sources = status["sources"].as_array().context("no sources")?.iter();
        sources.find(|source| source["kind"] == B::KIND).cloned().context("the source is not shown")
    }

    fn has(&self, policy: Option<&str>, authorization: u64) -> Result<()> {
        let expected = (policy.map(str::to_owned), authorization);
        let reached =
            until(DEADLINE, &format!("{expected:?}"), || self.attached().is_ok_and(|found| found == expected));
        reached.with_context(|| format!("{:?}\n{}", self.attached(), self.source().unwrap_or_default()))
    }
}

/// What every backend is to keep to.
fn is_taken_kept_and_refused<B: Backend>() -> Result<()> {
    let bed = Bed::<B>::make()?;
    bed.has(Some("shop/payments"), 2)?;
    // A version that is wrong is told, and the good one stays.
    bed.backend.write_bad()?;
    until(DEADLINE, "the refusal", || bed.source().is_ok_and(|source| source["refused_resources"] == 1))?;
    let errors = bed.source()?["errors"].to_string();
    ensure!(errors.contains("the last good version stays in force"), "{errors}");
    bed.has(Some("shop/payments"), 2)?;
    // So does what is lost altogether.
    bed.backend.remove("authorizationpolicy", &["web", "backoffice"])?;
    bed.backend.remove("servicepolicy", &["payments"])?;
    until(DEADLINE, "doubts", || bed.source().is_ok_and(|source| source["stale"].as_u64() >= Some(1)))?;
    ensure!(bed.attached()?.1 >= 1, "{:?}", bed.attached());
    // Also over a restart while the backend is away.
    until(DEADLINE, "it is saved", || saved::<B>(&bed.mesh))?;
    let before = bed.attached()?;
    bed.backend.stop(Signal::SIGSTOP)?;
    let daemon = bed.mesh.daemon("web");
    daemon.stop()?;
    daemon.start()?;
    // What was believed to be gone within the last seconds may not have been written down.
    until(DEADLINE, "what was known", || bed.attached().is_ok_and(|now| now.1 >= before.1 && now.0 >= before.0))?;
    bed.backend.stop(Signal::SIGCONT)
}

fn saved<B: Backend>(mesh: &Mesh) -> bool {
    let file = mesh.daemon("web").config().with_file_name("").join(format!("../state/directory/{}.json", B::KIND));
    fs::read_to_string(file).is_ok_and(|text| text.contains("AuthorizationPolicy"))
}

#[test]
fn policies_in_etcd_are_taken_kept_and_refused_with_the_reason() -> Result<()> {
    is_taken_kept_and_refused::<Etcd>()
}

#[test]
fn policies_in_consul_are_taken_kept_and_refused_with_the_reason() -> Result<()> {
    is_taken_kept_and_refused::<Consul>()
}

#[test]
fn policies_in_kubernetes_are_taken_kept_and_refused_with_the_reason() -> Result<()> {
    is_taken_kept_and_refused::<Cluster>()
}
