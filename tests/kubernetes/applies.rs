//! `meshd get`, `apply` and `delete` with real backends: what is applied is reachable, nobody's change is lost, what may not be
//! is named.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
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
use meshd_tests::process::Finished;
use meshd_tests::wait::until;
use serde_json::{Value, json};

use crate::DEADLINE;

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes");
const MESH_SYSTEM: &str = "meshd-system";

/// A backend that the daemon may read, and somebody else may write.
pub(crate) struct Backend {
    pub(crate) name: &'static str,
    /// Its `[[source]]`.
    source: String,
    /// What shows the writer on the command line.
    writer: Vec<String>,
    pub(crate) server: Server,
}

/// Runs as long as it is here.
pub(crate) enum Server {
    Etcd(Etcd),
    Consul(Consul),
    Kubernetes(Box<Cluster>),
}

impl Server {
    pub(crate) fn kill(&mut self) -> Result<()> {
        match self {
            Server::Etcd(etcd) => etcd.kill_member(0),
            Server::Consul(consul) => consul.kill(),
            Server::Kubernetes(cluster) => cluster.kill_apiserver(),
        }
    }
}

pub(crate) fn etcd(host: &Host) -> Result<Backend> {
    let etcd = Etcd::start(host, 1)?;
    let (cert, key) = etcd.add_user("reader", "/meshd-discovery/")?;
    let only_reads = [
        ["role", "revoke-permission", "reader", "--prefix=true", "/meshd-discovery/"].as_slice(),
        ["role", "grant-permission", "reader", "read", "--prefix=true", "/meshd-discovery/"].as_slice(),
    ];
    for change in only_reads {
        etcd.ctl("root", change)?.expect_success("a right to read alone")?;
    }
    let (writer, writer_key) = etcd.add_user("writer", "/meshd-discovery/")?;
    for (who, right) in [("reader", "read"), ("writer", "readwrite")] {
        let grant = ["role", "grant-permission", who, right, "--prefix=true", "/meshd-resources/"];
        etcd.ctl("root", &grant)?.expect_success("a right to policies")?;
    }
    for file in [&cert, &key, &etcd.authority()] {
        chown(file, Some(UID), Some(UID))?;
    }
    let source = format!(
        "[[source]]\nkind = \"etcd\"\nendpoints = {:?}\nauthority = [\"shop\"]\nca = {:?}\ncert = {cert:?}\nkey = {key:?}\n",
        etcd.endpoints(),
        etcd.authority(),
    );
    let writer = ["--cert", &shown(&writer), "--key", &shown(&writer_key)].map(str::to_owned).to_vec();
    Ok(Backend { name: "etcd", source, writer, server: Server::Etcd(etcd) })
}

pub(crate) fn consul(host: &Host) -> Result<Backend> {
    let consul = Consul::start(host)?;
    let rules = |policy: &str| {
        format!(
            "service_prefix \"\" {{ policy = \"read\" }} node_prefix \"\" {{ policy = \"read\" }} key_prefix \
             \"meshd-discovery/v1/\" {{ policy = \"{policy}\" }} key_prefix \"meshd-resources/v1/\" {{ policy = \
             \"{policy}\" }}"
        )
    };
    let token = |name: &str, policy: &str| -> Result<PathBuf> {
        let file = host.directory().join(format!("consul.{name}"));
        fs::write(&file, consul.token(name, &rules(policy))?)?;
        chown(&file, Some(UID), Some(UID))?;
        Ok(file)
    };
    chown(consul.authority(), Some(UID), Some(UID))?;
    let source = format!(
        "[[source]]\nkind = \"consul\"\naddress = {:?}\nca = {:?}\ntoken_file = {:?}\nauthority = [\"shop\"]\n",
        consul.url(),
        consul.authority(),
        token("reader", "read")?,
    );
    let writer = vec!["--token-file".to_owned(), shown(&token("writer", "write")?)];
    Ok(Backend { name: "consul", source, writer, server: Server::Consul(consul) })
}

