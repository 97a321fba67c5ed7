//! The harness's Consul: what scenarios on it take for granted.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use meshd_tests::consul::Consul;
use meshd_tests::lab::Lab;
use serde_json::json;

const READER: &str = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" }";
const HEALTH: &str = "/v1/health/service/payments?passing";

#[test]
fn a_consul_shows_services_to_a_reader_and_nothing_to_the_anonymous() -> Result<()> {
    let lab = Arc::new(Lab::new(&["registry"])?);
    let mut consul = Consul::start(&lab.host("registry"))?;
    let node = json!({ "Node": "web", "Address": "10.0.0.7", "Service": { "Service": "payments", "Port": 80 } });
    consul.manage("PUT", "/v1/catalog/register", Some(&node))?;
    let reader = consul.token("reader", READER)?;
    let ports = |token: Option<&str>| -> Result<Vec<u64>> {
        let (status, body) = consul.call(token, "GET", HEALTH, None)?;
        ensure!(status == 200, "{status} {body}");
        let found: serde_json::Value = serde_json::from_str(&body)?;
        let found = found.as_array().context("no list")?;
        Ok(found.iter().filter_map(|one| one["Service"]["Port"].as_u64()).collect())
    };
    ensure!(ports(Some(&reader))? == [80], "a reader does not see the service");
    ensure!(ports(None)?.is_empty(), "the anonymous see the service");
    let (status, body) = consul.call(Some(&reader), "PUT", "/v1/catalog/register", Some(&node))?;
    ensure!(status == 403, "a reader may write: {status} {body}");
    consul.restart_empty()?;
    let (status, body) = consul.call(Some(&reader), "GET", HEALTH, None)?;
    ensure!(status == 403, "a token of before is good: {status} {body}");
    Ok(())
}
