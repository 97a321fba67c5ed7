use std::fs;
use std::time::{Duration, SystemTime};

use meshd_identity::{SpiffeId, sha256};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;
use meshd_pki_client::{Agent, JoinError, join};
use rcgen::{KeyPair, PublicKeyData};

use crate::support::{Lab, domain, request_over, workload};

pub(crate) fn enrol_request(token: &meshd_identity::JoinToken, key: &KeyPair) -> v1::EnrollRequest {
    let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
    v1::EnrollRequest {
        attestation: Some(Attestation::JoinToken(proof)),
        host_id: String::new(),
        csr: request_over(key),
        host_time_unix_ms: 0,
    }
}

#[tokio::test]
async fn a_token_makes_a_host() {
    let lab = Lab::start().await;
    let held = lab.join("web", &[&workload("payments")]).await.unwrap();
    assert_eq!(held.host_id, "web");
    assert_eq!(held.host.id, SpiffeId::host(&domain(), "web").unwrap());
    assert_eq!(held.pki, [lab.address()]);
    let left = held.host.not_after.duration_since(SystemTime::now()).unwrap();
    assert!(left > Duration::from_secs(23 * 3600) && left <= Duration::from_secs(24 * 3600), "{left:?}");
    assert!(!lab.host_dir("web").join("enrol.key").exists(), "the enrolment is over");
    assert!(lab.audit_log().contains("\"event\":\"enrol\",\"result\":\"ok\",\"host\":\"web\""));
}

#[tokio::test]
async fn a_host_joins_once_and_is_told_how_to_join_again() {
    let lab = Lab::start().await;
    lab.join("web", &[]).await.unwrap();
    let error = lab.join("web", &[]).await.unwrap_err();
    assert!(matches!(&error, JoinError::AlreadyJoined { host_id, .. } if host_id == "web"), "{error}");
}

#[tokio::test]
async fn a_used_token_is_refused_to_another_key() {
    let lab = Lab::start().await;
    let token = lab.token("web", &[]);
    join(&lab.host_dir("web"), &token, None).await.unwrap();
    let error = join(&lab.host_dir("thief"), &token, None).await.unwrap_err().to_string();
    assert!(error.contains("already used") && error.contains("enrolled as `web`"), "{error}");
    assert!(Agent::open(&lab.host_dir("thief")).is_err());
    assert!(lab.audit_log().contains("\"event\":\"enrol\",\"result\":\"refused\""));
}

#[tokio::test]
async fn the_same_key_may_use_its_token_again_until_it_ends() {
    let lab = Lab::start().await;
    let token = lab.token("web", &[]);
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let first = lab.pki().enrol(&enrol_request(&token, &key), "test").unwrap();
    let second = lab.pki().enrol(&enrol_request(&token, &key), "test").unwrap();
    assert_eq!(first.host_id, second.host_id);
    assert_ne!(first.svid, second.svid, "each reply is a certificate of its own");
    assert!(lab.pki().enrol(&enrol_request(&token, &other), "test").is_err());
}

#[tokio::test]
async fn a_join_whose_reply_was_lost_succeeds_when_repeated() {
    let lab = Lab::start().await;
    let token = lab.token("web", &[]);
    // The first try got as far as the PKI, and the host kept its key.
    let key = KeyPair::generate().unwrap();
    lab.pki().enrol(&enrol_request(&token, &key), "test").unwrap();
    let pending = data_encoding::BASE64.encode(&key.serialize_der());
    fs::create_dir_all(lab.host_dir("web")).unwrap();
    fs::write(lab.host_dir("web").join("enrol.key"), format!("{} {pending}\n", token.id)).unwrap();
    let held = join(&lab.host_dir("web"), &token, None).await.unwrap();
    assert_eq!(held.host.key.secret_der(), key.serialize_der());
}

#[tokio::test]
async fn the_host_id_of_the_token_is_the_one_permitted() {
    let lab = Lab::start().await;
    let token = lab.token("web", &[]);
    let error = join(&lab.host_dir("web"), &token, Some("db")).await.unwrap_err().to_string();
    assert!(error.contains("claims to be `db`") && error.contains("permits this token `web`"), "{error}");
    assert!(error.contains("meshd-pki token create --host db"), "{error}");
    assert_eq!(join(&lab.host_dir("web"), &token, Some("web")).await.unwrap().host_id, "web");
}

#[tokio::test]
async fn a_forged_secret_and_an_unknown_token_get_the_same_answer() {
    let lab = Lab::start().await;
    let good = lab.token("web", &[]);
    let mut forged = good.clone();
    forged.secret.0[0] ^= 1;
    let mut unknown = good;
    unknown.id = "ffff".to_owned();
    let key = KeyPair::generate().unwrap();
    let first = lab.pki().enrol(&enrol_request(&forged, &key), "test").unwrap_err();
    let second = lab.pki().enrol(&enrol_request(&unknown, &key), "test").unwrap_err();
    assert_eq!(first, second);
    assert!(!lab.audit_log().contains(&data_encoding::BASE64URL_NOPAD.encode(&forged.secret.0)));
}

#[tokio::test]
async fn a_token_that_names_another_recovery_key_is_not_joined() {
    let lab = Lab::start().await;
    let mut token = lab.token("web", &[]);
    token.recovery_key_id[0] ^= 1;
    let error = join(&lab.host_dir("web"), &token, None).await.unwrap_err();
    assert!(matches!(error, JoinError::RecoveryKey { .. }), "{error}");
    assert!(Agent::open(&lab.host_dir("web")).is_err());
}

#[tokio::test]
async fn the_recovery_key_is_pinned_on_disk() {
    let lab = Lab::start().await;
    lab.join("web", &[]).await.unwrap();
    let pem = fs::read_to_string(lab.state().join("recovery.key")).unwrap();
    let public = KeyPair::from_pem(&pem).unwrap().subject_public_key_info();
    let stored = fs::read_to_string(lab.host_dir("web").join("identity.1")).unwrap();
    let pinned = format!("\"recovery_keys\":[\"{}\"]", data_encoding::BASE64.encode(&public));
    assert!(stored.contains(&pinned), "the public half is not in the identity file");
    assert_eq!(sha256(&public), lab.token("other", &[]).recovery_key_id);
}

#[tokio::test]
async fn a_dead_address_in_the_token_does_not_stop_a_join() {
    let lab = Lab::start().await;
    let mut token = lab.token("web", &[]);
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    token.pki.insert(0, unused.to_string());
    join(&lab.host_dir("web"), &token, None).await.unwrap();
}

#[tokio::test]
async fn nothing_of_the_request_but_its_key_reaches_the_certificate() {
    let lab = Lab::start().await;
    let token = lab.token("web", &[]);
    let key = KeyPair::generate().unwrap();
    let mut greedy = rcgen::CertificateParams::new(vec!["payments.shop".to_owned()]).unwrap();
    greedy.subject_alt_names.push(rcgen::SanType::URI(workload("payments").as_str().try_into().unwrap()));
    greedy.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let mut request = enrol_request(&token, &key);
    request.csr = greedy.serialize_request(&key).unwrap().der().to_vec();
    let reply = lab.pki().enrol(&request, "test").unwrap();
    let info = meshd_identity::inspect_svid(&reply.svid.unwrap().chain[0]).unwrap();
    assert_eq!(info.id.short(), "ns/meshd-system/sa/web");
}
