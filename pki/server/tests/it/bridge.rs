//! The root before vouches for the one that signs: verifiers that missed the new one believe it, and nobody depends on it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use meshd_identity::denial::{DenyIndex, Marks};
use meshd_identity::statements::{Denied, DenySet, Whom};
use meshd_identity::{Bundle, inspect_svid, root_id};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{Authority, AuthorityList, AuthorityRotate, DenyAdd, DenyRemove, DenyWhom, deny_whom};
use meshd_pki_api::v1;
use meshd_pki_api::v1::host_client::HostClient;
use meshd_pki_client::{ServerJudge, Svid};
use rcgen::KeyPair;
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, UnixTime};
use tokio::time::timeout;
use tonic::Status;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::attestors::istio::connect_by;
use crate::authority::{alice, taint};
use crate::operation::{DAY, Desk, HOUR, chain_of};
use crate::profile::verifies_at;
use crate::rotations::verifies;
use crate::support::{Lab, PATIENCE, domain, openssl, request_over, workload};

/// A PKI on the day after its first rotation, and the roots before and now.
struct Rotated {
    desk: Desk,
    before: Vec<u8>,
    now: Vec<u8>,
}

impl Rotated {
    fn new() -> Rotated {
        Rotated::of(Desk::new())
    }

    fn of(desk: Desk) -> Rotated {
        let before = roots(&desk).remove(0);
        pass_days(&desk, 9);
        let now = roots(&desk).remove(1);
        assert_eq!(desk.root("active"), Some(root_id(&now)));
        Rotated { desk, before, now }
    }

    fn old(&self) -> String {
        root_id(&self.before)
    }

    fn listed(&self) -> Authority {
        let all = self.desk.list().authorities;
        all.into_iter().find(|one| one.id == root_id(&self.now)).unwrap()
    }
}

fn pass_days(desk: &Desk, days: u64) {
    (0..days).for_each(|_| desk.pass(DAY));
}

fn roots(desk: &Desk) -> Vec<Vec<u8>> {
    let bundle = desk.pki().bundle(&[]).unwrap();
    Bundle::from_jwks(domain(), &bundle.jwks).unwrap().roots
}

fn end_of(certificate: &[u8]) -> i64 {
    X509Certificate::from_der(certificate).unwrap().1.validity().not_after.timestamp()
}

/// What rustls and OpenSSL say, which must be the same.
async fn verdict(roots: &[&[u8]], chain: &[Vec<u8>], at: SystemTime) -> bool {
    let roots: Vec<Vec<u8>> = roots.iter().map(|root| root.to_vec()).collect();
    let rustls = verifies(chain, &roots, at).is_ok();
    let scratch = tempfile::tempdir().unwrap();
    for purpose in ["sslclient", "sslserver"] {
        let openssl = verifies_at(scratch.path(), &roots, chain, purpose, at).await;
        assert_eq!(openssl.is_ok(), rustls, "{purpose}: {openssl:?}");
    }
    rustls
}

#[tokio::test]
async fn whoever_knows_only_the_root_before_believes_the_one_that_signs_by_the_bridge() {
    let Rotated { desk, before, now } = Rotated::new();
    let stranger = roots(&Desk::new()).remove(0);
    let chain = desk.enrol("web");
    assert_eq!(chain.len(), 3);
    for (roots, is_believed) in [
        (vec![&before[..]], true),
        (vec![&now[..]], true),
        (vec![&before[..], &now[..]], true),
        (vec![&now[..], &before[..]], true),
        (vec![&stranger[..]], false),
    ] {
        assert_eq!(verdict(&roots, &chain, desk.now()).await, is_believed, "{} roots", roots.len());
    }
    assert!(!verdict(&[&before], &chain[..2], desk.now()).await, "nothing but the bridge leads there");
    assert!(verdict(&[&now], &chain[..2], desk.now()).await, "and nobody else needs it");
}

