//! Servers that are not the PKI. None of them may get the token's secret.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use meshd_identity::{JoinToken, Secret, SpiffeId, TrustDomain};
use meshd_pki_api::v1;
use meshd_pki_api::v1::host_server::{Host, HostServer};
use meshd_pki_client::fake::FakeCa;
use meshd_pki_client::{JoinError, Svid, join};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status};

use crate::support::{Lab, domain};

struct Impostor {
    bundle: v1::TrustBundle,
    secrets_seen: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl Host for Impostor {
    async fn bundle(&self, _: Request<v1::BundleRequest>) -> Result<Response<v1::BundleReply>, Status> {
        Ok(Response::new(v1::BundleReply { bundle: Some(self.bundle.clone()) }))
    }

    async fn enroll(&self, _: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        self.secrets_seen.fetch_add(1, SeqCst);
        // Final for the client, so that a test of a good impostor does not wait for retries.
        Err(Status::permission_denied("thank you"))
    }

    async fn issue_batch(&self, _: Request<v1::IssueBatchRequest>) -> Result<Response<v1::IssueBatchReply>, Status> {
        Err(Status::unimplemented("an impostor issues nothing"))
    }
}

/// Serves under a certificate at an address, for the rest of the test; returns the address.
pub(crate) async fn serve_as(service: impl Host, svid: &Svid, address: SocketAddr) -> SocketAddr {
    let router: Router = Router::new().route_service("/meshd.pki.v1.Host/{method}", HostServer::new(service));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(svid.chain.clone(), svid.key.clone_key())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, router) = (acceptor.clone(), router.clone());
            tokio::spawn(async move {
                let Ok(tls) = acceptor.accept(socket).await else { return };
                let service = TowerToHyperService::new(router);
                // A refused impostor sees its connection end; that is the point of the test.
                _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(tls), service).await;
            });
        }
    });
    address
}

/// Serves `bundle` under `svid` for the rest of the test; returns the address and the count of secrets received.
async fn impostor(bundle: v1::TrustBundle, svid: &Svid) -> (String, Arc<AtomicU32>) {
    let secrets_seen = Arc::new(AtomicU32::new(0));
    let service = Impostor { bundle, secrets_seen: secrets_seen.clone() };
    let address = serve_as(service, svid, SocketAddr::from(([127, 0, 0, 1], 0))).await;
    (address.to_string(), secrets_seen)
}

pub(crate) fn wire_bundle(ca: &FakeCa, trust_domain: &TrustDomain) -> v1::TrustBundle {
    let bundle = ca.bundle();
    let trust_domain = trust_domain.to_string();
    v1::TrustBundle { trust_domain, sequence: bundle.sequence, jwks: bundle.to_jwks() }
}

fn token_for(ca: &FakeCa, address: &str) -> JoinToken {
    JoinToken {
        id: "1234".to_owned(),
        secret: Secret([7; 32]),
        pki: vec![address.to_owned()],
        bundle_digest: ca.bundle().digest(),
        recovery_key_id: [0; 32],
    }
}

/// Joins a server that holds the pinned bundle and presents `svid`; returns the error and the secrets it got.
async fn join_under(ca: &FakeCa, svid: &Svid) -> (String, u32) {
    let (address, secrets) = impostor(wire_bundle(ca, &domain()), svid).await;
    let dir = tempfile::tempdir().unwrap();
    let error = join(dir.path(), &token_for(ca, &address), None).await.unwrap_err();
    (error.to_string(), secrets.load(SeqCst))
}

#[tokio::test]
async fn a_server_with_the_right_chain_and_identity_gets_the_token() {
    // The control: what the cases below lack is what makes the difference.
    let ca = FakeCa::new(domain());
    let (error, secrets) = join_under(&ca, &ca.svid(&SpiffeId::pki(&domain()))).await;
    assert!(error.contains("thank you") && secrets == 1, "{error}");
}

#[tokio::test]
async fn an_expired_server_certificate_is_refused() {
    let ca = FakeCa::new(domain());
    let (error, secrets) = join_under(&ca, &ca.expired_svid(&SpiffeId::pki(&domain()))).await;
    assert!(error.contains("expired") && secrets == 0, "{error}");
}

#[tokio::test]
async fn a_server_of_another_trust_domain_is_refused() {
    let ca = FakeCa::new(domain());
    let (error, secrets) = join_under(&ca, &ca.svid(&SpiffeId::pki(&"evil.example".parse().unwrap()))).await;
    assert!(error.contains("spiffe://evil.example/") && error.contains("expected") && secrets == 0, "{error}");
}

#[tokio::test]
async fn an_enrolled_host_cannot_pose_as_the_pki() {
    let ca = FakeCa::new(domain());
    let (error, secrets) = join_under(&ca, &ca.svid(&SpiffeId::host(&domain(), "web").unwrap())).await;
    assert!(error.contains("sa/web, expected") && secrets == 0, "{error}");
}

#[tokio::test]
async fn a_server_that_replays_the_bundle_but_has_no_certificate_under_it_is_refused() {
    let (ca, other) = (FakeCa::new(domain()), FakeCa::new(domain()));
    let (error, secrets) = join_under(&ca, &other.svid(&SpiffeId::pki(&domain()))).await;
    assert!(error.contains("does not verify against the bundle") && secrets == 0, "{error}");
}

#[tokio::test]
async fn a_server_with_a_bundle_of_its_own_is_refused() {
    let (ca, mine) = (FakeCa::new(domain()), FakeCa::new(domain()));
    let svid = mine.svid(&SpiffeId::pki(&domain()));
    let (address, secrets) = impostor(wire_bundle(&mine, &domain()), &svid).await;
    let dir = tempfile::tempdir().unwrap();
    let error = join(dir.path(), &token_for(&ca, &address), None).await.unwrap_err();
    assert!(matches!(error, JoinError::Unreachable { .. }));
    assert!(error.to_string().contains("not the one that is pinned"), "{error}");
    assert_eq!(secrets.load(SeqCst), 0);
}

#[tokio::test]
async fn a_token_of_one_pki_does_not_join_another() {
    let (lab, other) = (Lab::start().await, Lab::start().await);
    let mut token = lab.token("web", &[]);
    token.pki = vec![other.address()];
    let error = join(&lab.host_dir("web"), &token, None).await.unwrap_err().to_string();
    assert!(error.contains("never had the bundle asked for"), "{error}");
}
