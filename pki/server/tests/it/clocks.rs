//! What the PKI does by a clock that it cannot be sure of, and when the next root signs.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use meshd_identity::inspect_svid;
use meshd_pki::Refused;
use meshd_pki::clock::Distrust;
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::times::unix;
use meshd_pki_api::v1;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::operation::Desk;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;
const YEAR: u64 = 365 * DAY;

/// `(state, id)` of the roots on record, in the order in which they were made.
fn roots(desk: &Desk) -> Vec<(String, String)> {
    let all = desk.status().authorities.into_iter().filter(|one| one.kind == "root");
    all.map(|one| (one.state, one.id)).collect()
}

fn states(desk: &Desk) -> Vec<String> {
    roots(desk).into_iter().map(|(state, _)| state).collect()
}

fn ids(desk: &Desk) -> Vec<String> {
    roots(desk).into_iter().map(|(_, id)| id).collect()
}

fn active(desk: &Desk) -> String {
    roots(desk).into_iter().find(|(state, _)| state == "active").unwrap().1
}

fn is_signed_by(intermediate: &[u8], root: &str) -> bool {
    X509Certificate::from_der(intermediate).unwrap().1.issuer().to_string().contains(root)
}

#[test]
fn a_root_signs_as_soon_as_it_is_active() {
    let desk = Desk::new();
    desk.pass(7 * DAY);
    let first = active(&desk);
    assert_eq!(states(&desk), ["active", "prepared"]);
    let chain = desk.enrol("web");
    assert!(is_signed_by(&chain[1], &first));
    // Its report says which bundle it has.
    desk.renew("web", Some(&chain[0])).unwrap();
    // Everything of the signer is new by then, and would go on for hours.
    desk.pass(DAY);
    assert_eq!(active(&desk), first);
    desk.pass(HOUR);
    let second = active(&desk);
    assert_ne!(second, first);
    assert!(is_signed_by(&desk.enrol("db")[1], &second));
}

#[test]
fn the_first_rotation_does_not_wait_for_ever_for_long_lived_leaves() {
    let leaf = Duration::from_secs(5 * DAY);
    let desk = Desk::with(Lifetimes { leaf, ..Lifetimes::default() });
    let first = active(&desk);
    for _ in 0..7 + 6 {
        desk.pass(DAY);
    }
    assert_ne!(active(&desk), first);
}

#[test]
fn a_jump_ahead_that_is_undone_leaves_no_certificate_of_the_future_in_use() {
    let desk = Desk::new();
    desk.ahead.store(4 * DAY, SeqCst);
    desk.pki().refresh().unwrap();
    desk.ahead.store(0, SeqCst);
    desk.pki().refresh().unwrap();
    let chain = desk.enrol("web");
    let (_, intermediate) = X509Certificate::from_der(&chain[1]).unwrap();
    let long_valid = unix(desk.now() - Duration::from_secs(47 * HOUR));
    assert!(intermediate.validity().not_before.timestamp() <= long_valid);
}

#[test]
fn a_start_with_a_clock_years_ahead_destroys_nothing_and_the_right_clock_brings_the_known_root_back() {
    let mut desk = Desk::new();
    desk.pass(7 * DAY);
    let (before, signing) = (ids(&desk), active(&desk));
    desk.ahead.store(2 * YEAR, SeqCst);
    desk.open();
    for _ in 0..5 {
        desk.pass(HOUR);
    }
    assert_ne!(active(&desk), signing, "it serves, should the clock be right");
    desk.ahead.store(0, SeqCst);
    desk.open();
    assert!(ids(&desk).starts_with(&before), "{:?}", roots(&desk));
    let chain = desk.enrol("web");
    assert!(before.iter().any(|root| is_signed_by(&chain[1], root)), "{:?}", roots(&desk));
    assert!(inspect_svid(&chain[0]).unwrap().not_before < desk.now());
}

#[test]
fn after_a_long_time_off_rotation_goes_on_when_a_host_agrees_with_the_clock() {
    let mut desk = Desk::new();
    desk.enrol("web");
    desk.off_for(100 * DAY);
    desk.open();
    desk.pass(60);
    assert_eq!(states(&desk), ["active"]);
    let unconfirmed = || desk.status().servers[0].is_clock_unconfirmed;
    assert!(unconfirmed() && desk.status().to_text().contains("not confirmed"), "{}", desk.status().to_text());
    assert!(desk.metrics().contains("clock_unconfirmed 1"));
    desk.enrol("web");
    desk.pass(10);
    assert_eq!(states(&desk), ["active", "prepared"]);
    desk.pass(60);
    assert!(!unconfirmed() && desk.metrics().contains("clock_unconfirmed 0"));
}

#[test]
fn after_a_long_time_off_without_hosts_rotation_goes_on_after_a_day() {
    let mut desk = Desk::new();
    desk.off_for(100 * DAY);
    desk.open();
    desk.pass(23 * HOUR);
    assert_eq!(states(&desk), ["active"]);
    desk.pass(HOUR);
    assert_eq!(states(&desk), ["active", "prepared"]);
}

#[test]
fn a_clock_behind_the_time_on_record_is_not_believed_until_it_is_set_right_or_the_operator_vouches_for_it() {
    let mut desk = Desk::new();
    desk.ahead.store(2 * HOUR, SeqCst);
    desk.clock_is_right = true;
    desk.open();
    desk.pass(60);
    desk.clock_is_right = false;
    desk.ahead.store(0, SeqCst);
    desk.open();
    assert!(matches!(desk.pki().distrust(), Some(Distrust::Behind { .. })));
    let asked = v1::EnrollRequest {
        attestation: Some(v1::enroll_request::Attestation::JoinToken(v1::JoinTokenProof::default())),
        ..v1::EnrollRequest::default()
    };
    let refused = desk.pki().enrol(&asked, "test").unwrap_err();
    assert!(matches!(&refused, Refused::Unavailable(text) if text.contains("--clock-is-right")), "{refused}");
    desk.ahead.store(2 * HOUR, SeqCst);
    desk.pass(60);
    assert_eq!(desk.pki().distrust(), None);
    desk.ahead.store(0, SeqCst);
    desk.clock_is_right = true;
    desk.open();
    assert_eq!(desk.pki().distrust(), None);
    assert!(inspect_svid(&desk.enrol("web")[0]).unwrap().not_before < desk.now());
}
