//! Services and endpoints from a real Kubernetes API and its controllers: followed at once, and kept when it fails, empties
//! or goes. The pods are hosts of the mesh, which take HBONE as Istio's ztunnel does.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::authority::Authority;
use meshd_tests::daemon::UID;
use meshd_tests::dns;
use meshd_tests::kubernetes::{Cluster, ISSUER};
use meshd_tests::lab::Lab;
use meshd_tests::load::Load;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{DEADLINE, DNS};

const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kubernetes/reader.yaml");
const ACCOUNT: (&str, &str) = ("meshd-system", "meshd-reader");
const BINDING: &str = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/meshd-reader";
const BINDING_IN_SHOP: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/shop/rolebindings/meshd-reader";
const SERVICES: &str = "/api/v1/namespaces/shop/services";
const PODS: &str = "/api/v1/namespaces/shop/pods";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices";

/// A mesh whose web knows services from Kubernetes alone.
struct Bed {
    mesh: Mesh,
    cluster: Cluster,
    /// Of web's kubeconfig.
    token: PathBuf,
}

impl Bed {
    fn make() -> Result<Self> {
        Self::importing(&["payments.shop", "ledger.shop"])
    }

    fn importing<S: AsRef<str>>(imports: &[S]) -> Result<Self> {
        let imports: Vec<&str> = imports.iter().map(AsRef::as_ref).collect();
        Self::make_with(&format!("imports = {imports:?}\n"))
    }

    /// `more` of the top of web's meshd.toml.
    fn make_with(more: &str) -> Result<Self> {
        let lab = Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store"])?);
        let mesh = Mesh::prepare(lab.clone(), Plan::shop())?;
        let mut cluster = Cluster::start(&lab.host("store"))?;
        cluster.start_controllers()?;
        let token = mesh.daemon("web").etc("kubernetes.token");
        let mut bed = Self { mesh, cluster, token };
        bed.populate()?;
        let kubeconfig = bed.write_kubeconfig(&bed.cluster.authority())?;
        let config = bed.mesh.daemon("web").config();
        let text = fs::read_to_string(&config)?;
        let source =
            format!("\n[[source]]\nkind = \"kubernetes\"\nkubeconfig = {kubeconfig:?}\nauthority = [\"shop\"]\n");
        let text = text.split("[[source]]").next().unwrap_or_default();
        fs::write(&config, format!("{more}{text}{source}"))?;
        for api in ["api-1", "api-2"] {
            let config = bed.mesh.daemon(api).config();
            let text = fs::read_to_string(&config)?;
            // ztunnel names nobody when it dials a pod.
            let shown = "[proxy]\ndefault_identity = \"ns/shop/sa/payments\"\n";
            fs::write(&config, text.replace("[proxy]\n", shown))?;
        }
        bed.mesh.start_pki()?;
        bed.mesh.join_all()?;
        bed.mesh.start_all()?;
        bed.answers("api-1")?;
        Ok(bed)
    }

    /// What an operator applies: who may read, a Service, and a pod behind it.
    fn populate(&self) -> Result<()> {
        self.cluster.apply(Path::new(READER))?;
        self.renew_token()?;
        self.cluster.create_service_account("shop", "payments")?;
        let service = json!({
            "metadata": { "name": "payments" },
            "spec": { "selector": { "app": "payments" }, "ports": [{ "port": 80, "targetPort": 8080 }] },
        });
        self.cluster.create(SERVICES, &service)?;
        for (node, zone) in [("api-1", "rack-1"), ("api-2", "rack-2")] {
            let labels = json!({ "topology.kubernetes.io/zone": zone });
            self.cluster.create("/api/v1/nodes", &json!({ "metadata": { "name": node, "labels": labels } }))?;
        }
        self.run_pod("api-1")
    }

    fn renew_token(&self) -> Result<()> {
        fs::write(&self.token, self.cluster.token(ACCOUNT, ISSUER, None)?)?;
        Ok(chown(&self.token, Some(UID), Some(UID))?)
    }

