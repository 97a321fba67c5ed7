//! Hosts that slept too long, and a PKI that did: who may come back does so alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use meshd_tests::clock::fake_time;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, Workload};
use meshd_tests::wait::{rest, until};

use crate::witness::Witness;
use crate::{DEADLINE, SERVERS, asks_payments, figure, roots, scale};

const LEAF: Duration = Duration::from_secs(12);

#[test]
fn a_host_asleep_past_its_certificates_and_the_roots_comes_back_alone_unless_it_was_evicted() -> Result<()> {
    let mut plan = Plan { rehearse: Some("12s"), ..Plan::shop() };
    for name in ["depot", "attic"] {
        plan.hosts.push(HostPlan { name: name.to_owned(), workloads: vec![Workload::client("checkout", 2003)] });
    }
    let mesh = Mesh::start(plan)?;
    let load = Witness::start(&mesh)?;
    for host in ["depot", "attic"] {
        asks_payments(&mesh, host, "checkout")?;
        mesh.daemon(host).stop()?;
    }
    mesh.pki(&["host", "evict", "attic"])?;
    let (asleep, wanted, mut seen) = (Instant::now(), scale(1, 3), vec![roots(&mesh)?.0]);
    while seen.len() <= wanted {
        until(DEADLINE, "the next root to sign", || roots(&mesh).is_ok_and(|(id, _)| Some(&id) != seen.last()))?;
        seen.push(roots(&mesh)?.0);
    }
    // The first root is gone from the bundle, too, in the long form.
    rest(LEAF.saturating_sub(asleep.elapsed()));
    let slept = asleep.elapsed();

    mesh.daemon("attic").spawn()?;
    mesh.daemon("depot").spawn()?;
    let awake = Instant::now();
    until(DEADLINE, "depot served again", || asks_payments(&mesh, "depot", "checkout").is_ok())?;
    figure(&format!(
        "a host asleep for {slept:.0?} (leaf of {LEAF:?}, {wanted} roots) served {:.1?} later",
        awake.elapsed()
    ));
    let is_told = || mesh.daemon("attic").log().contains("evicted");
    until(DEADLINE, "the evicted host to be told so", is_told)?;
    ensure!(asks_payments(&mesh, "attic", "checkout").is_err(), "an evicted host came back");
    load.end(&mesh, &format!("hosts asleep past their certificates and {wanted} roots"))
}

#[test]
fn a_pki_that_was_off_until_everything_had_ended_starts_with_a_new_root_and_has_its_hosts_back() -> Result<()> {
    let plan = Plan::shop();
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    mesh.start_pki()?;
    mesh.join_all()?;
    mesh.start_all()?;
    asks_payments(&mesh, "web", "checkout")?;
    let before = roots(&mesh)?.0;
    SERVERS.iter().try_for_each(|host| mesh.daemon(host).stop())?;
    mesh.stop_pki()?;

    let library = fake_time()?;
    let clock = [("LD_PRELOAD", library.as_str()), ("FAKETIME", "+2y"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    let off = Instant::now();
    mesh.start_pki_with(&clock)?;
    for host in SERVERS {
        mesh.daemon(host).set_environment(&clock);
        mesh.daemon(host).spawn()?;
    }
    until(DEADLINE, "the mesh to work again", || asks_payments(&mesh, "web", "checkout").is_ok())?;
    let (after, count) = roots(&mesh)?;
    ensure!(after != before, "the root that ended a year ago signs");
    figure(&format!("PKI and hosts off for two years: served {:.1?} after their start; {count} roots", off.elapsed()));
    Ok(())
}
