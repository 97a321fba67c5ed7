//! Many hosts follow one backend while it changes all the time: every one ends up with what was written last. With
//! `MESHD_SOAK` in the size that docs/benchmarks.md has figures of.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::binaries;
use meshd_tests::consul::Consul;
use meshd_tests::etcd::Etcd;
use meshd_tests::kubernetes::{Cluster, ISSUER};
use meshd_tests::lab::Lab;
use meshd_tests::process::Program;
use serde_json::Value;

const SHORT: [&str; 10] = ["--services", "100", "--hosts", "20", "--imports", "20", "--rate", "100", "--seconds", "5"];

/// What a failing run is bounded by: a thousand services are not written in a minute everywhere.
const PATIENCE: Duration = Duration::from_secs(600);

/// One host with a backend, another with the program that is all the others.
struct Bed {
    lab: Lab,
}

impl Bed {
    fn make() -> Result<Self> {
        Ok(Self { lab: Lab::new(&["store", "hosts"])? })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.lab.host("hosts").directory().join(name)
    }

    /// `source` and `writer` are tables of TOML without their heads.
    fn run(&self, source: &str, writer: &str) -> Result<()> {
        let config = self.file("scale.toml");
        fs::write(&config, format!("[source]\n{source}authority = [\"scale\"]\n[writer]\n{writer}"))?;
        if !is_long() {
            return self.measure(&config, &SHORT);
        }
        self.measure(&config, &[])?;
        // The backend has the services already.
        self.measure(&config, &["--hosts", "1", "--imports", "0", "--filled"])
    }

    fn measure(&self, config: &Path, sizes: &[&str]) -> Result<()> {
        let program = Program::new("sh").args(["-c", "ulimit -Sn $(ulimit -Hn) && exec \"$0\" \"$@\""]);
        let program = program.arg(scale()?).arg(config).args(sizes);
        let report = self.lab.host("hosts").spawn(&program)?.finish(PATIENCE)?.expect_success("scale")?;
        println!("figure: {}", report.trim());
        let report: Value = serde_json::from_str(&report).with_context(|| report.clone())?;
        ensure!(sizes.contains(&"--filled") || report["seen"].as_u64() > Some(0), "no change was seen: {report}");
        Ok(())
    }
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
    let bed = Bed::make()?;
    let etcd = Etcd::start(&bed.lab.host("store"), 3)?;
    let (cert, key) = etcd.add_user("reader", "/meshd-discovery/")?;
    let access = format!("ca = {:?}\ncert = {cert:?}\nkey = {key:?}\n", etcd.authority());
    let endpoints = etcd.endpoints();
    let url = &endpoints[0];
    bed.run(
        &format!("kind = \"etcd\"\nendpoints = {endpoints:?}\n{access}"),
        &format!("kind = \"etcd\"\nurl = {url:?}\n{access}"),
    )
}

#[test]
fn many_hosts_follow_consul() -> Result<()> {
    let bed = Bed::make()?;
    let consul = Consul::start(&bed.lab.host("store"))?;
    let rules = "service_prefix \"\" { policy = \"write\" } node_prefix \"\" { policy = \"write\" } \
                 key_prefix \"meshd-discovery/v1/\" { policy = \"write\" }";
    let token = consul.token("hosts", rules)?;
    let token_file = bed.file("token");
    fs::write(&token_file, &token)?;
    let (url, ca) = (consul.url(), consul.authority());
    bed.run(
        &format!("kind = \"consul\"\naddress = {url:?}\nca = {ca:?}\ntoken_file = {token_file:?}\n"),
        &format!("kind = \"consul\"\nurl = {url:?}\nca = {ca:?}\ntoken = {token:?}\n"),
    )
}

#[test]
fn many_hosts_follow_kubernetes() -> Result<()> {
    let bed = Bed::make()?;
    let cluster = Cluster::start(&bed.lab.host("store"))?;
    cluster.apply(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes/reader.yaml"))?;
    let (token, kubeconfig) = (bed.file("token"), bed.file("kubeconfig"));
    fs::write(&token, cluster.token(("meshd-system", "meshd-reader"), ISSUER, None)?)?;
    let (url, ca) = (cluster.url(), cluster.authority());
    let (cert, key) = cluster.administrator();
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