    /// Of a cluster whose certificates end at `authority`.
    fn write_kubeconfig(&self, authority: &Path) -> Result<PathBuf> {
        let path = self.mesh.daemon("web").etc("kubeconfig");
        let copy = self.mesh.daemon("web").etc("kubernetes-ca.pem");
        fs::copy(authority, &copy)?;
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "it",
            "clusters": [{ "name": "it", "cluster": {
                "server": self.cluster.url(), "certificate-authority": copy } }],
            "users": [{ "name": "it", "user": { "tokenFile": self.token } }],
            "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
        });
        fs::write(&path, config.to_string())?;
        for file in [&path, &copy] {
            chown(file, Some(UID), Some(UID))?;
        }
        Ok(path)
    }

    /// A pod of Istio's ambient mesh at that host, where the program itself listens on 8080.
    fn run_pod(&self, host: &str) -> Result<()> {
        let pod = json!({
            "metadata": {
                "name": format!("payments-{host}"), "labels": { "app": "payments" },
                "annotations": { "ambient.istio.io/redirection": "enabled" },
            },
            "spec": {
                "serviceAccountName": "payments", "automountServiceAccountToken": false, "nodeName": host,
                "containers": [{ "name": "main", "image": "none" }],
            },
        });
        self.cluster.run_pod("shop", &pod, &self.mesh.host(host).address().to_string())
    }

    /// It ends, and nobody says that it has ended.
    fn terminate(&self, host: &str) -> Result<()> {
        self.cluster.change("DELETE", &format!("{PODS}/payments-{host}"), &json!({ "gracePeriodSeconds": 600 }))
    }

    fn remove_pod(&self, host: &str) -> Result<()> {
        self.cluster.change("DELETE", &format!("{PODS}/payments-{host}"), &json!({ "gracePeriodSeconds": 0 }))
    }

    fn asks(&self, domain: &str) -> Result<String> {
        let url = format!("http://payments.shop.{domain}/");
        self.mesh.curl("web", "checkout", &["--max-time", "5", &url])?.expect_success("a request")
    }

    /// Waits until that host answers.
    fn answers(&self, host: &str) -> Result<()> {
        until(DEADLINE, &format!("an answer of {host}"), || self.asks("mesh").is_ok_and(|body| body.contains(host)))
            .with_context(|| format!("{:?} {:?}", self.endpoints(), self.errors()))
    }

    fn endpoints(&self) -> Result<Vec<Value>> {
        let rows = self.mesh.daemon("web").json("endpoints")?;
        Ok(rows.as_array().context("no rows")?.clone())
    }

    fn has(&self, number: usize) -> bool {
        self.endpoints().is_ok_and(|rows| rows.len() == number)
    }

    fn errors(&self) -> Result<String> {
        let status = self.mesh.daemon("web").json("status")?;
        Ok(status["sources"][0]["errors"].to_string())
    }

    fn names(&self, trouble: &str) -> Result<()> {
        let named = || self.errors().is_ok_and(|errors| errors.contains(trouble));
        until(DEADLINE, &format!("`{trouble}`"), named).with_context(|| format!("{:?}", self.errors()))
    }

    fn is_well(&self) -> Result<()> {
        let well = || self.errors().is_ok_and(|errors| errors == "[]");
        until(DEADLINE, "no trouble", well).with_context(|| format!("{:?}", self.errors()))
    }

    /// What `meshd check` on web says of it.
    fn is_checked(&self, trouble: &str) -> Result<()> {
        let check = self.mesh.daemon("web").run(&["check"])?;
        ensure!(check.stdout.contains(trouble), "not `{trouble}`:\n{}", check.stdout);
        Ok(())
    }
}

/// Of a Service without selector: one place, and how it is reached.
fn slice_of(service: &str, address: &str, annotations: &[(&str, &str)]) -> Value {
    let annotations: serde_json::Map<String, Value> =
        annotations.iter().map(|(name, text)| ((*name).to_owned(), json!(text))).collect();
    json!({
        "metadata": {
            "name": format!("{service}-place"), "labels": { "kubernetes.io/service-name": service },
            "annotations": annotations,
        },
        "addressType": "IPv4", "ports": [{ "port": 80 }], "endpoints": [{ "addresses": [address] }],
    })
}

