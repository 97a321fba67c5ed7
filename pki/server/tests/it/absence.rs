//! Hosts that were away, and PKIs that were: everybody finds the way back alone, and nobody else does.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use meshd_identity::signed;
use meshd_identity::statements::{BundleStatement, RecoveryStatement};
use meshd_identity::{Bundle, SpiffeId, sha256};
use meshd_pki::state_dir;
use meshd_pki::status::Status;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::{HostBan, HostEvict};
use meshd_pki_api::v1;
use meshd_pki_api::v1::host_server::Host as HostApi;
use meshd_pki_client::Svid;
use meshd_pki_client::fake::FakeCa;
use rcgen::KeyPair;
use tonic::{Request, Response, Status as Answer};

use crate::impostors::{serve_as, wire_bundle};
use crate::records::{copy, put_record, record, say, unix};
use crate::support::{Lab, domain, eventually, workload};

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

fn roots(state: &Path, now: SystemTime) -> usize {
    Status::read(state, now).unwrap().authorities.iter().filter(|one| one.kind == "root").count()
}

#[tokio::test]
async fn a_host_asleep_past_the_end_of_its_certificates_comes_back_without_a_token() {
    let lab = Lab::start().await;
    let id = workload("payments");
    let joined = lab.join("web", &[&id]).await.unwrap();
    lab.pass(3 * DAY);
    let mut host = lab.host("web");
    host.want(&[&id]);
    let held = host.until(|held| held.workloads.contains_key(&id)).await;
    assert_ne!(held.host.serial, joined.host.serial);
    assert!(held.host.not_after > lab.now() && held.workloads[&id].not_after > lab.now());
    assert!(lab.audit_log().contains(r#""event":"attest","result":"ok","host":"web""#), "{}", lab.audit_log());
    assert_eq!(host.metrics.last_error(), None);
}

#[tokio::test]
async fn a_host_asleep_past_three_root_rotations_comes_back_without_a_token() {
    let lab = Lab::start().await;
    let joined = lab.join("web", &[]).await.unwrap();
    for _ in 0..640 {
        lab.pass(12 * HOUR);
    }
    assert!(roots(&lab.state(), lab.now()) > 3, "the rotation did not run");
    let mut host = lab.host("web");
    let held = host.until(|held| held.host.serial != joined.host.serial).await;
    assert!(held.bundle.sequence > joined.bundle.sequence);
    assert!(held.bundle.roots.iter().all(|root| !joined.bundle.roots.contains(root)), "not a single root is left");
    assert!(held.host.not_after > lab.now());
}

#[tokio::test]
async fn a_host_restored_from_a_snapshot_a_year_old_comes_back_by_the_key_it_enrolled_with() {
    let lab = Lab::start().await;
    let joined = lab.join("web", &[]).await.unwrap();
    let (dir, snapshot) = (lab.host_dir("web"), lab.host_dir("snapshot"));
    copy(&dir, &snapshot);
    let mut host = lab.host("web");
    let mut serial = joined.host.serial.clone();
    for _ in 0..3 {
        lab.pass(12 * HOUR);
        // It looks at the clock every 15 s; a new wish wakes it.
        host.want(&[]);
        serial = host.until(|held| held.host.serial != serial).await.host.serial.clone();
    }
    drop(host);
    for _ in 0..365 {
        lab.pass(DAY);
    }
    fs::remove_dir_all(&dir).unwrap();
    copy(&snapshot, &dir);
    let mut host = lab.host("web");
    let held = host.until(|held| held.host.not_after > lab.now()).await;
    assert_ne!(held.host.serial, serial);
}

#[tokio::test]
async fn a_pki_that_was_off_until_everything_had_ended_has_its_hosts_back() {
    let mut lab = Lab::start().await;
    let joined = lab.join("web", &[]).await.unwrap();
    lab.stop().await;
    lab.pass(800 * DAY);
    lab.run().await;
    let mut host = lab.host("web");
    host.until(|held| held.host.serial != joined.host.serial).await;
    // The host has confirmed the PKI's clock: what ended by it may go.
    lab.pass(HOUR);
    host.until(|held| held.bundle.roots.iter().all(|root| !joined.bundle.roots.contains(root))).await;
}

#[tokio::test]
async fn evicted_and_banned_hosts_stay_out() {
    let lab = Lab::start().await;
    for name in ["evicted", "banned"] {
        lab.join(name, &[]).await.unwrap();
    }
    lab.command(Command::HostEvict(HostEvict { host: "evicted".to_owned(), reason: String::new() })).unwrap();
    lab.command(Command::HostBan(HostBan { host: "banned".to_owned(), reason: String::new() })).unwrap();
    lab.pass(3 * DAY);
    for (name, why) in [("evicted", "`evicted` was evicted"), ("banned", "`banned` is banned")] {
        let host = lab.host(name);
        eventually("it is told why", || host.metrics.last_error().is_some_and(|error| error.contains(why))).await;
        assert!(host.now().host.not_after < lab.now(), "{name} got a certificate");
    }
}

#[tokio::test]
async fn the_enrolled_key_of_somebody_else_opens_nothing() {
    let lab = Lab::start().await;
    lab.join("web", &[]).await.unwrap();
    let old = lab.host_dir("old");
    copy(&lab.host_dir("web"), &old);
    lab.pass(2 * DAY);
    // The host is installed anew: what was enrolled before is worth nothing from now on.
    lab.join("web", &[]).await.unwrap();
    let host = lab.host("old");
    eventually("the old key is refused", || {
        host.metrics.last_error().is_some_and(|error| error.contains("did not sign with the key it has enrolled"))
    })
    .await;
}

/// Says whatever it is told to say about the way to other bundles.
struct Forger {
    transitions: v1::TransitionsReply,
}

#[tonic::async_trait]
impl HostApi for Forger {
    async fn transitions(&self, _: Request<v1::TransitionsRequest>) -> Result<Response<v1::TransitionsReply>, Answer> {
        Ok(Response::new(self.transitions.clone()))
    }

    async fn bundle(&self, _: Request<v1::BundleRequest>) -> Result<Response<v1::BundleReply>, Answer> {
        Ok(Response::new(v1::BundleReply { bundle: self.transitions.bundle.clone() }))
    }
}

/// What a host that slept says when a forger sits where its PKI was.
async fn refusal_of(transitions: impl FnOnce(&Bundle, &Lab) -> v1::TransitionsReply, ca: &FakeCa) -> String {
    let mut lab = Lab::start().await;
    let joined = lab.join("web", &[]).await.unwrap();
    let address: SocketAddr = lab.address().parse().unwrap();
    lab.stop().await;
    lab.pass(3 * DAY);
    let pki = SpiffeId::pki(&domain());
    let svid: std::sync::Arc<Svid> =
        ca.svid_between(&pki, lab.now() - Duration::from_secs(DAY), lab.now() + Duration::from_secs(DAY));
    let transitions = transitions(&joined.bundle, &lab);
    serve_as(Forger { transitions }, &svid, address).await;
    let host = lab.host("web");
    eventually("the forger is refused", || host.metrics.last_error().is_some()).await;
    assert_eq!(host.now().bundle, joined.bundle);
    assert_eq!(host.now().host.serial, joined.host.serial);
    host.metrics.last_error().unwrap()
}

#[tokio::test]
async fn forged_transitions_and_recoveries_are_refused() {
    let ca = FakeCa::new(domain());
    let forged = || v1::TrustBundle { sequence: u64::MAX, ..wire_bundle(&ca, &domain()) };
    let unsigned = |_: &Bundle, _: &Lab| v1::TransitionsReply {
        steps: vec![v1::SignedBundle { bundle: Some(forged()), signatures: vec![] }],
        bundle: Some(forged()),
        recovery: vec![],
    };
    let error = refusal_of(unsigned, &ca).await;
    assert!(error.contains("is not signed by a root of bundle"), "{error}");

    let no_way = |_: &Bundle, _: &Lab| v1::TransitionsReply { bundle: Some(forged()), ..Default::default() };
    let error = refusal_of(no_way, &ca).await;
    assert!(error.contains("no signed way from bundle") && error.contains("does not verify"), "{error}");

    let stranger = KeyPair::generate().unwrap();
    let statement = |lab: &Lab| RecoveryStatement {
        trust_domain: domain(),
        issued_at: unix(lab.now()),
        bundle: Some(BundleStatement {
            trust_domain: domain(),
            sequence: u64::MAX,
            sha256: data_encoding::HEXLOWER.encode(&sha256(&forged().jwks)),
        }),
        next_key: None,
    };
    let strangers = |_: &Bundle, lab: &Lab| v1::TransitionsReply {
        recovery: vec![signed::sign(&stranger.serialize_der(), &statement(lab)).unwrap()],
        bundle: Some(forged()),
        steps: vec![],
    };
    let error = refusal_of(strangers, &ca).await;
    assert!(error.contains("not signed by a recovery key this host pins"), "{error}");

    // Signed as it should be, but with another document than the one it names.
    let swapped = |_: &Bundle, lab: &Lab| {
        let mut statement = statement(lab);
        statement.bundle.as_mut().unwrap().sha256 = "00".repeat(32);
        v1::TransitionsReply { recovery: vec![say(&lab.state(), &statement)], bundle: Some(forged()), steps: vec![] }
    };
    let error = refusal_of(swapped, &ca).await;
    assert!(error.contains("SHA-256 differs"), "{error}");
}

/// A PKI made anew where another was, which knows that one's hosts from a list somebody kept.
async fn replace_pki(lab: &mut Lab) -> std::path::PathBuf {
    let lost = lab.host_dir("lost-pki");
    let known = record(&lab.state(), "host/web").unwrap();
    lab.stop().await;
    lab.pass(HOUR);
    fs::create_dir_all(lost.parent().unwrap()).unwrap();
    fs::rename(lab.state(), &lost).unwrap();
    state_dir::init(&lab.state(), &domain(), None, lab.now()).unwrap();
    put_record(&lab.state(), "host/web", &known);
    lost
}

/// The statement that tells hosts of the lost PKI to trust the bundle of the new one.
fn name_bundle(lab: &Lab, signer: &Path) {
    let status = Status::read(&lab.state(), lab.now()).unwrap();
    let bundle =
        BundleStatement { trust_domain: domain(), sequence: status.bundle_sequence, sha256: status.bundle_sha256 };
    let statement =
        RecoveryStatement { trust_domain: domain(), issued_at: unix(lab.now()), bundle: Some(bundle), next_key: None };
    let statements = serde_json::to_string(&[say(signer, &statement)]).unwrap();
    put_record(&lab.state(), "setting/recovery_statements", &statements);
}

#[tokio::test]
async fn after_the_loss_of_the_pki_a_statement_of_the_recovery_key_brings_hosts_to_a_new_one() {
    let mut lab = Lab::start().await;
    let id = workload("payments");
    let joined = lab.join("web", &[&id]).await.unwrap();
    let lost = replace_pki(&mut lab).await;
    lab.run().await;
    // Its certificate is good for a day yet, but nothing it holds verifies the new PKI.
    let mut host = lab.host("web");
    lab.pass(12 * HOUR);
    host.want(&[&id]);
    eventually("the host does not follow by itself", || host.metrics.last_error().is_some()).await;
    let error = host.metrics.last_error().unwrap();
    assert!(error.contains("no signed way") && host.now().bundle == joined.bundle, "{error}");
    name_bundle(&lab, &lost);
    let held = host.until(|held| held.bundle != joined.bundle).await;
    assert_ne!(held.host.serial, joined.host.serial, "bundle and certificate came together");
    host.until(|held| held.refused.contains_key(&id)).await;
}
