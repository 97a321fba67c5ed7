//! Many hosts follow one backend while it changes all the time: every one ends up with what was written last. With
//! `MESHD_SOAK` in the size that docs/benchmarks.md has figures of.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::binaries;
use meshd_tests::consul::Consul;
use meshd_tests::daemon::UID;
use meshd_tests::etcd::Etcd;
use meshd_tests::host::Host;
use meshd_tests::kubernetes::{Cluster, ISSUER};
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::process::{Finished, Process, Program};
use meshd_tests::wait::until;
use serde_json::Value;

const SHORT: [&str; 10] = ["--services", "100", "--hosts", "20", "--imports", "20", "--rate", "100", "--seconds", "5"];
/// So many of all services are followed by the real host, with the one that is measured.
const IMPORTS: usize = 50;

/// What a failing run is bounded by: a thousand services are not written in a minute everywhere.
const PATIENCE: Duration = Duration::from_secs(600);

/// A host with a backend, one with the program that is many others, and a mesh whose `web` knows services from that
/// backend alone.
struct Bed {
    lab: Arc<Lab>,
    /// Files that meshd on `web` reads, too.
    shown: Vec<PathBuf>,
}

impl Bed {
    fn make() -> Result<Self> {
        Ok(Self { lab: Arc::new(Lab::new(&["pki", "web", "api-1", "api-2", "store", "hosts"])?), shown: Vec::new() })
    }

    fn store(&self) -> Host {
        self.lab.host("store")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.lab.host("hosts").directory().join(name)
    }

    /// `source` and `writer` are tables of TOML without their heads.
    fn run(&self, source: &str, writer: &str) -> Result<()> {
        let config = self.file("scale.toml");
        fs::write(&config, format!("[source]\n{source}authority = [\"scale\", \"shop\"]\n[writer]\n{writer}"))?;
        let mesh = self.mesh(source)?;
        let many: &[&str] = if is_long() { &[] } else { &SHORT };
        let mut others = self.follow(&config, many)?;
        let changing = || others.stdout().contains("changing") || !others.is_running();
        until(PATIENCE, "all others to know what they import", changing)?;
        self.connect_first(&mesh, &config)?;
        let report = figures(others.finish(PATIENCE)?)?;
        ensure!(report["seen"].as_u64() > Some(0), "no change was seen: {report}");
        if is_long() {
            // The backend has the services already.
            figures(self.follow(&config, &["--hosts", "1", "--imports", "0", "--filled"])?.finish(PATIENCE)?)?;
        }
        Ok(())
    }

    fn follow(&self, config: &Path, sizes: &[&str]) -> Result<Process> {
        let program = Program::new("sh").args(["-c", "ulimit -Sn $(ulimit -Hn) && exec \"$0\" \"$@\""]);
        let program = program.arg(scale()?).arg(config).arg("follow").args(sizes);
        self.lab.host("hosts").spawn(&program)
    }

    /// A program of the mesh connects while its service moves, beside all the other hosts and changes.
    fn connect_first(&self, mesh: &Mesh, config: &Path) -> Result<()> {
        let between = ["api-1", "api-2"].map(|host| mesh.host(host).address().to_string());
        let seconds = if is_long() { "25" } else { "3" };
        let program = Program::new(scale()?).arg(config);
        let program =
            program.args(["first", "--service", "payments.shop", "--seconds", seconds, "--between"]).args(between);
        // Its user may read what writing takes, and its unit is in the mesh.
        let report = figures(mesh.host("web").spawn(&program.unit("checkout.service"))?.finish(PATIENCE)?)?;
        ensure!(report["failed"] == 0, "connections failed: {report}");
        ensure!(report["changes"].as_u64() > Some(0), "no change was seen: {report}");
        Ok(())
    }