#[test]
fn every_pod_is_replaced_under_load_and_nobody_notices() -> Result<()> {
    let bed = Bed::make()?;
    ensure!(bed.asks("svc.cluster.local")?.contains("api-1"), "the name in the cluster leads elsewhere");
    let row = &bed.endpoints()?[0];
    let shown = ["transport", "zone", "identity"].map(|field| row[field].as_str().unwrap_or_default());
    ensure!(shown[..2] == ["hbone", "rack-1"] && shown[2].ends_with("/ns/shop/sa/payments"), "{row}");
    let load = Load::start_with(&bed.mesh, 4, &["--rate", "100"])?;
    for round in 0..4 {
        let (new, old) = if round % 2 == 0 { ("api-2", "api-1") } else { ("api-1", "api-2") };
        bed.run_pod(new)?;
        load.reaches(new, 10)?;
        bed.terminate(old)?;
        let drained = |rows: &[Value]| rows.iter().filter(|row| row["weight"] == 0).count() == 1;
        until(DEADLINE, &format!("{old} takes nothing new"), || bed.endpoints().is_ok_and(|rows| drained(&rows)))?;
        load.reaches(new, 10)?;
        bed.remove_pod(old)?;
        until(DEADLINE, &format!("only {new} is known"), || bed.has(1))?;
    }
    let report = load.end()?;
    ensure!(report.failed == 0 && report.ok > 40, "{report:?}");
    Ok(())
}

#[test]
fn an_api_server_that_comes_back_empty_takes_nothing_away_and_an_operator_may_say_otherwise() -> Result<()> {
    let mut bed = Bed::make()?;
    bed.run_pod("api-2")?;
    bed.answers("api-2")?;
    let load = Load::start_with(&bed.mesh, 2, &["--rate", "50"])?;
    bed.cluster.restart_empty()?;
    // A new cluster knows nobody: until then it is trouble, named.
    bed.names("does not accept the token in ")?;
    bed.cluster.apply(Path::new(READER))?;
    bed.renew_token()?;
    until(DEADLINE, "the loss is seen, and doubted", || {
        bed.endpoints().is_ok_and(|rows| rows.len() == 2 && rows.iter().all(|row| row["stale"] == true))
    })
    .with_context(|| format!("{:?} {:?}", bed.endpoints(), bed.errors()))?;
    load.reaches("api-1", 5)?;
    load.reaches("api-2", 5)?;
    let report = load.end()?;
    ensure!(report.failed == 0, "{report:?}");
    bed.mesh.daemon("web").run(&["endpoints", "--accept", "kubernetes"])?.expect_success("the loss is accepted")?;
    ensure!(bed.has(0), "{:?}", bed.endpoints());
    Ok(())
}

#[test]
fn a_host_that_restarts_while_the_api_server_is_away_serves_from_what_it_knew() -> Result<()> {
    let mut bed = Bed::make()?;
    let saved = bed.mesh.daemon("web").config().with_file_name("").join("../state/directory/kubernetes.json");
    until(DEADLINE, "what is known is on disk", || {
        fs::read_to_string(&saved).is_ok_and(|text| text.contains(&bed.mesh.host("api-1").address().to_string()))
    })?;
    bed.cluster.kill_apiserver()?;
    bed.mesh.daemon("web").restart()?;
    bed.answers("api-1")?;
    bed.names("cannot be reached")?;
    bed.cluster.start_apiserver()?;
    bed.is_well()?;
    bed.run_pod("api-2")?;
    bed.answers("api-2")
}

#[test]
fn an_api_server_that_stands_still_or_is_cut_off_is_named_and_what_happened_meanwhile_arrives() -> Result<()> {
    let bed = Bed::make()?;
    bed.cluster.signal(Signal::SIGSTOP)?;
    bed.names("did not answer within")?;
    bed.answers("api-1")?;
    bed.cluster.signal(Signal::SIGCONT)?;
    bed.is_well()?;
    let cut = bed.mesh.host("web").black_hole(bed.mesh.lab().host("store").address())?;
    bed.names("the API server")?;
    bed.run_pod("api-2")?;
    bed.answers("api-1")?;
    drop(cut);
    bed.is_well()?;
    bed.answers("api-2")
}

