//! Proxies of Istio, as ztunnel meets its authority: TLS by the DNS name alone, a projected token as bearer, and in the
//! metadata whom it asks for.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use meshd_identity::{Bundle, inspect_svid};
use meshd_pki::admin::AdminError;
use meshd_pki::times::unix_ms;
use meshd_pki_api::admin::command::Command;
use meshd_pki_api::admin::reply::Reply;
use meshd_pki_api::admin::{AuthorityPrepare, AuthorityTaint, DenyAdd, DenyWhom, deny_whom};
use meshd_pki_api::istio::istio_certificate_service_client::IstioCertificateServiceClient;
use meshd_pki_api::istio::{IstioCertificateRequest, Kind, Struct, Value};
use meshd_pki_api::v1;
use meshd_pki_api::v1::enroll_request::Attestation;
use rcgen::{CertificateParams, KeyPair, PublicKeyData, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::body::Body;
use tonic::{Code, Status};
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::kubernetes::{Cluster, ISSUER};
use crate::support::{Lab, domain, openssl, request_over};

const NAME: &str = "pki.example.org";
const GRANTS: &str = "[[kubernetes]]\nname = \"prod\"\nissuer = \"https://kubernetes.default.svc.cluster.local\"\n\
                      jwks_file = \"@DIR@/jwks.json\"\n\
                      [istio]\nclusters = [\"prod\"]\nnamespaces = [\"shop\"]\n\
                      trusted_node_accounts = [\"istio-system/ztunnel\"]\n";
const PAYMENTS: &str = "spiffe://prod.example.org/ns/shop/sa/payments";

/// What a proxy holds after it was answered, read as ztunnel reads it.
#[derive(Debug)]
struct Held {
    chain: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// As they came.
    elements: Vec<String>,
}

impl Held {
    fn id(&self) -> String {
        inspect_svid(&self.chain[0]).unwrap().id.to_string()
    }

    fn left(&self, lab: &Lab) -> u64 {
        let end = inspect_svid(&self.chain[0]).unwrap().not_after;
        end.duration_since(lab.now()).unwrap().as_secs()
    }

    fn serial(&self) -> String {
        inspect_svid(&self.chain[0]).unwrap().serial
    }
}

/// What a call shows and asks.
#[derive(Default)]
struct Call<'a> {
    token: Option<String>,
    certificate: Option<&'a Held>,
    asks_for: Option<&'a str>,
    life_s: i64,
}

#[derive(Clone)]
pub(crate) struct Channel(http2::SendRequest<Body>);

impl tower_service::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// As TLS libraries connect that know nothing of SPIFFE.
async fn connect(lab: &Lab, certificate: Option<&Held>) -> Result<Channel, std::io::Error> {
    let bundle = Bundle::from_jwks(domain(), &lab.pki().bundle(&[]).unwrap().jwks).unwrap();
    let mut roots = RootCertStore::empty();
    bundle.roots.iter().for_each(|root| roots.add(CertificateDer::from(root.as_slice())).unwrap());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots);
    let mut config = match certificate {
        Some(held) => config.with_client_auth_cert(held.chain.clone(), held.key.clone_key()).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    connect_by(lab, config).await
}

pub(crate) async fn connect_by(lab: &Lab, config: ClientConfig) -> Result<Channel, std::io::Error> {
    let socket = TcpStream::connect(lab.address()).await?;
    let name = ServerName::try_from(NAME).unwrap();
    let tls = TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(tls)).await.unwrap();
    tokio::spawn(connection);
    Ok(Channel(sender))
}

async fn create(lab: &Lab, call: Call<'_>) -> Result<Held, Status> {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names =
        vec![SanType::URI("spiffe://prod.example.org/ns/meshd-system/sa/pki".try_into().unwrap())];
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    create_over(lab, call, &key, csr).await
}

async fn create_over(lab: &Lab, call: Call<'_>, key: &KeyPair, csr: String) -> Result<Held, Status> {
    let channel = connect(lab, call.certificate).await.unwrap();
    let origin = format!("https://{NAME}:15012").parse().unwrap();
    let mut client = IstioCertificateServiceClient::with_origin(channel, origin);
    let metadata = call.asks_for.map(|id| {
        let id = Value { kind: Some(Kind::StringValue(id.to_owned())) };
        Struct { fields: [("ImpersonatedIdentity".to_owned(), id)].into() }
    });
    let message = IstioCertificateRequest { csr, validity_duration: call.life_s, metadata };
    let mut request = tonic::Request::new(message);
    if let Some(token) = call.token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        request.metadata_mut().insert("clusterid", "Kubernetes".parse().unwrap());
    }
    let elements = client.create_certificate(request).await?.into_inner().cert_chain;
    let (roots, chain) = elements.split_last().unwrap();
    let one = |pem: &String| {
        let mut all: Vec<_> =
            CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().expect("it is PEM");
        assert_eq!(all.len(), 1, "ztunnel reads the first certificate of these only");
        all.remove(0)
    };
    Ok(Held {
        chain: chain.iter().map(one).collect(),
        roots: CertificateDer::pem_slice_iter(roots.as_bytes()).collect::<Result<_, _>>().unwrap(),
        key: PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
        elements: elements.clone(),
    })
}

