//! `kill -9` of the PKI, at every step of its authorities and at any time.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::{rest, until};

use crate::witness::Witness;
use crate::{DEADLINE, SERVERS, asks_payments, roots, roots_in, scale};

/// In the order in which a rotation takes them.
const STEPS: [&str; 7] = [
    "root_prepare",
    "root_activate",
    "intermediate",
    "jwt_key_prepare",
    "root_remove",
    "root_retire",
    "jwt_key_remove",
];

#[test]
fn a_pki_that_is_killed_at_any_step_goes_on_from_there() -> Result<()> {
    let mut mesh = Mesh::start(Plan { rehearse: Some("15s"), ..Plan::shop() })?;
    let load = Witness::start(&mesh)?;
    let (before, mut last) = (roots(&mesh)?.0, 0);
    mesh.stop_pki()?;
    let points = scale(&["uncommitted", "committed"][..], &["uncommitted", "committed", "recorded"]);
    // A JWT key ends long after a root has come and gone.
    let steps = scale(&STEPS[..6], &STEPS);
    for step in steps {
        for point in points {
            mesh.spawn_pki(&[("MESHD_PKI_KILL_AT", &format!("{step}.{point}"))], &[])?;
            let ended =
                mesh.pki_process()?.wait(DEADLINE).with_context(|| format!("{step}.{point} is never reached"))?;
            ensure!(ended.code().is_none(), "{step}.{point}: it ended by itself: {}", mesh.pki_process()?.output());
            ensure_whole(&mesh, &mut last).with_context(|| format!("killed at {step}.{point}"))?;
        }
    }
    mesh.start_pki()?;
    ensure!(roots(&mesh)?.0 != before, "no root was replaced, so nothing was shown");
    renewed_everywhere(&mesh)?;
    asks_payments(&mesh, "web", "checkout")?;
    load.end(&mesh, &format!("PKI killed at {} points of its steps", steps.len() * points.len()))
}

#[test]
fn a_pki_that_is_killed_again_and_again_loses_nothing() -> Result<()> {
    let mut mesh = Mesh::start(Plan { rehearse: Some("20s"), ..Plan::shop() })?;
    let load = Witness::start(&mesh)?;
    let (mut last, kills) = (0, scale(12, 1000));
    for kill in 0..kills {
        // Spread over start, steps and idle times; 7919 is a prime.
        rest(Duration::from_millis(kill * 7919 % 1500));
        mesh.kill_pki()?;
        mesh.start_pki()?;
        ensure_whole(&mesh, &mut last).with_context(|| format!("kill {kill}"))?;
    }
    renewed_everywhere(&mesh)?;
    load.end(&mesh, &format!("{kills} kills of the PKI at any time"))
}

/// One root signs, what signs is under it or one before it, the bundle never goes back, the audit log is whole.
fn ensure_whole(mesh: &Mesh, last: &mut u64) -> Result<()> {
    let status = mesh.pki_status()?;
    let now = status["bundle_sequence"].as_u64().context("no sequence")?;
    ensure!(now >= *last, "the bundle's sequence went from {last} to {now}");
    *last = now;
    let (_, in_bundle) = roots_in(&status)?;
    ensure!(in_bundle <= 4, "{in_bundle} roots in the bundle");
    ensure!(status["audit_lines"].is_u64(), "the audit log is not whole: {}", status["problems"]);
    let all = status["authorities"].as_array().context("no authorities")?;
    let signing = all.iter().filter(|one| one["kind"] == "intermediate" && one["state"] == "active");
    for one in signing {
        let is_known = |root: &&serde_json::Value| root["id"] == one["parent"] && root["state"] != "retired";
        ensure!(all.iter().any(|root| is_known(&root)), "a signer without a root: {status}");
    }
    Ok(())
}

/// Every host under load has been given certificates after now.
pub(crate) fn renewed_everywhere(mesh: &Mesh) -> Result<()> {
    let at = |host: &str| {
        let metrics = mesh.daemon(host).metrics();
        metrics.map_or(0.0, |metrics| metrics.sum("identity_cert_refreshes_total", &[("result", "ok")]))
    };
    let before = SERVERS.map(at);
    for (host, before) in SERVERS.into_iter().zip(before) {
        until(DEADLINE, &format!("a renewal by {host}"), || at(host) > before)?;
    }
    Ok(())
}