    fn mesh(&self, source: &str) -> Result<Mesh> {
        let mut mesh = Mesh::prepare(self.lab.clone(), Plan::shop())?;
        for file in &self.shown {
            chown(file, Some(UID), Some(UID))?;
        }
        let config = mesh.daemon("web").config();
        let text = fs::read_to_string(&config)?;
        let text = text.split("[[source]]").next().unwrap_or_default();
        let mut imports: Vec<String> = (1..IMPORTS).map(|service| format!("s{service}.scale")).collect();
        imports.push("payments.shop".to_owned());
        let text = format!("imports = {imports:?}\n{text}\n[[source]]\n{source}authority = [\"scale\", \"shop\"]\n");
        fs::write(&config, text)?;
        mesh.start_pki()?;
        mesh.join_all()?;
        mesh.start_all()?;
        Ok(mesh)
    }
}

fn figures(finished: Finished) -> Result<Value> {
    let output = finished.expect_success("scale")?;
    let report = output.lines().last().unwrap_or_default();
    println!("figure: {report}");
    serde_json::from_str(report).with_context(|| output.clone())
}

fn is_long() -> bool {
    std::env::var_os("MESHD_SOAK").is_some()
}

/// Built for speed where it is measured.
fn scale() -> Result<PathBuf> {
    let built = binaries::directory()?;
    Ok(if is_long() { built.with_file_name("release") } else { built }.join("scale"))
}

#[test]
fn many_hosts_follow_etcd() -> Result<()> {
    let mut bed = Bed::make()?;
    let etcd = Etcd::start(&bed.store(), 3)?;
    let (cert, key) = etcd.add_user("reader", "/meshd-discovery/")?;
    let access = format!("ca = {:?}\ncert = {cert:?}\nkey = {key:?}\n", etcd.authority());
    bed.shown = vec![cert.clone(), key.clone(), etcd.authority()];
    let endpoints = etcd.endpoints();
    let url = &endpoints[0];
    bed.run(
        &format!("kind = \"etcd\"\nendpoints = {endpoints:?}\n{access}"),
        &format!("kind = \"etcd\"\nurl = {url:?}\n{access}"),
    )
}

#[test]
fn many_hosts_follow_consul() -> Result<()> {
    let mut bed = Bed::make()?;
    let consul = Consul::start(&bed.store())?;
    let rules = "service_prefix \"\" { policy = \"write\" } node_prefix \"\" { policy = \"write\" } \
                 key_prefix \"meshd-discovery/v1/\" { policy = \"write\" }";
    let token = consul.token("hosts", rules)?;
    let token_file = bed.file("token");
    fs::write(&token_file, &token)?;
    let (url, ca) = (consul.url(), consul.authority());
    bed.shown = vec![token_file.clone(), ca.clone()];
    bed.run(
        &format!("kind = \"consul\"\naddress = {url:?}\nca = {ca:?}\ntoken_file = {token_file:?}\n"),
        &format!("kind = \"consul\"\nurl = {url:?}\nca = {ca:?}\ntoken = {token:?}\n"),
    )
}

#[test]
fn many_hosts_follow_kubernetes() -> Result<()> {
    let mut bed = Bed::make()?;
    let cluster = Cluster::start(&bed.store())?;
    cluster.apply(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/reader.yaml"))?;
    let (token, kubeconfig) = (bed.file("token"), bed.file("kubeconfig"));
    fs::write(&token, cluster.token(("meshd-system", "meshd-reader"), ISSUER, None)?)?;
    let (url, ca) = (cluster.url(), cluster.authority());
    let (cert, key) = cluster.administrator();
    bed.shown = vec![token.clone(), kubeconfig.clone(), ca.clone()];
    let config = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "clusters": [{ "name": "it", "cluster": { "server": url, "certificate-authority": ca } }],
        "users": [{ "name": "it", "user": { "tokenFile": token } }],
        "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "it" } }],
    });
    fs::write(&kubeconfig, config.to_string())?;
    bed.run(
        &format!("kind = \"kubernetes\"\nkubeconfig = {kubeconfig:?}\n"),
        &format!("kind = \"kubernetes\"\nurl = {url:?}\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\n"),
    )
}
