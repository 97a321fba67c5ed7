//! One event per connection, exactly once.

use anyhow::{Context, Result, ensure};
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, ask};

#[test]
fn every_connection_leaves_one_event_on_each_side() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    let args =
        ["load", "--target", "payments.shop.mesh:80", "--per-request", "--connections", "4", "--requests", "100"];
    let finished = mesh.host("web").run(&mesh.testkit("web", "checkout", &args))?;
    let load: LoadReport = report(&finished)?;
    ensure!(load.ok == 100 && load.failed == 0, "{load:?}");
    cancel_one(&mesh)?;
    // A stopped meshd has written all it will ever write.
    mesh.daemon("web").stop()?;
    mesh.daemon("api-1").stop()?;
    for (host, direction) in [("web", "outbound"), ("api-1", "inbound")] {
        let events = mesh.daemon(host).access_log();
        let of_payments: Vec<_> = events.iter().filter(|event| event.is_for("payments.shop")).collect();
        ensure!(of_payments.len() == 101, "{} events on {host}: {:#?}", of_payments.len(), of_payments.last());
        ensure!(of_payments.iter().all(|event| event.direction == direction), "another direction on {host}");
        let whole = of_payments.iter().filter(|event| event.outcome == "ok" && event.bytes_sent > 1024).count();
        ensure!(whole >= 100, "only {whole} events on {host} tell of a whole exchange: {:#?}", of_payments.first());
    }
    Ok(())
}

#[test]
fn what_was_opened_is_closed_in_the_metrics() -> Result<()> {
    let mesh = Mesh::start(Plan::shop_with_one_server())?;
    for _ in 0..10 {
        ask(&mesh)?;
    }
    for host in ["web", "api-1"] {
        let balanced = || {
            mesh.daemon(host).metrics().is_ok_and(|metrics| {
                let sum = |name: &str| metrics.sum(name, &[("peer", "src")]);
                is(sum("tcp_open_total"), 10) && is(sum("tcp_close_total"), 10) && is(sum("tcp_open_connections"), 0)
            })
        };
        until(DEADLINE, &format!("10 opened, 10 closed on {host}"), balanced)
            .with_context(|| mesh.daemon(host).metrics_text().unwrap_or_default())?;
    }
    Ok(())
}

/// A download whose client is killed in the middle.
fn cancel_one(mesh: &Mesh) -> Result<()> {
    let args = ["stall", "--target", "payments.shop.mesh:80", "--size", "100000000"];
    let mut stalled = mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &args))?;
    stalled.kill()?;
    let closed = || mesh.daemon("api-1").metrics().is_ok_and(|metrics| is(metrics.sum("tcp_open_connections", &[]), 0));
    until(DEADLINE, "the cancelled connection to end", closed)
}

fn is(found: f64, expected: u32) -> bool {
    (found - f64::from(expected)).abs() < 0.5
}