#[test]
fn more_services_are_followed_than_one_connection_takes_watches() -> Result<()> {
    let names: Vec<String> = (0..60).map(|n| format!("s{n}.team-{}", n % 10)).collect();
    let bed = Bed::importing(&[&["payments.shop".to_owned()], names.as_slice()].concat())?;
    bed.is_well()?;
    // One for calls, the others with at most a hundred streams.
    let server = bed.mesh.lab().host("store").address().to_string();
    let connections = || bed.mesh.host("web").command("ss", &["-Htn", "state", "established", "dst", &server]);
    until(DEADLINE, "three connections", || connections().is_ok_and(|them| them.lines().count() == 3))
        .with_context(|| format!("{:?}", connections()))?;
    bed.cluster.create("/api/v1/namespaces", &json!({ "metadata": { "name": "team-9" } }))?;
    let place = [("meshd.dev/transport", "meshd"), ("meshd.dev/identity", "ns/team-9/sa/s59")];
    let service = json!({ "metadata": { "name": "s59" }, "spec": { "ports": [{ "port": 80 }] } });
    bed.cluster.create(&SERVICES.replace("shop", "team-9"), &service)?;
    bed.cluster.create(&SLICES.replace("shop", "team-9"), &slice_of("s59", "10.9.9.9", &place))?;
    let known = |rows: &[Value]| rows.iter().any(|row| row["dial"] == "10.9.9.9:15008");
    until(DEADLINE, "the place of the last one", || bed.endpoints().is_ok_and(|rows| known(&rows)))
        .with_context(|| format!("{:?} {:?}", bed.endpoints(), bed.errors()))
}

#[test]
fn by_a_pattern_a_cluster_is_read_in_pages_and_only_what_takes_part_is_imported() -> Result<()> {
    let bed = Bed::importing(&["*"])?;
    let row = bed.endpoints()?;
    ensure!(row.len() == 1, "{row:?}");
    let annotations = json!({ "meshd.dev/identities": "ns/shop/sa/payments" });
    let service = |n: u32| {
        let ports = json!([{ "port": 80 }]);
        let metadata = json!({ "name": format!("s{n}"), "annotations": if n.is_multiple_of(2) { &annotations } else { &Value::Null } });
        json!({ "metadata": metadata, "spec": { "clusterIP": "None", "ports": ports } })
    };
    bed.cluster.create_all(SERVICES, &(0..520).map(service).collect::<Vec<_>>())?;
    let defines = || -> Result<Value> { Ok(bed.mesh.daemon("web").json("status")?["sources"][0]["services"].clone()) };
    let all = || defines().is_ok_and(|services| services == 261);
    until(DEADLINE, "every other service by watch", all).with_context(|| format!("{:?}", defines()))?;
    bed.mesh.daemon("web").stop()?;
    fs::remove_file(bed.mesh.daemon("web").config().with_file_name("").join("../state/directory/kubernetes.json"))?;
    bed.mesh.daemon("web").start()?;
    until(DEADLINE, "every other service by list", all).with_context(|| format!("{:?}", defines()))?;
    bed.answers("api-1")
}

