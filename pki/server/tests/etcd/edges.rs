//! Federation and an intermediate from outside: in etcd as in a file, on every server, and on the way between both.

use std::time::Duration;

use meshd_identity::Bundle;
use meshd_pki::commands::add_entry;
use meshd_pki::federation::commands::{Asked, Endpoint, FederationStatus, add, list, remove};
use meshd_pki::keeping::moving::{to_etcd, to_sqlite};
use meshd_pki::status::Status;
use meshd_pki::upstream::commands::{csr, import};
use meshd_pki_api::v1;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};

use crate::cluster::{Cluster, until};
use crate::desk::{DAY, Desk, HOUR, enrol, renew, renew_with};

/// Self-signed, and what signs with its key.
fn offline_root(desk: &Desk) -> (String, Issuer<'static, KeyPair>) {
    let params = authority(desk, "root of the drawer", BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), Issuer::new(params, key))
}

fn authority(desk: &Desk, name: &str, constraints: BasicConstraints) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = (desk.now() - Duration::from_secs(3 * DAY)).into();
    params.not_after = (desk.now() + Duration::from_secs(365 * DAY)).into();
    params
}

fn follow_another(desk: &Desk, state: &str, port: u16) {
    let other = "other.example".parse().unwrap();
    let (_, issuer) = offline_root(desk);
    let root = authority(desk, "theirs", BasicConstraints::Unconstrained).self_signed(issuer.key()).unwrap();
    let bundle = Bundle::new("other.example".parse().unwrap(), 7, 300, vec![root.der().to_vec()]).unwrap();
    let asked = Asked {
        trust_domain: other,
        url: &format!("https://127.0.0.1:{port}/bundle"),
        endpoint: Endpoint::Web { authorities: None },
        identities: &["*".to_owned()],
        bundle: Some(bundle.to_jwks()),
    };
    add(&desk.state(state), &asked, desk.now()).unwrap();
}

fn held(desk: &Desk, state: &str) -> Vec<(String, Option<u64>, usize)> {
    let told = |one: FederationStatus| (one.url, one.sequence, one.roots);
    list(&desk.state(state)).unwrap().into_iter().map(told).collect()
}

fn given(request: &str) -> Vec<u8> {
    use rcgen::PublicKeyData;
    CertificateSigningRequestParams::from_pem(request).unwrap().public_key.der_bytes().to_vec()
}

#[test]
fn federation_and_an_unanswered_request_move_into_etcd_and_back() {
    let desk = Desk::in_a_file(Cluster::start);
    follow_another(&desk, "a", 1);
    let request = csr(&desk.state("a"), desk.now()).unwrap();
    let before = held(&desk, "a");
    assert_eq!((before[0].1, before[0].2), (Some(7), 1));

    to_etcd(&desk.state("a"), desk.cluster.config(), desk.now()).unwrap();
    desk.replica("b", desk.cluster.config()).unwrap();
    assert_eq!((held(&desk, "a"), held(&desk, "b")), (before.clone(), before.clone()));
    assert_eq!(given(&csr(&desk.state("b"), desk.now()).unwrap()), given(&request), "it is the same key");
    follow_another(&desk, "b", 2);
    let changed = held(&desk, "a");
    assert!(changed[0].0.contains(":2/"), "{changed:?}");

    to_sqlite(&desk.state("a"), desk.now()).unwrap();
    assert_eq!(held(&desk, "a"), changed);
    assert_eq!(given(&csr(&desk.state("a"), desk.now()).unwrap()), given(&request));
    remove(&desk.state("a"), &"other.example".parse().unwrap(), desk.now()).unwrap();
    assert_eq!(held(&desk, "a"), []);
}

#[test]
fn hosts_of_every_server_are_told_of_a_domain_that_one_was_told_to_follow() {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config()).unwrap();
    let (a, b) = (desk.open("a"), desk.open("b"));
    let chain = enrol(&a, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    add_entry(&desk.state("a"), "web", "ns/shop/sa/web", desk.now()).unwrap();
    follow_another(&desk, "b", 1);
    let told = |pki: &meshd_pki::Pki| {
        let reply = pki.issue_batch(Some(&chain[0]), &v1::IssueBatchRequest::default(), "test");
        let bundles = reply.ok().and_then(|reply| reply.federation).map(|federation| federation.bundles);
        let domain = |one: &v1::FederatedBundle| one.bundle.as_ref().map(|bundle| bundle.trust_domain.clone());
        bundles.is_some_and(|bundles| bundles.iter().any(|one| domain(one).as_deref() == Some("other.example")))
    };
    until("both tell the host", || told(&a) && told(&b));
}

#[test]
fn an_intermediate_from_outside_signs_on_every_server() {
    let desk = Desk::new();
    desk.replica("b", desk.cluster.config()).unwrap();
    let (a, b) = (desk.open("a"), desk.open("b"));
    let mut chain = enrol(&a, &desk.token("a", "web")).unwrap().svid.unwrap().chain;
    let (root, issuer) = offline_root(&desk);
    let request = CertificateSigningRequestParams::from_pem(&csr(&desk.state("b"), desk.now()).unwrap()).unwrap();
    let mut params = authority(&desk, "intermediate of the drawer", BasicConstraints::Constrained(0));
    params.use_authority_key_identifier_extension = true;
    let intermediate = params.signed_by(&request.public_key, &issuer).unwrap();
    let answer = intermediate.pem() + &root;
    import(&desk.state("b"), answer.as_bytes(), None, desk.now()).unwrap();
    let mut sequence = 0;
    for _ in 0..4 {
        desk.pass(9 * HOUR);
        for pki in [&a, &b, &a] {
            pki.maintain().unwrap();
            (chain, sequence) = renew_with(pki, "web", &chain, sequence).unwrap();
        }
    }
    for pki in [&a, &b] {
        until("it signs here", || {
            pki.refresh().unwrap();
            chain = renew(pki, "web", &chain).unwrap();
            chain[1] == intermediate.der().to_vec()
        });
    }
    let status = Status::read(&desk.state("a"), desk.now()).unwrap();
    assert!(status.problems.is_empty(), "{:?}", status.problems);
}

#[test]
fn much_that_ended_at_once_is_forgotten_in_parts() {
    let desk = Desk::new();
    let pki = desk.open("a");
    // Each makes an intermediate of its own and is never seen again.
    for n in 0..30 {
        let name = format!("once-{n}");
        desk.replica(&name, desk.cluster.config()).unwrap();
        drop(desk.open(&name));
    }
    for n in 0..50 {
        desk.token("a", &format!("host-{n}"));
    }
    desk.pass(60 * DAY);
    let stored = |below: &str| {
        let prefix = format!("/meshd/pki/prod.example.org/r/{below}");
        desk.cluster.must(&["get", "--prefix", "--keys-only", &prefix]).split_whitespace().count()
    };
    assert!(stored("intermediate/") > 30 && stored("token/") == 50);
    until("what ended is forgotten", || {
        pki.maintain().unwrap();
        stored("token/") == 0 && stored("intermediate/") < 30
    });
}
