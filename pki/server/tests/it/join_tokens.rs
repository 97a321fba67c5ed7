//! Tokens for several hosts, and tokens for some networks.

use std::time::SystemTime;

use meshd_identity::JoinToken;
use meshd_pki::commands::{TokenRequest, create_token};
use meshd_pki_api::v1;
use meshd_pki_client::join;
use rcgen::KeyPair;

use crate::enrolment::enrol_request;
use crate::support::{Lab, workload};

fn token(lab: &Lab, more: TokenRequest<'_>) -> JoinToken {
    let (pki, allow) = ([lab.address()], ["ns/shop/sa/payments".to_owned()]);
    create_token(&lab.state(), &TokenRequest { host: "web", allow: &allow, pki: &pki, ..more }, SystemTime::now())
        .unwrap()
}

fn for_hosts(max_uses: u32) -> TokenRequest<'static> {
    TokenRequest { max_uses, ..TokenRequest::default() }
}

fn asking(token: &JoinToken, key: &KeyPair, host: &str) -> v1::EnrollRequest {
    v1::EnrollRequest { host_id: host.to_owned(), ..enrol_request(token, key) }
}

#[tokio::test]
async fn several_hosts_join_by_one_token_each_under_an_id_of_its_own() {
    let lab = Lab::start().await;
    let token = token(&lab, for_hosts(3));
    let mut ids = Vec::new();
    for name in ["one", "two"] {
        let held = join(&lab.host_dir(name), &token, None).await.unwrap();
        assert!(held.host_id.starts_with("web-") && held.host_id.len() == "web-".len() + 10, "{}", held.host_id);
        ids.push(held.host_id);
    }
    assert_ne!(ids[0], ids[1]);
    assert_eq!(join(&lab.host_dir("three"), &token, Some("web-blue")).await.unwrap().host_id, "web-blue");
    let mut host = lab.host("three");
    host.want(&[&workload("payments")]);
    host.until(|held| held.workloads.contains_key(&workload("payments"))).await;
    let error = join(&lab.host_dir("four"), &token, None).await.unwrap_err().to_string();
    assert!(error.contains("has enrolled 3 hosts") && error.contains("--max-uses 3"), "{error}");
}

#[tokio::test]
async fn a_key_that_comes_again_is_the_same_host_and_no_further_use() {
    let lab = Lab::start().await;
    let token = token(&lab, for_hosts(2));
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let enrol = |key: &KeyPair, host: &str| lab.pki().enrol(&asking(&token, key, host), "test");
    let first = enrol(&key, "").unwrap().host_id;
    for _ in 0..3 {
        assert_eq!(enrol(&key, "").unwrap().host_id, first);
    }
    assert!(enrol(&key, "web-else").unwrap_err().to_string().contains("join without a host id"));
    enrol(&other, "").unwrap();
}

#[tokio::test]
async fn a_token_for_several_hosts_names_none_beyond_its_prefix_and_replaces_none() {
    let lab = Lab::start().await;
    lab.join("web-old", &[]).await.unwrap();
    let token = token(&lab, for_hosts(2));
    for (asked, expected) in
        [("db-1", "`web-...`"), ("web", "`web-...`"), ("web-", "`web-...`"), ("web-old", "is enrolled already")]
    {
        let error = lab.pki().enrol(&asking(&token, &KeyPair::generate().unwrap(), asked), "test").unwrap_err();
        assert!(error.to_string().contains(expected), "{asked}: {error}");
    }
    // None of these was a use.
    for _ in 0..2 {
        lab.pki().enrol(&asking(&token, &KeyPair::generate().unwrap(), ""), "test").unwrap();
    }
}

#[tokio::test]
async fn a_token_with_networks_is_good_from_there_only() {
    let lab = Lab::start().await;
    let from = ["10.1.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()];
    let token = token(&lab, TokenRequest { from: &from, ..for_hosts(9) });
    let enrol = |remote: &str| lab.pki().enrol(&enrol_request(&token, &KeyPair::generate().unwrap()), remote);
    for remote in ["10.1.255.1:4", "[::ffff:10.1.0.1]:4", "[fd00::7]:4"] {
        enrol(remote).unwrap();
    }
    for remote in ["10.2.0.1:4", "[fe80::1]:4", "nowhere"] {
        let error = enrol(remote).unwrap_err().to_string();
        assert!(error.contains("10.1.0.0/16, fd00::/8") && error.contains(remote), "{error}");
    }
    // Over the network, too: this host comes from loopback.
    let error = join(&lab.host_dir("web"), &token, None).await.unwrap_err().to_string();
    assert!(error.contains("127.0.0.1") && error.contains("--from"), "{error}");
}
