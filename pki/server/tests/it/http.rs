use meshd_identity::Bundle;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Lab, domain, eventually, openssl};

async fn get(lab: &Lab, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: pki\r\nConnection: close\r\n\r\n");
    let address = lab.address();
    let arguments = ["s_client", "-quiet", "-ign_eof", "-alpn", "http/1.1", "-connect", &address];
    let output = openssl(&arguments, request.as_bytes()).await;
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bundle_is_served_as_spiffe_wants_it() {
    let lab = Lab::start().await;
    let reply = get(&lab, "/.well-known/spiffe-bundle").await;
    assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("content-type: application/json"), "{reply}");
    let (_, body) = reply.split_once("\r\n\r\n").unwrap();
    let bundle = Bundle::from_jwks(domain(), body.as_bytes()).unwrap();
    assert_eq!(bundle.digest(), lab.token("web", &[]).bundle_digest);
    let digest = data_encoding::HEXLOWER.encode(&bundle.digest());
    assert!(get(&lab, &format!("/v1/bundle?sha256={digest}")).await.ends_with(body));
    let other = digest.replace(|c: char| c.is_ascii_digit(), "a");
    assert!(get(&lab, &format!("/v1/bundle?sha256={other}")).await.starts_with("HTTP/1.1 404"));
    assert!(get(&lab, "/v1/bundle?sha256=xyz").await.starts_with("HTTP/1.1 400"));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_answered_on_the_same_port() {
    let lab = Lab::start().await;
    assert!(get(&lab, "/healthz").await.ends_with("ok\n"));
}

#[tokio::test]
async fn nonsense_on_the_port_disturbs_nobody() {
    let lab = Lab::start().await;
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 0xff, 0xff, 1], &[0; 1000]] {
        let mut socket = TcpStream::connect(lab.address()).await.unwrap();
        socket.write_all(nonsense).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut rest = Vec::new();
        // A reset is as good an end as a close.
        _ = socket.read_to_end(&mut rest).await;
    }
    lab.join("web", &[]).await.unwrap();
    let counted = || lab.pki().metrics.encode().contains("meshd_pki_tls_failures_total 3");
    eventually("the three handshakes are counted", counted).await;
}
