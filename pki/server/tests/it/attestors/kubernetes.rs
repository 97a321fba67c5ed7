use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256};
use data_encoding::BASE64URL_NOPAD;
use meshd_identity::signed::sign_bytes;
use meshd_identity::{JwtKey, KeyParameters};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;
use meshd_pki_client::{Proof, join_by};
use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::support::{Lab, eventually, request_over, workload};

pub(super) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
const CLUSTER: &str = "[[kubernetes]]\nname = \"prod\"\nissuer = \"https://kubernetes.default.svc.cluster.local\"\n@KEYS@\n\
                       [[kubernetes.service_account]]\nnamespace = \"mesh\"\naccount = \"meshd\"\nhost = \"k8s-{node}\"\n\
                       allow = [\"ns/shop/sa/payments\"]\n";

/// Signs as a cluster does: by RSA as most, or by P-256.
pub(super) enum Cluster {
    Rsa(RsaKeyPair),
    Ec(KeyPair),
}

impl Cluster {
    pub(super) fn rsa() -> Cluster {
        Cluster::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap())
    }

    /// As `kubectl get --raw /openid/v1/jwks` shows it.
    pub(super) fn jwks(&self) -> String {
        let key = match self {
            Cluster::Rsa(pair) => {
                let key = pair.public_key();
                let n = text(key.modulus().big_endian_without_leading_zero());
                let e = text(key.exponent().big_endian_without_leading_zero());
                json!({ "use": "sig", "kty": "RSA", "kid": "k", "alg": "RS256", "n": n, "e": e })
            }
            Cluster::Ec(pair) => {
                let key = JwtKey::from_spki("k", &pair.subject_public_key_info()).unwrap();
                let KeyParameters::Ec { curve, x, y } = key.parameters else { panic!("not elliptic") };
                json!({ "use": "sig", "kty": "EC", "kid": "k", "alg": "ES256", "crv": curve, "x": x, "y": y })
            }
        };
        json!({ "keys": [key] }).to_string()
    }

    pub(super) fn token(&self, claims: &Value) -> String {
        let name = if matches!(self, Cluster::Rsa(_)) { "RS256" } else { "ES256" };
        let header = json!({ "alg": name, "kid": "k" });
        let signed = format!("{}.{}", text(header.to_string().as_bytes()), text(claims.to_string().as_bytes()));
        let signature = match self {
            Cluster::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
                signature
            }
            Cluster::Ec(pair) => sign_bytes(&pair.serialize_der(), signed.as_bytes()).unwrap(),
        };
        format!("{signed}.{}", text(&signature))
    }
}

fn text(bytes: &[u8]) -> String {
    BASE64URL_NOPAD.encode(bytes)
}

/// What the API server says of a pod of the DaemonSet `meshd`.
fn claims() -> Value {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    json!({
        "aud": ["meshd-pki"], "iss": ISSUER, "iat": now, "nbf": now, "exp": now + 600, "jti": "1",
        "sub": "system:serviceaccount:mesh:meshd",
        "kubernetes.io": {
            "namespace": "mesh",
            "node": { "name": "worker-1", "uid": "2" },
            "pod": { "name": "meshd-x", "uid": "3" },
            "serviceaccount": { "name": "meshd", "uid": "4" },
        },
    })
}

async fn lab(cluster: &Cluster) -> Lab {
    let attestors = CLUSTER.replace("@KEYS@", "jwks_file = \"@DIR@/jwks.json\"");
    Lab::start_with_attestors(&[("jwks.json", &cluster.jwks()), ("attestors.toml", &attestors)]).await
}

#[tokio::test]
async fn a_pod_joins_by_its_token_whatever_its_cluster_signs_with() {
    for cluster in [Cluster::rsa(), Cluster::Ec(KeyPair::generate().unwrap())] {
        let lab = lab(&cluster).await;
        let proof = Proof::Kubernetes(cluster.token(&claims()));
        let held = join_by(&lab.host_dir("pod"), &lab.pin(), &proof, None).await.unwrap();
        assert_eq!(held.host_id, "k8s-worker-1");
        let mut host = lab.host("pod");
        host.want(&[&workload("payments")]);
        host.until(|held| held.workloads.contains_key(&workload("payments"))).await;
        assert!(lab.audit_log().contains("\"detail\":\"by kubernetes:prod\""));
    }
}

