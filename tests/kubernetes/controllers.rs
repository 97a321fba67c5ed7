//! The harness's Kubernetes: what scenarios on it take for granted.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::kubernetes::Cluster;
use meshd_tests::lab::Lab;
use meshd_tests::process::Program;
use meshd_tests::wait::until;
use serde_json::json;

use crate::DEADLINE;

const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices";

#[test]
fn controllers_make_the_slices_of_a_service_which_another_host_reads_but_not_the_anonymous() -> Result<()> {
    let lab = Arc::new(Lab::new(&["kubernetes", "web"])?);
    let mut cluster = Cluster::start(&lab.host("kubernetes"))?;
    cluster.start_controllers()?;
    cluster.create("/api/v1/namespaces", &json!({ "metadata": { "name": "shop" } }))?;
    let service = json!({
        "metadata": { "name": "payments" },
        "spec": { "selector": { "app": "payments" }, "ports": [{ "port": 80 }] },
    });
    cluster.create("/api/v1/namespaces/shop/services", &service)?;
    let made = || cluster.get(SLICES).is_ok_and(|slices| slices.contains("\"payments-"));
    let made = until(DEADLINE, "the slice of the service", made);
    made.with_context(|| cluster.controllers().map(|process| process.output()).unwrap_or_default())?;
    let curl = Program::new("curl").args(["-sS", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code}"]);
    let curl = curl.arg("--cacert").arg(cluster.authority()).arg(format!("{}{SLICES}", cluster.url()));
    let status = lab.host("web").run(&curl)?.expect_success("a call from another host")?;
    ensure!(status == "403", "the anonymous are answered with {status}");
    Ok(())
}
