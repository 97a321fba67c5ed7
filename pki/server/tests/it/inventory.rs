//! No certificate is forgotten: what is found out there is what `status` and metrics show.

use std::time::SystemTime;

use meshd_identity::inspect_svid;
use meshd_pki::status::{CertificateStatus, Status};

use crate::operation::{DAY, Desk, HOUR, chain_of};
use crate::support::{Lab, openssl, workload};

/// Serial and end of the certificate that a TLS port shows.
async fn shown_at(address: &str) -> (String, String) {
    let shown = openssl(&["s_client", "-connect", address], b"").await.stdout;
    let text = openssl(&["x509", "-noout", "-serial", "-enddate", "-dateopt", "iso_8601"], &shown).await.stdout;
    let text = String::from_utf8(text).unwrap();
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
    (field("serial=").to_lowercase(), field("notAfter=").replace(' ', "T"))
}

fn with_id<'a>(status: &'a Status, id: &str) -> &'a CertificateStatus {
    let found = status.certificates.iter().find(|one| one.id == id);
    found.unwrap_or_else(|| panic!("{id} is not in the status: {:?}", status.certificates))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_certificate_in_use_is_in_status_and_metrics() {
    let lab = Lab::start().await;
    let (checkout, payments) = (workload("checkout"), workload("payments"));
    lab.join("web", &[&checkout]).await.unwrap();
    lab.join("db", &[&payments]).await.unwrap();
    let (mut web, mut db) = (lab.host("web"), lab.host("db"));
    web.want(&[&checkout]);
    db.want(&[&payments]);
    let web = web.until(|held| held.workloads.contains_key(&checkout)).await;
    let db = db.until(|held| held.workloads.contains_key(&payments)).await;

    let status = Status::read(&lab.state(), SystemTime::now()).unwrap();
    let metrics = lab.pki().metrics.encode();
    let (serial, end) = shown_at(&lab.address()).await;
    let endpoint = with_id(&status, &serial);
    assert_eq!((endpoint.kind.as_str(), endpoint.not_after.as_str()), ("endpoint", end.as_str()));
    assert!(metrics.contains(&format!("{{kind=\"endpoint\",id=\"{serial}\"")), "{metrics}");
    for (host, held) in [("web", &web), ("db", &db)] {
        for svid in held.workloads.values().chain([&held.host]) {
            let shown = with_id(&status, &svid.serial);
            let kind = if svid.id.is_system() { "host" } else { "workload" };
            assert_eq!((shown.kind.as_str(), shown.host.as_deref()), (kind, Some(host)));
            assert_eq!(shown.identity.as_deref(), Some(svid.id.as_str()));
            let issuer = with_id(&status, shown.issuer.as_ref().unwrap());
            assert_eq!(issuer.kind, "intermediate");
            assert_eq!(with_id(&status, issuer.issuer.as_ref().unwrap()).kind, "root");
            for above in [&issuer.id, issuer.issuer.as_ref().unwrap()] {
                assert!(metrics.contains(&format!("id=\"{above}\"")), "{above} is not in the metrics");
            }
        }
    }
    assert!(status.certificates.iter().any(|one| one.kind == "jwt_key" && one.state == "active"));
    assert_eq!(status.valid_certificates, 4);
    assert!(status.problems.is_empty(), "{:?}", status.problems);
    assert_eq!(status.servers[0].renewals["workload_ok"], 0, "word is left once a minute");
}

#[test]
fn what_blocks_a_rotation_is_named_and_a_wait_is_not() {
    let desk = Desk::new();
    desk.pass(7 * DAY + 60);
    let mut chain = desk.enrol("web");
    let waiting = desk.status();
    assert!(waiting.rotation.waiting.iter().any(|gate| gate.reason == "old_leaves"), "{:?}", waiting.rotation);
    assert!(waiting.rotation.blocked.is_empty() && waiting.problems.is_empty(), "{:?}", waiting.problems);
    // The host renews and never says that it has the new root.
    for _ in 0..3 {
        desk.pass(10 * HOUR);
        chain = chain_of(desk.renew_holding(0, "web", Some(&chain[0])).unwrap());
    }
    let status = desk.status();
    let told = status.problems.iter().find(|problem| problem.starts_with("rotation blocked (hosts)"));
    assert!(told.is_some_and(|text| text.contains("web")), "{:?}", status.problems);
    desk.pass(60);
    assert!(desk.metrics().contains("meshd_pki_rotation_blocked{reason=\"hosts\"} 1"), "{}", desk.metrics());
    assert!(desk.status().to_text().contains("not acknowledged the root (one that stays silent stops counting): web"));
}

#[test]
fn a_fleet_of_thousands_makes_no_more_series_than_one_of_ten() {
    let desk = Desk::new();
    let series = || desk.metrics().lines().filter(|line| !line.starts_with('#')).count();
    for number in 0..10 {
        desk.enrol(&format!("a{number}"));
    }
    desk.pass(61);
    let few = series();
    for number in 0..200 {
        desk.enrol(&format!("b{number}"));
    }
    desk.pass(61);
    assert_eq!(series(), few);
    desk.pass(13 * HOUR);
    assert!(series() <= few + 10, "all are overdue, ten are named");
}

#[test]
fn a_server_that_ran_and_is_gone_is_told() {
    let desk = Desk::new();
    let chain = desk.enrol("web");
    assert!(inspect_svid(&chain[0]).is_ok());
    let later = desk.now() + std::time::Duration::from_secs(600);
    let status = Status::read(desk.dir(), later).unwrap();
    assert!(status.problems.iter().any(|problem| problem.contains("no server of this PKI runs")));
}