#[tokio::test]
async fn tokens_for_others_of_others_and_of_yesterday_make_no_host() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster).await;
    let enrol = |token: String| {
        let attestation = Some(Attestation::KubernetesToken(v1::KubernetesTokenProof { token }));
        let csr = request_over(&KeyPair::generate().unwrap());
        lab.pki().enrol(&v1::EnrollRequest { attestation, csr, ..v1::EnrollRequest::default() }, "10.0.0.9:1")
    };
    let refusal = |token: String| enrol(token).unwrap_err().to_string();
    let with = |pointer: &str, value: Value| {
        let mut changed = claims();
        *changed.pointer_mut(pointer).unwrap() = value;
        cluster.token(&changed)
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    for (token, expected) in [
        (with("/aud", json!(["https://kubernetes.default.svc"])), "not for `meshd-pki`"),
        (with("/iss", json!("https://elsewhere.example")), "of `https://elsewhere.example`"),
        (with("/exp", json!(now - 86_400)), "the token ended 864"),
        (with("/kubernetes.io/serviceaccount/name", json!("default")), "`mesh/default` is none of"),
        (with("/kubernetes.io/namespace", json!("shop")), "`shop/meshd` is none of"),
        (with("/kubernetes.io/node", Value::Null), "no `node`"),
        (with("/kubernetes.io/node/name", json!("a/sa/b")), "cannot be in a host id"),
        (Cluster::rsa().token(&claims()), "signature does not verify"),
        ("a.b.c".to_owned(), "no signed token"),
    ] {
        let said = refusal(token);
        assert!(said.contains(expected), "{expected}: {said}");
    }
    enrol(cluster.token(&claims())).unwrap();
    let log = lab.audit_log();
    assert!(!log.contains(&cluster.token(&claims())[..40]), "a token is in the audit log");
}

#[tokio::test]
async fn until_the_keys_of_a_cluster_are_there_its_pods_are_told_to_try_again() {
    let cluster = Cluster::rsa();
    let attestors = CLUSTER.replace("@KEYS@", "jwks_url = \"https://127.0.0.1:1/openid/v1/jwks\"");
    let lab = Lab::start_with_attestors(&[("attestors.toml", &attestors)]).await;
    let enrol = |token: String| {
        let attestation = Some(Attestation::KubernetesToken(v1::KubernetesTokenProof { token }));
        let csr = request_over(&KeyPair::generate().unwrap());
        let request = v1::EnrollRequest { attestation, csr, ..v1::EnrollRequest::default() };
        lab.pki().enrol(&request, "10.0.0.9:1").unwrap_err()
    };
    let refused = enrol(cluster.token(&claims()));
    assert_eq!(
        (refused.kind(), refused.to_string().contains("cluster `prod` are not here yet")),
        ("unavailable", true)
    );
    let mut elsewhere = claims();
    elsewhere["iss"] = json!("https://elsewhere.example");
    assert_eq!(enrol(cluster.token(&elsewhere)).kind(), "unauthenticated");
}

/// Answers as the API server does, to whoever shows the right token.
async fn api_server(jwks: String) -> (String, u16) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], der).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let Ok(mut socket) = acceptor.accept(socket).await else { continue };
            let mut request = vec![0; 4096];
            let length = socket.read(&mut request).await.unwrap_or(0);
            let request = String::from_utf8_lossy(&request[..length]).to_lowercase();
            let is_right =
                request.starts_with("get /openid/v1/jwks ") && request.contains("authorization: bearer let-me-in\r");
            let (status, body) = if is_right { ("200 OK", jwks.as_str()) } else { ("401 Unauthorized", "") };
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            _ = socket.write_all(format!("{head}{body}").as_bytes()).await;
            _ = socket.shutdown().await;
        }
    });
    (certificate.pem(), port)
}

#[tokio::test]
async fn the_keys_of_a_cluster_are_asked_of_it_over_its_own_authority() {
    let cluster = Cluster::rsa();
    let (ca, port) = api_server(cluster.jwks()).await;
    let keys = format!(
        "jwks_url = \"https://localhost:{port}/openid/v1/jwks\"\nca_file = \"@DIR@/ca.pem\"\nbearer_file = \"@DIR@/bearer\""
    );
    let attestors = CLUSTER.replace("@KEYS@", &keys);
    let files = [("ca.pem", ca.as_str()), ("bearer", "let-me-in\n"), ("attestors.toml", &attestors)];
    let lab = Lab::start_with_attestors(&files).await;
    eventually("the keys are there", || lab.pki().metrics.encode().contains("meshd_pki_attestors_bad 0")).await;
    let proof = Proof::Kubernetes(cluster.token(&claims()));
    let held = join_by(&lab.host_dir("pod"), &lab.pin(), &proof, None).await.unwrap();
    assert_eq!(held.host_id, "k8s-worker-1");
}
