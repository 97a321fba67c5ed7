//! A PKI that is not there: for its whole budget, or again and again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, PKI_PORT, Plan, Workload};
use meshd_tests::wait::rest;

use crate::kills::renewed_everywhere;
use crate::witness::Witness;
use crate::{asks_payments, figure_promised, scale};

#[test]
fn a_pki_may_be_away_for_half_the_life_of_a_certificate_and_hosts_restart_meanwhile() -> Result<()> {
    let life = Duration::from_secs(scale(40, 240));
    let mut plan = Plan { leaf_ttl: Some(scale("40", "240")), ..Plan::shop() };
    plan.hosts.push(HostPlan { name: "depot".to_owned(), workloads: vec![Workload::client("checkout", 2003)] });
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    let load = Witness::start(&mesh)?;

    mesh.stop_pki()?;
    let gone = Instant::now();
    rest(life / 4);
    mesh.daemon("depot").restart()?;
    asks_payments(&mesh, "depot", "checkout")?;
    rest((life / 2).saturating_sub(gone.elapsed()));
    asks_payments(&mesh, "depot", "checkout")?;
    let away = gone.elapsed();
    mesh.start_pki()?;
    let back = Instant::now();
    renewed_everywhere(&mesh)?;
    let renewed = back.elapsed();
    figure_promised(
        &format!("PKI away for {away:.1?} of a leaf's {life:?}; every host renewed {renewed:.1?} after its return"),
        renewed < Duration::from_secs(60),
    )?;
    asks_payments(&mesh, "depot", "checkout")?;
    load.end(&mesh, "PKI away for half a leaf's life")
}

#[test]
fn a_pki_that_comes_and_goes_renews_everything_and_is_not_stormed() -> Result<()> {
    let mesh = Mesh::start(Plan { leaf_ttl: Some("30"), ..Plan::shop() })?;
    let load = Witness::start(&mesh)?;
    let pki = mesh.host("pki");
    let rounds = scale(5, 60);
    for round in 0..rounds {
        // Now connections are refused, now packets vanish.
        let faults = if round % 2 == 0 {
            vec![pki.reset_port(PKI_PORT)?]
        } else {
            ["web", "api-1", "api-2"]
                .map(|host| pki.black_hole(mesh.host(host).address()))
                .into_iter()
                .collect::<Result<_>>()?
        };
        rest(Duration::from_secs(5));
        drop(faults);
        rest(Duration::from_secs(1));
    }
    renewed_everywhere(&mesh)?;
    let metrics = mesh.pki_metrics()?;
    let (asked, failed) =
        (metrics.sum("meshd_pki_requests_total", &[]), metrics.sum("meshd_pki_tls_failures_total", &[]));
    let seconds = f64::from(6 * rounds);
    let a_host = (asked + failed) / 3.0 / seconds;
    figure_promised(
        &format!("PKI up 1 s, away 5 s, {rounds} times: {a_host:.2} requests a second from each host"),
        a_host < 1.0,
    )?;
    load.end(&mesh, &format!("PKI away {rounds} times for 5 s, up 1 s between"))
}