fn token(cluster: &Cluster, namespace: &str, account: &str) -> String {
    token_for(cluster, "istio-ca", namespace, account)
}

fn token_for(cluster: &Cluster, audience: &str, namespace: &str, account: &str) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    cluster.token(&json!({
        "aud": [audience], "iss": ISSUER, "iat": now, "nbf": now, "exp": now + 3600,
        "sub": format!("system:serviceaccount:{namespace}:{account}"),
        "kubernetes.io": {
            "namespace": namespace,
            "node": { "name": "worker-1", "uid": "2" },
            "pod": { "name": format!("{account}-x"), "uid": "3" },
            "serviceaccount": { "name": account, "uid": "4" },
        },
    }))
}

fn ztunnel(cluster: &Cluster) -> Option<String> {
    Some(token(cluster, "istio-system", "ztunnel"))
}

async fn lab(cluster: &Cluster, more: &str) -> Lab {
    let attestors = format!("{GRANTS}names = [\"{NAME}\"]\n{more}");
    Lab::start_with_attestors(&[("jwks.json", &cluster.jwks()), ("attestors.toml", &attestors)]).await
}

fn deny(whom: deny_whom::Whom) -> Command {
    Command::DenyAdd(DenyAdd { whom: Some(DenyWhom { whom: Some(whom) }), ..DenyAdd::default() })
}

#[tokio::test]
async fn a_ztunnel_gets_for_its_pods_what_istiod_would_give_it() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    params.subject_alt_names.push(SanType::URI("spiffe://prod.example.org/ns/shop/sa/admin".try_into().unwrap()));
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let call = Call { token: ztunnel(&cluster), asks_for: Some(PAYMENTS), life_s: 86_400, ..Call::default() };
    let held = create_over(&lab, call, &key, csr).await.unwrap();

    assert_eq!((held.id().as_str(), held.elements.len()), (PAYMENTS, 3));
    let (_, leaf) = X509Certificate::from_der(&held.chain[0]).unwrap();
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names.len(), 1, "what the request asked for is of no meaning: {names:?}");
    let files = ["leaf.pem", "ca.pem", "roots.pem"].map(|name| lab.file(name));
    files.iter().zip(&held.elements).for_each(|(file, pem)| std::fs::write(file, pem).unwrap());
    let [leaf, intermediate, roots] = files.each_ref().map(|file| file.to_str().unwrap());
    let verified = openssl(&["verify", "-CAfile", roots, "-untrusted", intermediate, leaf], b"").await;
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));

    let log = lab.audit_log();
    let by = "by kubernetes:prod istio-system/ztunnel, pod ztunnel-x, node worker-1";
    let line = log.lines().find(|line| line.contains("\"event\":\"istio_issue\"")).expect("it is in the audit log");
    assert!(line.contains(by) && line.contains(&held.serial()) && line.contains(PAYMENTS), "{line}");
    let metrics = lab.pki().metrics.encode();
    assert!(metrics.contains("requests_total{method=\"istio_create_certificate\",result=\"ok\"} 1"), "{metrics}");
    assert!(metrics.contains("certificates_issued_total 1"), "{metrics}");
    // On record: it can be named, and ends in the deny set with the certificate.
    let Reply::Done(done) = lab.command(deny(deny_whom::Whom::Serial(held.serial()))).unwrap() else { panic!() };
    assert!(done.what.contains(PAYMENTS) && done.what.contains("istio:prod:worker-1"), "{}", done.what);
}

