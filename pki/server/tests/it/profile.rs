//! What others make of our certificates: OpenSSL checks more than rustls does.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use meshd_pki::times::unix;
use meshd_pki_client::Svid;

use crate::support::{Lab, openssl, workload};

fn pem(der: &[u8]) -> String {
    let text = data_encoding::BASE64.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

async fn verifies(dir: &Path, root: &[u8], svid: &Svid, purpose: &str) -> Result<(), String> {
    verifies_at(dir, &[root.to_vec()], &svid.chain, purpose, SystemTime::now()).await
}

pub(crate) async fn verifies_at(
    dir: &Path,
    roots: &[Vec<u8>],
    chain: &[impl AsRef<[u8]>],
    purpose: &str,
    at: SystemTime,
) -> Result<(), String> {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    fs::write(path("roots.pem"), roots.iter().map(|root| pem(root)).collect::<String>()).unwrap();
    fs::write(path("chain.pem"), chain[1..].iter().map(|one| pem(one.as_ref())).collect::<String>()).unwrap();
    fs::write(path("leaf.pem"), pem(chain[0].as_ref())).unwrap();
    let (roots, chain, leaf) = (path("roots.pem"), path("chain.pem"), path("leaf.pem"));
    let at = unix(at).to_string();
    let judged = ["verify", "-x509_strict", "-purpose", purpose, "-attime", &at];
    let arguments = [&judged[..], &["-CAfile", &roots, "-untrusted", &chain, &leaf]].concat();
    let output = openssl(&arguments, b"").await;
    let text = [output.stdout, output.stderr].concat();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&text).into_owned()) }
}

async fn show(der: &[u8]) -> String {
    let output = openssl(&["x509", "-noout", "-text"], pem(der).as_bytes()).await;
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn openssl_verifies_the_chain_for_both_purposes() {
    let lab = Lab::start().await;
    let id = workload("payments");
    lab.join("web", &[&id]).await.unwrap();
    let mut host = lab.host("web");
    host.want(&[&id]);
    let held = host.until(|held| held.workloads.contains_key(&id)).await;
    let dir = tempfile::tempdir().unwrap();
    for svid in [&held.host, &held.workloads[&id]] {
        for purpose in ["sslserver", "sslclient"] {
            verifies(dir.path(), &held.bundle.roots[0], svid, purpose).await.unwrap();
        }
    }
    let other = Lab::start().await.join("web", &[]).await.unwrap();
    let error = verifies(dir.path(), &other.bundle.roots[0], &held.host, "sslserver").await.unwrap_err();
    assert!(error.contains("unable to get"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn openssl_reads_the_profile_we_mean() {
    let lab = Lab::start().await;
    let held = lab.join("web", &[]).await.unwrap();
    let leaf = show(&held.host.chain[0]).await;
    for part in [
        "Subject: \n",
        "X509v3 Subject Alternative Name: critical\n                URI:spiffe://prod.example.org/ns/meshd-system/sa/web",
        "X509v3 Basic Constraints: critical\n                CA:FALSE",
        "X509v3 Key Usage: critical\n                Digital Signature\n",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "X509v3 Authority Key Identifier",
        "NIST CURVE: P-256",
    ] {
        assert!(leaf.contains(part), "{part}\n{leaf}");
    }
    let intermediate = show(&held.host.chain[1]).await;
    for part in ["CA:TRUE, pathlen:0", "Certificate Sign", "X509v3 Subject Key Identifier", "serialNumber", "meshd ca"]
    {
        assert!(intermediate.contains(part), "{part}\n{intermediate}");
    }
    let root = show(&held.bundle.roots[0]).await;
    for part in ["CA:TRUE\n", "O = prod.example.org, CN = meshd root", "URI:spiffe://prod.example.org\n"] {
        assert!(root.contains(part), "{part}\n{root}");
    }
}