#[test]
fn annotations_without_meaning_are_named_and_what_was_said_before_stays() -> Result<()> {
    let bed = Bed::make()?;
    // A Service that selects no pods: who writes its slice says what is there.
    let ledger = json!({ "metadata": { "name": "ledger" }, "spec": { "ports": [{ "port": 80 }] } });
    bed.cluster.create(SERVICES, &ledger)?;
    let notes = [("meshd.dev/transport", "meshd"), ("meshd.dev/weight", "40")];
    let slice = slice_of("ledger", &bed.mesh.host("api-2").address().to_string(), &notes);
    bed.cluster.create(SLICES, &slice)?;
    let known = || bed.endpoints().is_ok_and(|rows| rows.iter().any(|row| row["weight"] == 40));
    until(DEADLINE, "the ledger's place", known)
        .with_context(|| format!("{:?} {:?}", bed.endpoints(), bed.errors()))?;
    let annotate = |path: &str, name: &str, text: &str| {
        bed.cluster.change("PATCH", path, &json!({ "metadata": { "annotations": { name: text } } }))
    };
    annotate(&format!("{SLICES}/ledger-place"), "meshd.dev/weight", "heavy")?;
    annotate(&format!("{SERVICES}/payments"), "meshd.dev/identities", "{")?;
    bed.names("EndpointSlice shop/ledger-place: annotation meshd.dev/weight: `heavy` is no such number")?;
    bed.names("Service shop/payments: annotation meshd.dev/identities: ")?;
    ensure!(known(), "{:?}", bed.endpoints());
    bed.answers("api-1")?;
    bed.is_checked("EndpointSlice shop/ledger-place")?;
    annotate(&format!("{SLICES}/ledger-place"), "meshd.dev/weight", "41")?;
    annotate(&format!("{SERVICES}/payments"), "meshd.dev/identities", "ns/shop/sa/payments")?;
    bed.is_well()
}

#[test]
fn what_the_role_lacks_and_what_tls_refuses_is_named_by_check_and_the_mesh_goes_on() -> Result<()> {
    let bed = Bed::make()?;
    bed.cluster.change("DELETE", BINDING, &json!({}))?;
    bed.names("services in namespace shop is forbidden")?;
    bed.is_checked("apply deploy/kubernetes/reader.yaml")?;
    bed.answers("api-1")?;
    let mut binding = json!({
        "metadata": { "name": "meshd-reader" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "meshd-reader" },
        "subjects": [{ "kind": "ServiceAccount", "namespace": ACCOUNT.0, "name": ACCOUNT.1 }],
    });
    // In the one namespace: which cluster it is may not be known then.
    bed.cluster.create(&BINDING_IN_SHOP.replace("/meshd-reader", ""), &binding)?;
    bed.is_well()?;
    bed.run_pod("api-2")?;
    bed.answers("api-2")?;
    binding["metadata"]["name"] = json!("meshd-reader-everywhere");
    bed.cluster.create(&BINDING.replace("/meshd-reader", ""), &binding)?;
    bed.cluster.change("DELETE", BINDING_IN_SHOP, &json!({}))?;
    bed.remove_pod("api-2")?;
    until(DEADLINE, "only api-1 is known", || bed.has(1))?;
    let web = bed.mesh.host("web");
    bed.write_kubeconfig(&Authority::create(&web, &web.directory().join("strange"))?.certificate())?;
    bed.mesh.daemon("web").restart()?;
    bed.names("TLS with the API server")?;
    bed.is_checked("TLS with the API server")?;
    bed.answers("api-1")
}

#[test]
fn a_service_is_reached_by_its_name_alone_and_what_is_not_of_the_mesh_stays_the_clusters_own() -> Result<()> {
    let bed = Bed::make_with("")?;
    bed.cluster.create(SERVICES, &json!({ "metadata": { "name": "plain" }, "spec": { "ports": [{ "port": 80 }] } }))?;
    let answer = bed.mesh.host("web").within(|| dns::ask_udp(DNS, "plain.shop.mesh"))??;
    ensure!(answer.code == dns::NO_SUCH_NAME, "{answer:?}");
    let status = bed.mesh.daemon("web").json("status")?;
    let services = status["services"].as_array().context("no services")?;
    ensure!(services.len() == 1 && services[0]["name"] == "payments.shop", "{services:?}");
    let payments = json!({ "name": "payments.shop", "why": "looked_up", "known": true });
    let imports = status["imports"].as_array().context("no imports")?;
    let is_payments = |import: &Value| ["name", "why", "known"].iter().all(|field| import[*field] == payments[*field]);
    ensure!(imports.iter().any(is_payments), "{imports:?}");
    Ok(())
}