#[tokio::test]
async fn who_may_not_is_answered_with_the_codes_of_istiod() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    let of = |namespace: &str, account: &str| Some(token(&cluster, namespace, account));
    let elsewhere = "spiffe://other.example/ns/shop/sa/payments";
    let (system, bank) =
        ("spiffe://prod.example.org/ns/meshd-system/sa/pki", "spiffe://prod.example.org/ns/bank/sa/vault");
    for (token, asks_for, expected) in [
        (None, None, "show a Kubernetes token for `istio-ca`"),
        (Some("a.b.c".to_owned()), Some(PAYMENTS), "no signed token"),
        (Some(token_for(&cluster, "meshd-pki", "shop", "payments")), None, "not for `istio-ca`"),
        (Some(token(&Cluster::rsa(), "istio-system", "ztunnel")), Some(PAYMENTS), "signature does not verify"),
        (of("shop", "web"), Some(PAYMENTS), "shop/web, pod web-x, node worker-1 asks for"),
        (of("istio-system", "other"), Some(PAYMENTS), "`trusted_node_accounts`"),
        (of("shop", "ztunnel"), Some(PAYMENTS), "`trusted_node_accounts`"),
        (ztunnel(&cluster), None, "namespace `istio-system`"),
        (ztunnel(&cluster), Some(bank), "namespace `bank`"),
        (ztunnel(&cluster), Some(system), "namespace `meshd-system`"),
        (ztunnel(&cluster), Some(elsewhere), "meshConfig.trustDomain"),
        (ztunnel(&cluster), Some("payments"), "not a SPIFFE ID"),
        (of("meshd-system", "pki"), None, "namespace `meshd-system`"),
    ] {
        let refused = create(&lab, Call { token, asks_for, ..Call::default() }).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{expected}: {refused}");
        assert!(refused.message().contains(expected), "{expected}: {refused}");
    }
    for csr in ["", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
        let call = Call { token: ztunnel(&cluster), asks_for: Some(PAYMENTS), ..Call::default() };
        let refused = create_over(&lab, call, &KeyPair::generate().unwrap(), csr.to_owned()).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    let log = lab.audit_log();
    let with = |result: &str| log.contains(&format!("\"event\":\"istio_issue\",\"result\":\"{result}\""));
    assert!(with("refused") && !with("ok"));
}

#[tokio::test]
async fn without_its_section_it_is_not_there() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    std::fs::write(lab.file("attestors.toml"), "").unwrap();
    let channel = connect(&lab, None).await.unwrap();
    lab.pass(31);
    lab.pki().read_attestors().unwrap();
    let origin = format!("https://{NAME}").parse().unwrap();
    let mut client = IstioCertificateServiceClient::with_origin(channel, origin);
    let refused = client.create_certificate(IstioCertificateRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused}");
}

#[tokio::test]
async fn the_pki_proves_itself_by_a_name_as_soon_as_it_is_in_the_file() {
    let cluster = Cluster::rsa();
    let lab = Lab::start_with_attestors(&[("jwks.json", &cluster.jwks()), ("attestors.toml", GRANTS)]).await;
    let error = connect(&lab, None).await.err().expect("nobody has said that name yet");
    assert!(error.to_string().contains("not valid for name"), "{error}");
    let text =
        format!("{}names = [\"{NAME}\", \"10.0.0.7\"]\n", GRANTS.replace("@DIR@", lab.file("").to_str().unwrap()));
    std::fs::write(lab.file("attestors.toml"), text).unwrap();
    lab.pass(31);
    lab.pki().read_attestors().unwrap();
    lab.pki().refresh().unwrap();
    connect(&lab, None).await.unwrap();
    // Hosts know it by its SPIFFE ID as before.
    lab.join("web", &[]).await.unwrap();
}

#[tokio::test]
async fn a_certificate_lives_as_asked_and_never_longer_than_others() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    for (asked, expected) in [(3600, 3600), (0, 86_400), (-1, 86_400), (i64::MAX, 86_400)] {
        let call = Call { token: ztunnel(&cluster), asks_for: Some(PAYMENTS), life_s: asked, ..Call::default() };
        let left = create(&lab, call).await.unwrap().left(&lab);
        assert!((expected - 60..=expected).contains(&left), "{asked}: {left}");
    }
}

#[tokio::test]
async fn a_new_root_is_believed_by_proxies_before_it_signs() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    let call = || Call { token: ztunnel(&cluster), asks_for: Some(PAYMENTS), ..Call::default() };
    let before = create(&lab, call()).await.unwrap();
    lab.command(Command::AuthorityPrepare(AuthorityPrepare {})).unwrap();
    let after = create(&lab, call()).await.unwrap();
    assert_eq!((before.roots.len(), after.roots.len()), (1, 2));
    assert_eq!(after.elements.len(), 3, "however many roots there are, they are in the last");
    let bundle = Bundle::from_jwks(domain(), &lab.pki().bundle(&[]).unwrap().jwks).unwrap();
    let of_bundle: BTreeSet<&[u8]> = bundle.roots.iter().map(Vec::as_slice).collect();
    assert_eq!(after.roots.iter().map(AsRef::as_ref).collect::<BTreeSet<&[u8]>>(), of_bundle);
}