#[tokio::test]
async fn chains_carry_it_for_a_month_and_end_with_their_leaf_always() {
    let Rotated { desk, before, now } = Rotated::new();
    let (mut chain, mut with) = (desk.enrol("web"), 0);
    let bridge = chain[2].clone();
    for _ in 0..40 * 3 {
        desk.pass(8 * HOUR);
        chain = chain_of(desk.renew("web", Some(&chain[0])).unwrap());
        let leaf_end = inspect_svid(&chain[0]).unwrap().not_after;
        assert!(leaf_end > desk.now() + Duration::from_secs(23 * HOUR), "a leaf is cut short");
        assert!(chain.iter().all(|one| end_of(one) >= end_of(&chain[0])), "something ends before the leaf");
        if let Some(carried) = chain.get(2) {
            assert_eq!(carried, &bridge);
            with += 1;
        }
    }
    assert!((29 * 3..=30 * 3).contains(&with), "{with} chains of {}", 40 * 3);
    assert!(end_of(&bridge) < meshd_pki::times::unix(desk.now()), "it has ended");
    // As if somebody served the ended one on.
    let late = [&chain[..], &[bridge]].concat();
    assert!(verdict(&[&now], &late, desk.now()).await, "who has the new root does not look at it");
    assert!(!verdict(&[&before], &late, desk.now()).await);
}

#[test]
fn it_is_the_same_after_a_restart_and_gone_when_switched_off() {
    let mut rotated = Rotated::new();
    let carried = rotated.desk.enrol("web")[2].clone();
    rotated.desk.open();
    assert_eq!(rotated.desk.enrol("db")[2], carried);
    rotated.desk.lifetimes.bridge = Duration::ZERO;
    rotated.desk.open();
    assert_eq!(rotated.desk.enrol("cache").len(), 2);
    assert_eq!(rotated.listed().vouched_by, None);
    assert!(!rotated.desk.status().to_text().contains("bridge         active"));
    let never = Rotated::of(Desk::with(Lifetimes { bridge: Duration::ZERO, ..Lifetimes::default() }));
    assert_eq!(never.desk.enrol("web").len(), 2);
    assert_eq!(never.listed().vouched_by, None);
}

#[test]
fn nobody_carries_it_while_the_root_that_vouches_is_denied() {
    let rotated = Rotated::new();
    let desk = &rotated.desk;
    assert_eq!(desk.enrol("web").len(), 3);
    let whom = || Some(DenyWhom { whom: Some(deny_whom::Whom::Authority(rotated.old())) });
    desk.done(Command::DenyAdd(DenyAdd { whom: whom(), reason: String::new() }));
    desk.pass(1);
    assert_eq!(desk.enrol("db").len(), 2);
    assert_eq!(rotated.listed().vouched_by, None);
    assert!(desk.status().to_text().contains("bridge         old"), "{}", desk.status().to_text());
    desk.done(Command::DenyRemove(DenyRemove { whom: whom() }));
    desk.pass(1);
    assert_eq!(desk.enrol("cache").len(), 3);
}

#[test]
fn an_emergency_has_none() {
    let desk = Desk::new();
    let first = desk.root("active").unwrap();
    desk.done(Command::AuthorityRotate(AuthorityRotate { force: false }));
    desk.pass(10);
    assert_ne!(desk.root("active").unwrap(), first);
    assert_eq!(desk.enrol("web").len(), 2);
}