pub(crate) fn kubernetes(host: &Host) -> Result<Backend> {
    let cluster = Cluster::start(host)?;
    for file in ["reader.yaml", "editor.yaml"] {
        cluster.apply(&Path::new(DEPLOY).join(file))?;
    }
    teach(&cluster)?;
    cluster.create("/api/v1/namespaces", &json!({ "metadata": { "name": "shop" } }))?;
    let accounts = format!("/api/v1/namespaces/{MESH_SYSTEM}/serviceaccounts");
    cluster.create(&accounts, &json!({ "metadata": { "name": "editor" } }))?;
    let binding = json!({
        "metadata": { "name": "editor" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "meshd-editor" },
        "subjects": [{ "kind": "ServiceAccount", "name": "editor", "namespace": MESH_SYSTEM }],
    });
    cluster.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding)?;
    let kubeconfig = |account: &str| -> Result<PathBuf> {
        let file = host.directory().join(format!("kubeconfig.{account}"));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{ "name": "it", "cluster": {
                "server": cluster.url(), "certificate-authority": cluster.authority() } }],
            "users": [{ "name": "it", "user": { "token": cluster.token((MESH_SYSTEM, account), ISSUER, None)? } }],
            "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
        });
        fs::write(&file, config.to_string())?;
        chown(&file, Some(UID), Some(UID))?;
        Ok(file)
    };
    chown(cluster.authority(), Some(UID), Some(UID))?;
    let source = format!(
        "[[source]]\nkind = \"kubernetes\"\nkubeconfig = {:?}\nauthority = [\"shop\"]\n",
        kubeconfig("meshd-reader")?
    );
    let writer = vec!["--kubeconfig".to_owned(), shown(&kubeconfig("editor")?)];
    Ok(Backend { name: "kubernetes", source, writer, server: Server::Kubernetes(Box::new(cluster)) })
}

