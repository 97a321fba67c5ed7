//! The PKI's entries say whose an identity is; what enrol.d claims must agree.

use anyhow::{Result, ensure};
use meshd_tests::mesh::Mesh;
use meshd_tests::plan::Plan;
use meshd_tests::wait::until;

use crate::{DEADLINE, PAYMENTS, ask, ensure_refused};

#[test]
fn an_identity_the_pki_gives_to_another_unit_is_withheld_until_both_sides_agree() -> Result<()> {
    let mesh = Mesh::start(Plan { leaf_ttl: Some("15"), ..Plan::shop_with_one_server() })?;
    if !mesh.lab().has_units() {
        return Ok(());
    }
    ask(&mesh)?;
    let give_to = |unit: &str| {
        let selector = format!("systemd:unit:{unit}");
        mesh.pki(&["entry", "add", "--host", "web", "--selector", &selector, "ns/shop/sa/checkout"])
    };
    give_to("other.service")?;
    let told =
        || mesh.daemon("web").log().contains("checkout.service claims ns/shop/sa/checkout, the PKI's entry gives it");
    until(DEADLINE, "the claim to be withheld", told)?;
    until(DEADLINE, "checkout to be refused", || {
        mesh.curl("web", "checkout", &["--max-time", "5", PAYMENTS]).is_ok_and(|curl| ensure_refused(&curl).is_ok())
    })?;
    // Others of the host keep theirs, over a restart, too.
    mesh.daemon("web").restart()?;
    ensure_refused(&mesh.curl("web", "checkout", &["--max-time", "5", PAYMENTS])?)?;
    ensure!(mesh.curl("web", "billing", &[PAYMENTS])?.success(), "billing is refused, too");

    give_to("checkout.service")?;
    until(DEADLINE, "checkout to be served again", || ask(&mesh).is_ok())
}

#[test]
fn an_entry_that_is_tightened_is_in_force_although_enrol_d_cannot_be_read_again() -> Result<()> {
    let mesh = Mesh::start(Plan { leaf_ttl: Some("15"), ..Plan::shop_with_one_server() })?;
    if !mesh.lab().has_units() {
        return Ok(());
    }
    ask(&mesh)?;
    mesh.daemon("web").enrol("[[workload]\n")?;
    mesh.pki(&["entry", "add", "--host", "web", "--selector", "systemd:unit:other.service", "ns/shop/sa/checkout"])?;
    until(DEADLINE, "checkout to be refused", || {
        mesh.curl("web", "checkout", &["--max-time", "5", PAYMENTS]).is_ok_and(|curl| ensure_refused(&curl).is_ok())
    })?;
    until(DEADLINE, "the reload to fail", || mesh.daemon("web").log().contains("enrolment not reloaded"))?;
    ensure!(mesh.curl("web", "billing", &[PAYMENTS])?.success(), "billing is refused, too");
    Ok(())
}