#[test]
fn it_falls_with_a_taint_and_nobody_is_shut_out_for_having_carried_it() {
    let rotated = Rotated::new();
    let desk = &rotated.desk;
    let chain = desk.enrol("web");
    desk.report(&chain[0], &[&root_id(&rotated.now)]);
    let bundle = roots(desk);
    desk.done(taint(&rotated.old()));
    desk.pass(10);
    assert_eq!(desk.enrol("db").len(), 2);

    // What a host holds against a peer, once the old root is denied.
    let marks = |roots: &[Vec<u8>]| {
        let chain: Vec<&[u8]> = chain.iter().map(Vec::as_slice).collect();
        Marks::read(&chain, roots.iter().map(Vec::as_slice)).unwrap()
    };
    let denies = |root: &[u8], roots: &[Vec<u8>]| {
        let key = meshd_identity::sha256(X509Certificate::from_der(root).unwrap().1.public_key().raw);
        let whom = Whom::Authority(data_encoding::HEXLOWER.encode(&key));
        let set = DenySet { trust_domain: domain(), sequence: 1, entries: vec![Denied { whom, until: i64::MAX }] };
        DenyIndex::of(&set).denies(&marks(roots))
    };
    assert!(!denies(&rotated.before, &bundle), "it is under the new root, whoever else vouches for that");
    assert!(denies(&rotated.now, &bundle));
    assert!(denies(&rotated.before, std::slice::from_ref(&rotated.before)), "by no other way is it believed here");
}

/// Asks for a host's certificate at the port of the PKI, by what `held` says it is; whoever answers is believed.
async fn renew_as(lab: &Lab, held: &Svid) -> Result<(), Status> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let anybody = |_: &CertificateDer<'_>, _: &[CertificateDer<'_>], _: UnixTime| Ok(());
    let config = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(ServerJudge::new(provider, anybody)));
    let mut config = config.with_client_auth_cert(held.chain.clone(), held.key.clone_key()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let channel = connect_by(lab, config).await.unwrap();
    let mut pki = HostClient::with_origin(channel, "https://pki".parse().unwrap());
    let csr = request_over(&KeyPair::generate().unwrap());
    let items = vec![v1::IssueItem { spiffe_id: held.id.to_string(), csr }];
    let host_time_unix_ms = meshd_pki::times::unix_ms(lab.now());
    let request = v1::IssueBatchRequest { items, host_time_unix_ms, ..v1::IssueBatchRequest::default() };
    pki.issue_batch(request).await.map(drop)
}