/// Our kinds, and waits until the server knows them.
fn teach(cluster: &Cluster) -> Result<()> {
    cluster.apply(&Path::new(DEPLOY).join("crds.yaml"))?;
    let is_served = |plural: &str| cluster.get(&format!("/apis/meshd.dev/v1alpha1/{plural}")).is_ok();
    until(DEADLINE, "our kinds are served", || ["meshservices", "servicepolicies"].into_iter().all(is_served))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A mesh whose web knows services from these backends alone.
pub(crate) struct Bed {
    pub(crate) mesh: Mesh,
    pub(crate) backends: Vec<Backend>,
}

impl Bed {
    pub(crate) fn make(backends: &[fn(&Host) -> Result<Backend>]) -> Result<Self> {
        let lab = Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store"])?);
        let mut mesh = Mesh::prepare(lab.clone(), Plan::shop())?;
        let backends = backends.iter().map(|start| start(&lab.host("store"))).collect::<Result<Vec<_>>>()?;
        let config = mesh.daemon("web").config();
        let text = fs::read_to_string(&config)?;
        let (before, _) = text.split_once("[[source]]").context("no source in meshd.toml")?;
        let sources: String = backends.iter().map(|backend| backend.source.clone()).collect();
        fs::write(&config, format!("imports = [\"*\"]\n{before}{sources}"))?;
        mesh.start_pki()?;
        mesh.join_all()?;
        mesh.start_all()?;
        Ok(Self { mesh, backends })
    }

    /// `payments` at these hosts, with nothing on the lines that a test names.
    pub(crate) fn payments(&self, hosts: &[&str]) -> String {
        let mut text = String::from(
            "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata:\n  name: payments\n  namespace: shop\nspec:\n  ports:\n    \
             - port: 80   # the shop's\n  endpoints:\n",
        );
        for host in hosts {
            text += &format!("    - address: {}\n", self.mesh.host(host).address());
        }
        text
    }

    fn file(&self, name: &str, text: &str) -> Result<String> {
        let path = self.mesh.host("store").directory().join(name);
        fs::write(&path, text)?;
        Ok(shown(&path))
    }

    /// A verb with what shows the writer of a backend.
    fn run(&self, backend: &Backend, verb: &[&str]) -> Result<Finished> {
        let mut words = verb.to_vec();
        words.extend(["--source", backend.name]);
        words.extend(backend.writer.iter().map(String::as_str));
        self.mesh.daemon("web").run(&words)
    }

    fn says(&self, backend: &Backend, verb: &[&str], expected: &str) -> Result<String> {
        let said = self.run(backend, verb)?.expect_success(&format!("meshd {}", verb.join(" ")))?;
        ensure!(said.contains(expected), "no `{expected}` in:\n{said}");
        Ok(said)
    }

    fn refuses(&self, backend: &Backend, verb: &[&str], expected: &str) -> Result<()> {
        refused(&self.run(backend, verb)?, expected)
    }

    pub(crate) fn applies(&self, backend: &Backend, text: &str, expected: &str) -> Result<String> {
        self.says(backend, &["apply", "-f", &self.file("payments.yaml", text)?], expected)
    }

    /// What a backend has, with the rest of what `get` says of it.
    fn get(&self, backend: &Backend, name: &str) -> Result<Value> {
        let rows = self.says(backend, &["get", "msvc", name, "-o", "json"], "[")?;
        Ok(serde_json::from_str::<Value>(&rows)?[0].take())
    }

    /// Waits until that host answers.
    pub(crate) fn answers(&self, host: &str) -> Result<()> {
        let web = self.mesh.daemon("web");
        let asks = || self.mesh.curl("web", "checkout", &["-sS", "--max-time", "5", "http://payments.shop.mesh/"]);
        until(DEADLINE, &format!("an answer of {host}"), || asks().is_ok_and(|done| done.stdout.contains(host)))
            .with_context(|| format!("{:?} {:?}", asks(), web.json("status").map(|status| status["sources"].clone())))
    }

    pub(crate) fn endpoints(&self, service: &str) -> Result<Vec<Value>> {
        let rows = self.mesh.daemon("web").json("endpoints")?;
        let rows = rows.as_array().context("no rows")?.iter();
        Ok(rows.filter(|row| row["service"] == service).cloned().collect())
    }

    pub(crate) fn waits_for(&self, what: &str, service: &str, holds: impl Fn(&[Value]) -> bool) -> Result<()> {
        until(DEADLINE, what, || self.endpoints(service).is_ok_and(|rows| holds(&rows)))
            .with_context(|| format!("{:?}", self.endpoints(service)))
    }
}

fn refused(finished: &Finished, expected: &str) -> Result<()> {
    ensure!(finished.exit_code() == Some(1), "{finished:?}");
    ensure!(finished.stderr.contains(expected), "no `{expected}` in:\n{}", finished.stderr);
    Ok(())
}

/// Another service with so many places that losing `payments` loses less than half.
fn stock() -> String {
    let places: String = (1..=8).map(|n| format!("    - address: 10.99.0.{n}\n")).collect();
    format!(
        "apiVersion: meshd.dev/v1alpha1\nkind: MeshService\nmetadata: {{ name: stock, namespace: shop }}\nspec:\n  ports:\n    \
         - port: 80\n  endpoints:\n{places}"
    )
}

/// From nothing to nothing again.
fn lives_and_dies(bed: &Bed) -> Result<()> {
    let backend = &bed.backends[0];
    let payments = bed.payments(&["api-1"]);
    let file = bed.file("payments.yaml", &payments)?;
    bed.says(backend, &["apply", "-f", &file, "--dry-run"], "created in")?;
    bed.refuses(backend, &["get", "msvc", "payments.shop"], "there is no meshservice/payments.shop")?;
    let wrong = bed.file("wrong.yaml", &payments.replace("port: 80", "port: eighty"))?;
    bed.refuses(backend, &["apply", "-f", &file, &wrong], "wrong.yaml:8: spec.ports[0].port: ")?;
    bed.refuses(backend, &["get", "msvc", "payments.shop"], "there is no meshservice/payments.shop")?;
    let copy = bed.file("copy.yaml", &payments)?;
    bed.refuses(backend, &["apply", "-f", &file, &copy], "meshservice/payments.shop is also at ")?;
    // With what the daemon itself has.
    refused(&bed.mesh.daemon("web").run(&["apply", "-f", &file])?, "denied: ")?;

    if backend.name != "consul" {
        refused(&bed.mesh.daemon("web").run(&["apply", "-f", &file, "--dry-run"])?, "denied: ")?;
    }

    let both = bed.file("both.yaml", &format!("{}---\n{payments}", stock()))?;
    let made = bed.says(backend, &["apply", "-f", &both], "meshservice/stock.shop created")?;
    ensure!(made.contains("meshservice/payments.shop created"), "{made}");
    bed.answers("api-1")?;
    bed.applies(backend, &payments, "unchanged")?;
    let read =
        bed.says(backend, &["get", "meshservices", "payments", "-n", "shop", "-o", "yaml"], "resourceVersion: ")?;
    bed.applies(backend, &bed.payments(&["api-2"]), "changed")?;
    bed.answers("api-2")?;
    let edited = bed.file("edited.yaml", &read.replace("port: 80", "port: 80\n    protocol: http"))?;
    bed.refuses(backend, &["apply", "-f", &edited], "conflict: meshservice/payments.shop was changed meanwhile by ")?;
    bed.refuses(backend, &["delete", "-f", &edited], "conflict: ")?;
    bed.says(backend, &["apply", "-f", &edited, "--force"], "changed")?;
    bed.answers("api-1")?;

    bed.says(backend, &["delete", "msvc", "payments.shop"], "meshservice/payments.shop deleted")?;
    bed.waits_for("it is gone, as more than half is left", "payments.shop", <[Value]>::is_empty)?;
    bed.refuses(backend, &["delete", "msvc", "payments.shop"], "not there: ")?;
    // Nothing at all is doubted for a minute, unless somebody says that it is meant.
    bed.says(backend, &["delete", "msvc", "stock.shop"], "meshservice/stock.shop deleted")?;
    bed.waits_for("its places are doubted to be gone", "stock.shop", |rows| {
        rows.len() == 8 && rows.iter().all(|row| row["stale"] == true)
    })?;
    bed.mesh.daemon("web").run(&["endpoints", "--accept", backend.name])?.expect_success("the loss is accepted")?;
    ensure!(bed.endpoints("stock.shop")?.is_empty(), "{:?}", bed.endpoints("stock.shop"));
    Ok(())
}

/// Two at a time, each making its change of what it read, and once more of what it reads then where it comes too late.
fn no_change_is_lost(bed: &Bed) -> Result<()> {
    const WRITERS: usize = 2;
    const CHANGES: usize = 4;
    let backend = &bed.backends[0];
    bed.applies(backend, &bed.payments(&["api-1"]), "created")?;
    let change = |writer: usize| -> Result<()> {
        let mut done = 0;
        while done < CHANGES {
            let mut document = bed.get(backend, "payments.shop")?["document"].take();
            let place = &mut document["spec"]["endpoints"][0];
            place["weight"] = (place["weight"].as_u64().unwrap_or(100) + 1).into();
            let file = bed.file(&format!("writer-{writer}.json"), &document.to_string())?;
            let applied = bed.run(backend, &["apply", "-f", &file])?;
            match applied.success() {
                true if applied.stdout.contains(" changed in ") => done += 1,
                // The other one made the same change, of the same version: this one made none.
                true => ensure!(applied.stdout.contains(" unchanged in "), "{applied:?}"),
                false => refused(&applied, "conflict: ")?,
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(move || change(writer))).collect();
        let join = |writer: std::thread::ScopedJoinHandle<'_, Result<()>>| writer.join().expect("a writer panicked");
        writers.into_iter().try_for_each(join)
    })?;
    let weight = bed.get(backend, "payments.shop")?["document"]["spec"]["endpoints"][0]["weight"].clone();
    ensure!(weight == 100 + WRITERS * CHANGES, "a change was lost: {weight}");
    Ok(())
}

#[test]
fn a_document_applied_to_etcd_is_reachable_until_it_is_deleted_and_no_change_is_lost() -> Result<()> {
    let bed = Bed::make(&[etcd])?;
    lives_and_dies(&bed)?;
    no_change_is_lost(&bed)
}

#[test]
fn a_document_applied_to_consul_is_reachable_until_it_is_deleted_and_no_change_is_lost() -> Result<()> {
    let bed = Bed::make(&[consul])?;
    lives_and_dies(&bed)?;
    no_change_is_lost(&bed)
}

#[test]
fn a_document_applied_to_kubernetes_is_reachable_until_it_is_deleted_and_no_change_is_lost() -> Result<()> {
    let bed = Bed::make(&[kubernetes])?;
    lives_and_dies(&bed)?;
    no_change_is_lost(&bed)
}

#[test]
fn all_backends_show_the_same_and_what_a_document_leaves_out_is_gone() -> Result<()> {
    let bed = Bed::make(&[etcd, consul, kubernetes])?;
    let payments = bed.payments(&["api-1", "api-2"]);
    let file = bed.file("payments.yaml", &payments)?;
    let which = bed.mesh.daemon("web").run(&["apply", "-f", &file])?;
    refused(&which, "say --source with one of `etcd`, `consul`, `kubernetes`")?;
    let policy = bed.file("policy.yaml", POLICY)?;
    for backend in &bed.backends {
        bed.applies(backend, &payments, "created")?;
        bed.says(backend, &["apply", "-f", &policy], "servicepolicy/payments.shop created")?;
        bed.says(backend, &["apply", "-f", &policy], "servicepolicy/payments.shop unchanged")?;
    }
    let service = shown_by_all(&bed, "meshservices")?;
    ensure!(service["spec"]["endpoints"].as_array().is_some_and(|places| places.len() == 2), "{service}");
    let policy = shown_by_all(&bed, "svcpol")?;
    ensure!(policy["spec"]["timeouts"] == json!({ "connect": "1s" }), "{policy}");

    let one = bed.mesh.daemon("web").run(&["get", "msvc", "payments.shop"])?.expect_success("meshd get of one")?;
    ensure!(one.lines().count() == 4 && one.contains("80 at 2 endpoints"), "{one}");

    let Some(Server::Kubernetes(cluster)) = bed.backends.last().map(|backend| &backend.server) else {
        anyhow::bail!("no cluster")
    };
    // Somebody who goes by curl.
    let path = "/apis/meshd.dev/v1alpha1/namespaces/shop/meshservices/payments";
    let backend = &bed.backends[2];
    let read = bed.says(backend, &["get", "msvc", "payments.shop", "-o", "yaml"], "resourceVersion: ")?;
    let change = json!({ "spec": { "ports": [{ "port": 81 }], "allowPlaintext": true } });
    cluster.change("PATCH", path, &change)?;
    let of_before = bed.file("before.yaml", &read.replace("port: 80", "port: 82"))?;
    bed.refuses(
        backend,
        &["apply", "-f", &of_before],
        "conflict: meshservice/payments.shop was changed meanwhile by curl ",
    )?;
    let edited = bed.file("edited.yaml", &payments.replace("port: 80", "port: 82"))?;
    bed.says(backend, &["apply", "-f", &edited], "changed in kubernetes, over what curl ")?;
    let now = bed.get(backend, "payments.shop")?["document"]["spec"].take();
    ensure!(now["ports"] == json!([{ "port": 82 }]) && now["allowPlaintext"].is_null(), "{now}");
    bed.says(backend, &["apply", "-f", &edited], "unchanged")?;
    Ok(())
}

const POLICY: &str = "\
apiVersion: meshd.dev/v1alpha1
kind: ServicePolicy
metadata: { name: payments, namespace: shop }
spec:
  targetRef: { group: meshd.dev, kind: MeshService, name: payments }
  timeouts: { connect: 1s }
";

/// The only document of a kind, which all three have. The daemon's own credentials are enough.
fn shown_by_all(bed: &Bed, kind: &str) -> Result<Value> {
    let rows = bed.mesh.daemon("web").run(&["get", kind, "-n", "shop", "-o", "json"])?;
    let rows: Vec<Value> = serde_json::from_str(&rows.expect_success("meshd get of all")?)?;
    let mut documents: Vec<Value> = rows.iter().map(|row| without_version(&row["document"])).collect();
    ensure!(rows.len() == 3 && documents.windows(2).all(|two| two[0] == two[1]), "{rows:#?}");
    Ok(documents.remove(0))
}

fn without_version(document: &Value) -> Value {
    let mut document = document.clone();
    if let Some(metadata) = document["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    document
}