#[tokio::test]
async fn a_sidecar_gets_its_own_and_renews_it_by_certificate_where_that_is_granted() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    let payments = Some(token(&cluster, "shop", "payments"));
    let held = create(&lab, Call { token: payments.clone(), ..Call::default() }).await.unwrap();
    assert_eq!(held.id(), PAYMENTS);
    let by_certificate = |asks_for| Call { certificate: Some(&held), asks_for, ..Call::default() };
    let refused = create(&lab, by_certificate(None)).await.unwrap_err();
    assert!(refused.code() == Code::Unauthenticated && refused.message().contains("renew_by_certificate"), "{refused}");

    let text = std::fs::read_to_string(lab.file("attestors.toml")).unwrap();
    std::fs::write(lab.file("attestors.toml"), format!("{text}renew_by_certificate = true\n")).unwrap();
    lab.pass(31);
    lab.pki().read_attestors().unwrap();
    let renewed = create(&lab, by_certificate(None)).await.unwrap();
    assert_eq!(renewed.id(), PAYMENTS);
    assert_eq!(create(&lab, by_certificate(Some(PAYMENTS))).await.unwrap().id(), PAYMENTS);
    for (asks_for, expected) in [
        ("spiffe://prod.example.org/ns/shop/sa/web", "for itself only"),
        ("spiffe://prod.example.org/ns/meshd-system/sa/web", "for itself only"),
    ] {
        let refused = create(&lab, by_certificate(Some(asks_for))).await.unwrap_err();
        assert!(refused.code() == Code::Unauthenticated && refused.message().contains(expected), "{refused}");
    }
    lab.command(deny(deny_whom::Whom::Serial(held.serial()))).unwrap();
    let refused = create(&lab, by_certificate(None)).await.unwrap_err();
    assert!(refused.message().contains("is denied"), "{refused}");
    create(&lab, Call { certificate: Some(&renewed), ..Call::default() }).await.unwrap();

    // Who has the key of an intermediate could make certificates of anybody.
    let authorities = meshd_pki::status::Status::read(&lab.state(), lab.now()).unwrap().authorities;
    let intermediate = authorities.into_iter().find(|one| one.kind == "intermediate").unwrap().id;
    lab.command(Command::AuthorityTaint(AuthorityTaint { id: intermediate.clone() })).unwrap();
    lab.pass(10);
    lab.command(deny(deny_whom::Whom::Authority(intermediate))).unwrap();
    lab.pki().refresh().unwrap();
    let refused = create(&lab, Call { certificate: Some(&renewed), ..Call::default() }).await.unwrap_err();
    assert!(refused.code() == Code::Unauthenticated && refused.message().contains("is denied"), "{refused}");
}

#[tokio::test]
async fn the_certificate_of_a_host_is_worth_nothing_here() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "renew_by_certificate = true\n").await;
    let host = lab.join("web", &[]).await.unwrap();
    let held = Held { chain: host.host.chain.clone(), roots: vec![], key: host.host.key.clone_key(), elements: vec![] };
    let refused = create(&lab, Call { certificate: Some(&held), ..Call::default() }).await.unwrap_err();
    assert!(refused.message().contains("namespace `meshd-system`"), "{refused}");
}

#[tokio::test]
async fn who_is_denied_gets_nothing_and_asks_for_nobody() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    let call = |id| Call { token: ztunnel(&cluster), asks_for: Some(id), ..Call::default() };
    let web = "spiffe://prod.example.org/ns/shop/sa/web";
    let denied =
        |id: &str| -> Result<Reply, AdminError> { lab.command(deny(deny_whom::Whom::Identity(id.to_owned()))) };
    denied(PAYMENTS).unwrap();
    let refused = create(&lab, call(PAYMENTS)).await.unwrap_err();
    assert!(refused.code() == Code::Unauthenticated && refused.message().contains("is denied"), "{refused}");
    create(&lab, call(web)).await.unwrap();
    denied("ns/istio-system/sa/ztunnel").unwrap();
    let refused = create(&lab, call(web)).await.unwrap_err();
    assert!(refused.message().contains("sa/ztunnel is denied"), "{refused}");
}

#[tokio::test]
async fn nothing_is_issued_while_the_clock_is_not_believed() {
    let cluster = Cluster::rsa();
    let lab = lab(&cluster, "").await;
    let in_an_hour = unix_ms(lab.now() + Duration::from_secs(3600));
    for host in ["a", "b", "c", "d", "e"] {
        let token = lab.token(host, &[]);
        let proof = v1::JoinTokenProof { id: token.id.clone(), secret: token.secret.0.to_vec() };
        let attestation = Some(Attestation::JoinToken(proof));
        let csr = request_over(&KeyPair::generate().unwrap());
        let request = v1::EnrollRequest { attestation, csr, host_time_unix_ms: in_an_hour, ..Default::default() };
        lab.pki().enrol(&request, "10.0.0.9:1").unwrap();
    }
    lab.pass(0);
    let call = Call { token: ztunnel(&cluster), asks_for: Some(PAYMENTS), ..Call::default() };
    let refused = create(&lab, call).await.unwrap_err();
    assert!(refused.code() == Code::Unavailable && refused.message().contains("issues nothing now"), "{refused}");
}