fn roots_of(lab: &Lab) -> Vec<Vec<u8>> {
    Bundle::from_jwks(domain(), &lab.pki().bundle(&[]).unwrap().jwks).unwrap().roots
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thief_of_the_root_that_signs_is_refused_once_that_has_left_whoever_vouched_for_it() {
    let mut lab = Lab::start().await;
    for _ in 0..9 {
        lab.pass(DAY);
    }
    lab.join("web", &[]).await.unwrap();
    let thief = lab.copied().await;
    let stolen = thief.join("web", &[]).await.unwrap().host;
    assert_eq!(stolen.chain.len(), 3);
    renew_as(&lab, &stolen).await.unwrap();

    let (before, signs) = (roots_of(&lab).remove(0), roots_of(&lab).remove(1));
    let command = |command| match lab.pki().command(&alice(), command).unwrap() {
        Reply::Done(done) => done.follows.join("\n"),
        other => panic!("unexpected {other:?}"),
    };
    let said = command(taint(&root_id(&signs)));
    assert!(said.contains(&format!("root {} has vouched for it", root_id(&before))), "{said}");
    command(Command::AuthorityRotate(AuthorityRotate { force: true }));
    lab.pass(10);
    let roots = roots_of(&lab);
    assert!(roots.contains(&before) && !roots.contains(&signs), "{}", roots.len());
    let chain: Vec<Vec<u8>> = stolen.chain.iter().map(|one| one.to_vec()).collect();
    verifies(&chain, &roots, lab.now()).unwrap();

    let refused = renew_as(&lab, &stolen).await.unwrap_err();
    assert!(refused.message().contains("is denied in this mesh"), "{refused}");
    let removed = lab.audit_log();
    assert!(removed.contains("its key is denied until"), "{removed}");
    let mut host = lab.host("web");
    let set = timeout(PATIENCE, host.denied.wait_for(|set| set.sequence > 0)).await.unwrap().unwrap().clone();
    let refs: Vec<&[u8]> = chain.iter().map(Vec::as_slice).collect();
    let marks = Marks::read(&refs, roots.iter().map(Vec::as_slice)).unwrap();
    assert!(DenyIndex::of(&set).denies(&marks), "{set:?}");
    let renewed = host.until(|held| held.bundle.roots == roots && !held.host.chain.iter().eq(&stolen.chain)).await;
    renew_as(&lab, &renewed.host).await.unwrap();
    drop(host);

    let listed = match lab.pki().command(&alice(), Command::AuthorityList(AuthorityList {})).unwrap() {
        Reply::Authorities(all) => all.authorities,
        other => panic!("unexpected {other:?}"),
    };
    let waits = listed.into_iter().find(|one| one.id == root_id(&before)).unwrap().waits_for;
    assert!(waits.iter().any(|gate| gate.why.contains("it vouched for a root that is tainted")), "{waits:?}");
    lab.pass(DAY + HOUR);
    assert!(!roots_of(&lab).contains(&before), "{}", lab.audit_log());
    assert!(lab.audit_log().contains(&format!("it vouched for root {}, which is tainted", root_id(&signs))));
}

#[test]
fn operators_see_it_until_it_ends() {
    let rotated = Rotated::new();
    let desk = &rotated.desk;
    desk.enrol("web");
    let listed = rotated.listed();
    assert_eq!(listed.vouched_by, Some(rotated.old()));
    let until = listed.vouched_until.unwrap();
    let of_kind = |status: meshd_pki::status::Status| status.certificates.into_iter().find(|one| one.kind == "bridge");
    let shown = of_kind(desk.status()).unwrap();
    assert_eq!((shown.id, shown.issuer, shown.not_after), (listed.id.clone(), Some(rotated.old()), until.clone()));
    assert!(desk.status().to_text().contains("bridge         active"), "{}", desk.status().to_text());
    let series = format!("certificate_not_after_seconds{{kind=\"bridge\",id=\"{}\",state=\"active\"}}", listed.id);
    assert!(desk.metrics().contains(&series), "{}", desk.metrics());
    let activation = desk.audit_lines("root_activate").pop().unwrap();
    let detail = activation["detail"].as_str().unwrap();
    assert!(detail.contains(&format!("root {} vouches for it until {until}", rotated.old())), "{activation}");

    pass_days(desk, 35);
    assert_eq!(rotated.listed().vouched_by, None);
    assert!(of_kind(desk.status()).is_none());
    assert!(!desk.metrics().contains("kind=\"bridge\""));
    assert!(desk.status().problems.is_empty(), "{:?}", desk.status().problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pki_shows_it_at_its_port_so_that_followers_with_an_older_bundle_can_fetch_the_newer() {
    let lab = Lab::start().await;
    let before = lab.file("before.pem");
    let held = lab.join("web", &[]).await.unwrap();
    let pem = openssl(&["x509", "-inform", "DER"], &held.bundle.roots[0]).await.stdout;
    std::fs::write(&before, pem).unwrap();
    for _ in 0..9 {
        lab.pass(DAY);
    }
    let (at, before) = (meshd_pki::times::unix(lab.now()).to_string(), before.display().to_string());
    let address = lab.address();
    let shown =
        openssl(&["s_client", "-connect", &address, "-CAfile", &before, "-attime", &at, "-showcerts"], b"").await;
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert_eq!(text.matches("BEGIN CERTIFICATE").count(), 3, "{text}");
    assert!(text.contains("Verify return code: 0 (ok)"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_carries_it_is_served_on_when_the_root_before_is_denied() {
    let lab = Lab::start().await;
    for _ in 0..9 {
        lab.pass(DAY);
    }
    let id = workload("payments");
    let held = lab.join("web", &[&id]).await.unwrap();
    assert_eq!(held.host.chain.len(), 3);
    let whom = DenyWhom { whom: Some(deny_whom::Whom::Authority(root_id(&held.bundle.roots[0]))) };
    let deny = Command::DenyAdd(DenyAdd { whom: Some(whom), reason: String::new() });
    lab.pki().command(&alice(), deny).unwrap();
    lab.pki().refresh().unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    host.until(|held| held.workloads.contains_key(&id)).await;
}
