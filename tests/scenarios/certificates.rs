//! Peers with certificates that must not be believed.

use anyhow::{Context, Result, ensure};
use meshd_tests::clock::fake_time;
use meshd_tests::lab::Lab;
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::{HostPlan, Plan, ServicePlan, Workload};
use meshd_tests::wait::until;
use std::sync::Arc;

use crate::{DEADLINE, PAYMENTS, ask, ensure_refused, failed_handshakes};

#[test]
fn a_peer_of_another_trust_domain_is_refused() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let stranger = stranger_plan();
    let lab = Arc::new(Lab::new(&[plan.host_names(), stranger.host_names()].concat())?);
    let mut mesh = Mesh::prepare(lab.clone(), plan)?;
    let mut other = Mesh::prepare(lab, stranger)?;
    for mesh in [&mut mesh, &mut other] {
        mesh.start_pki()?;
        mesh.join_all()?;
        mesh.start_all()?;
    }
    ensure_refused(&other.curl("stranger", "checkout", &["--max-time", "10", PAYMENTS])?)?;
    let counted = || failed_handshakes(&mesh, "api-1").is_ok_and(|count| count >= 1.0);
    until(DEADLINE, "the handshake refused and counted on api-1", counted)
        .with_context(|| mesh.daemon("api-1").metrics_text().unwrap_or_default())?;
    let opened = mesh.daemon("api-1").metrics()?.sum("tcp_open_total", &[("direction", "inbound")]);
    ensure!(opened < 0.5, "a stranger's connection was opened");
    ask(&mesh)?;
    Ok(())
}

/// A host of another mesh whose files point at this one's.
fn stranger_plan() -> Plan {
    let host = HostPlan { name: "stranger".to_owned(), workloads: vec![Workload::client("checkout", 2003)] };
    let service = ServicePlan { hosts: vec!["api-1".to_owned()], ..ServicePlan::new("payments", 80) };
    Plan {
        trust_domain: "other.example".to_owned(),
        pki_host: "pki-of-others".to_owned(),
        hosts: vec![host],
        services: vec![service],
        ..Plan::shop()
    }
}

#[test]
fn expired_certificates_are_refused_and_the_reason_is_told() -> Result<()> {
    let plan = Plan::shop_with_one_server();
    let mut mesh = Mesh::prepare(Arc::new(Lab::new(&plan.host_names())?), plan)?;
    // Everything is issued 30 hours ago for 24, then the PKI is gone.
    let library = fake_time()?;
    let past = [("LD_PRELOAD", library.as_str()), ("FAKETIME", "-30h"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    mesh.start_pki_with(&past)?;
    for host in ["web", "api-1"] {
        mesh.daemon(host).set_environment(&past);
    }
    mesh.join_all()?;
    mesh.start_all()?;
    ask(&mesh)?;
    mesh.stop_pki()?;

    // api-1 lives in the present: what web shows expired 6 hours ago.
    mesh.daemon("api-1").set_environment(&[]);
    mesh.daemon("api-1").restart()?;
    ensure_refused(&mesh.curl("web", "checkout", &["--max-time", "10", PAYMENTS])?)?;
    let counted = || failed_handshakes(&mesh, "api-1").is_ok_and(|count| count >= 1.0);
    until(DEADLINE, "the refusal counted on api-1", counted)?;
    let check = mesh.daemon("api-1").run(&["check"])?;
    ensure!(
        !check.success() && check.stdout.contains("ns/shop/sa/payments"),
        "`meshd check` is content: {}",
        check.stdout
    );
    Ok(())
}
