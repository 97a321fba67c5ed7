//! Two PKIs that follow each other, and endpoints that misbehave.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use meshd_identity::{Bundle, TrustDomain};
use meshd_pki::federation::commands::{Asked, Endpoint, FederationError, FederationStatus, add, list, refresh, remove};
use meshd_pki::federation::web::{WebCertificate, serve_web};
use meshd_pki::lifetimes::Lifetimes;
use meshd_pki::status::Status;
use meshd_pki_api::v1;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::support::{Lab, eventually, request_over, workload};

fn other() -> TrustDomain {
    "other.example".parse().unwrap()
}

/// An authority of the web, and what it gave `localhost`.
struct Web {
    authority: String,
    chain: String,
    key: String,
}

impl Web {
    fn new() -> Web {
        let (authority_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = params.self_signed(&authority_key).unwrap().pem();
        let issuer = Issuer::new(params, authority_key);
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut leaf = CertificateParams::new(names).unwrap();
        leaf.use_authority_key_identifier_extension = true;
        let chain = leaf.signed_by(&key, &issuer).unwrap().pem();
        Web { authority, chain, key: key.serialize_pem() }
    }

    fn serial(&self) -> String {
        let leaf = CertificateDer::from_pem_slice(self.chain.as_bytes()).unwrap();
        let (_, parsed) = X509Certificate::from_der(&leaf).unwrap();
        data_encoding::HEXLOWER.encode(parsed.raw_serial())
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::Web { authorities: Some(self.authority.clone()) }
    }

    fn server(&self) -> Arc<ServerConfig> {
        let chain = CertificateDer::pem_slice_iter(self.chain.as_bytes()).map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        Arc::new(ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap())
    }
}

fn follow(lab: &Lab, domain: &TrustDomain, url: &str, endpoint: Endpoint, bundle: Option<Vec<u8>>) {
    let identities = [workload("payments").short().to_owned()];
    let asked = Asked { trust_domain: domain.clone(), url, endpoint, identities: &identities, bundle };
    add(&lab.state(), &asked, SystemTime::now()).unwrap();
}

fn state_of(lab: &Lab, domain: &TrustDomain) -> FederationStatus {
    let all = list(&lab.state()).unwrap();
    all.into_iter().find(|one| one.trust_domain == domain.as_str()).expect("it is federated")
}

fn spiffe_url(lab: &Lab) -> String {
    format!("https://{}/.well-known/spiffe-bundle", lab.address())
}

fn endpoint_of(lab: &Lab) -> Endpoint {
    Endpoint::Spiffe { spiffe_id: format!("spiffe://{}/ns/meshd-system/sa/pki", lab.pki().trust_domain) }
}

fn bundle_of(lab: &Lab) -> Vec<u8> {
    lab.pki().bundle(&[]).unwrap().jwks
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pkis_follow_each_other_through_a_root_rotation() {
    // The first root is due for rotation within seconds, and everything it waits for is short.
    let second = Duration::from_secs;
    let rotating = Lifetimes {
        first_root: second(4),
        intermediate_every: second(3),
        leaf: second(2),
        skew: second(1),
        refresh_hint: second(1),
        ..Lifetimes::default()
    };
    let ours = Lab::start_with(rotating).await;
    let theirs = Lab::start_of(other(), Lifetimes::default()).await;
    let domain = ours.pki().trust_domain.clone();
    let first = Bundle::from_jwks(domain.clone(), &bundle_of(&ours)).unwrap();

    // They know us by our SPIFFE ID, we know them by a name of the web.
    let identities = ["*".to_owned()];
    let url = spiffe_url(&ours);
    let endpoint = endpoint_of(&ours);
    let asked = Asked { trust_domain: domain.clone(), url: &url, endpoint, identities: &identities, bundle: None };
    let unverifiable = add(&theirs.state(), &asked, SystemTime::now()).unwrap_err();
    assert!(matches!(unverifiable, FederationError::NoBundle(_)), "{unverifiable}");
    let asked = Asked { bundle: Some(bundle_of(&ours)), ..asked };
    add(&theirs.state(), &asked, SystemTime::now()).unwrap();
    let web = Web::new();
    let files = tempfile::tempdir().unwrap();
    let (chain, key) = (files.path().join("chain.pem"), files.path().join("key.pem"));
    std::fs::write(&chain, &web.chain).unwrap();
    std::fs::write(&key, &web.key).unwrap();
    let certificate = Arc::new(WebCertificate::load(chain.clone(), key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}/.well-known/spiffe-bundle", listener.local_addr().unwrap().port());
    let served = tokio::spawn(serve_web(theirs.shared(), listener, certificate.clone()));
    follow(&ours, &other(), &url, web.endpoint(), None);
    let held = |lab: &Lab, of: &Lab| {
        let sequence = of.pki().bundle(&[]).unwrap().sequence;
        state_of(lab, &of.pki().trust_domain).sequence == Some(sequence)
    };
    eventually("we hold their bundle", || held(&ours, &theirs)).await;
    eventually("they hold our bundle", || held(&theirs, &ours)).await;
    assert_eq!((state_of(&theirs, &domain).roots, state_of(&ours, &other()).roots), (1, 1));

    // A host is given it where its identity has to do with that domain, apart from its own.
    let payments = workload("payments");
    let host = ours.join("web", &[&payments]).await.unwrap();
    let item = v1::IssueItem { spiffe_id: payments.to_string(), csr: request_over(&KeyPair::generate().unwrap()) };
    let request = v1::IssueBatchRequest { items: vec![item], ..v1::IssueBatchRequest::default() };
    let reply = ours.pki().issue_batch(Some(&host.host.chain[0]), &request, "test").unwrap();
    let federation = reply.federation.unwrap();
    let request =
        v1::IssueBatchRequest { federation_revision: federation.revision, ..v1::IssueBatchRequest::default() };
    let again = ours.pki().issue_batch(Some(&host.host.chain[0]), &request, "test").unwrap();
    assert_eq!(again.federation, None, "a host is told nothing twice");
    let [only] = &federation.bundles[..] else { panic!("{:?}", federation.bundles) };
    assert_eq!(only.spiffe_ids, [payments.to_string()]);
    assert_eq!(only.bundle.as_ref().unwrap().jwks, bundle_of(&theirs));
    let own = Bundle::from_jwks(domain.clone(), &reply.bundle.unwrap().jwks).unwrap();
    let foreign = Bundle::from_jwks(other(), &bundle_of(&theirs)).unwrap();
    assert!(!own.roots.contains(&foreign.roots[0]), "bundles are never merged");

    // Our root rotates. They take over the new one before it signs, and go on verifying us by it.
    let tick = |lab: &Lab| {
        lab.pki().maintain().unwrap();
        lab.pki().refresh().unwrap();
    };
    let roots = || Bundle::from_jwks(domain.clone(), &bundle_of(&ours)).unwrap().roots.len();
    eventually("our new root is published", || {
        tick(&ours);
        roots() == 2
    })
    .await;
    refresh(&theirs.state(), &domain, theirs.now()).unwrap();
    eventually("they hold both of our roots", || state_of(&theirs, &domain).roots == 2).await;
    let active = || {
        let status = Status::read(&ours.state(), SystemTime::now()).unwrap();
        let by = status.authorities.iter().find(|one| one.kind == "intermediate" && one.state == "active").unwrap();
        let first = status.authorities.iter().find(|one| one.kind == "root").unwrap();
        by.parent.as_ref() != Some(&first.id)
    };
    eventually("our new root signs", || {
        tick(&ours);
        active()
    })
    .await;
    let asked_at = state_of(&theirs, &domain).last_good;
    eventually("they ask a server that the new root vouches for", || {
        refresh(&theirs.state(), &domain, theirs.now()).unwrap();
        state_of(&theirs, &domain).last_good > asked_at
    })
    .await;
    let after = state_of(&theirs, &domain);
    assert_eq!(after.problem, None);
    assert!(after.sequence > Some(first.sequence));

    // The certificate of the web endpoint is the operator's: replaced in place, and shown.
    let renewed = Web::new();
    std::fs::write(&chain, &renewed.chain).unwrap();
    let now = ours.now();
    for _ in 0..2 {
        assert!(certificate.reload(now).unwrap_err().contains("do not go together"), "as long as it lasts");
    }
    std::fs::write(files.path().join("key.pem"), &renewed.key).unwrap();
    // It ends in 4096.
    let late = now + Duration::from_secs(2200 * 365 * 86_400);
    assert!(certificate.reload(late).unwrap_err().contains("ended at"), "the last good one stays");
    assert!(certificate.reload(now).unwrap());
    let before = state_of(&ours, &other());
    refresh(&ours.state(), &other(), ours.now()).unwrap();
    eventually("the old authority is not enough any more", || state_of(&ours, &other()).problem.is_some()).await;
    let kept = state_of(&ours, &other());
    assert_eq!((kept.sequence, kept.roots), (before.sequence, before.roots), "the last good bundle stays");
    follow(&ours, &other(), &url, renewed.endpoint(), None);
    eventually("with the new one it is followed again", || state_of(&ours, &other()).problem.is_none()).await;
    theirs.pass(60);
    let status = Status::read(&theirs.state(), theirs.now()).unwrap();
    let shown: Vec<&str> =
        status.certificates.iter().filter(|one| one.kind == "https_web").map(|one| one.id.as_str()).collect();
    assert_eq!(shown, [renewed.serial()], "the web certificate in status is the renewed one");

    remove(&ours.state(), &other(), SystemTime::now()).unwrap();
    let reply = ours.pki().issue_batch(Some(&host.host.chain[0]), &v1::IssueBatchRequest::default(), "test");
    // The host's certificate lives for two seconds here; either way nothing foreign is handed out.
    assert!(reply.is_err() || reply.unwrap().federation.is_none_or(|told| told.bundles.is_empty()));
    assert!(ours.audit_log().contains("federation_remove"));
    served.abort();
}

/// From the path asked for to the whole response.
type Answer = Box<dyn Fn(&str) -> String + Send>;

/// An HTTPS server that answers as the test says.
struct Fake {
    web: Web,
    address: SocketAddr,
    answer: Arc<Mutex<Answer>>,
}

impl Fake {
    async fn start() -> Fake {
        let web = Web::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer: Arc<Mutex<Answer>> = Arc::new(Mutex::new(Box::new(|_| String::new())));
        let (acceptor, answers) = (TlsAcceptor::from(web.server()), answer.clone());
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let Ok(mut tls) = acceptor.accept(socket).await else { continue };
                let mut request = vec![0; 4096];
                let length = tls.read(&mut request).await.unwrap_or_default();
                let text = String::from_utf8_lossy(&request[..length]).into_owned();
                let path = text.split(' ').nth(1).unwrap_or_default();
                let answer = (answers.lock().unwrap())(path);
                // Whoever has heard enough hangs up.
                _ = tls.write_all(answer.as_bytes()).await;
                _ = tls.shutdown().await;
            }
        });
        Fake { web, address, answer }
    }

    fn answers(&self, answer: impl Fn(&str) -> String + Send + 'static) {
        *self.answer.lock().unwrap() = Box::new(answer);
    }

    fn url(&self) -> String {
        format!("https://{}/bundle", self.address)
    }

    /// What `lab` says of it after asking once more.
    async fn asked_by(&self, lab: &Lab) -> FederationStatus {
        refresh(&lab.state(), &other(), lab.now()).unwrap();
        let pending = "1970-01-01T00:00:00Z";
        eventually("the endpoint was asked", || state_of(lab, &other()).next != pending).await;
        state_of(lab, &other())
    }
}

fn document(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn redirect(status: &str, to: &str) -> String {
    format!("HTTP/1.1 {status}\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n")
}

fn bundle(sequence: u64) -> String {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
    String::from_utf8(Bundle::new(other(), sequence, 600, vec![root]).unwrap().to_jwks()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_an_endpoint_answers_the_last_good_bundle_stays() {
    let lab = Lab::start().await;
    let fake = Fake::start().await;
    let good = bundle(7);
    let first = good.clone();
    fake.answers(move |_| document(&first));
    follow(&lab, &other(), &fake.url(), fake.web.endpoint(), None);
    let held = fake.asked_by(&lab).await;
    assert_eq!((held.sequence, held.problem.as_deref()), (Some(7), None));

    let (older, huge) = (bundle(6), format!("{{\"keys\":[],\"x\":\"{}\"}}", "x".repeat(300 * 1024)));
    let address = fake.address;
    type Case = (&'static str, Answer);
    let cases: Vec<Case> = vec![
        ("went back from 7 to 6", Box::new(move |_| document(&older))),
        ("under the same sequence 7", Box::new(|_| document(&bundle(7)))),
        ("length limit", Box::new(move |_| document(&huge))),
        ("has no root", Box::new(|_| document("{\"keys\":[],\"spiffe_sequence\":9}"))),
        ("not a JWKS document", Box::new(|_| document("<html>"))),
        ("500", Box::new(|_| "HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n".to_owned())),
        ("for good (301", Box::new(|_| redirect("301 Moved", "/elsewhere"))),
        ("for good (308", Box::new(|_| redirect("308 Moved", "/elsewhere"))),
        ("not an https URL", Box::new(|_| redirect("302 Found", "http://127.0.0.1/"))),
        ("more than 3 times", Box::new(move |_| redirect("302 Found", &format!("https://{address}/again")))),
        ("HTTP", Box::new(|_| String::new())),
    ];
    for (expected, answer) in cases {
        fake.answers(answer);
        let after = fake.asked_by(&lab).await;
        let problem = after.problem.unwrap_or_else(|| panic!("{expected}: it was taken"));
        assert!(problem.contains(expected), "{expected}: {problem}");
        assert_eq!(after.sequence, Some(7));
    }

    let newer = bundle(8);
    fake.answers(move |path| match path {
        "/bundle" => redirect("307 Temporary Redirect", &format!("https://{address}/today")),
        _ => document(&newer),
    });
    let after = fake.asked_by(&lab).await;
    assert_eq!((after.sequence, after.problem), (Some(8), None), "a temporary redirect is followed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_with_another_identity_is_refused_and_that_is_told() {
    let lab = Lab::start().await;
    let theirs = Lab::start_of(other(), Lifetimes::default()).await;
    let wrong = Endpoint::Spiffe { spiffe_id: "spiffe://other.example/spire/server".to_owned() };
    follow(&lab, &other(), &spiffe_url(&theirs), wrong, Some(bundle_of(&theirs)));
    eventually("it was asked", || state_of(&lab, &other()).problem.is_some()).await;
    let told = state_of(&lab, &other());
    assert!(told.problem.as_ref().unwrap().contains("NotValidForName"), "{told:?}");
    let impostor = Lab::start_of(other(), Lifetimes::default()).await;
    follow(&lab, &other(), &spiffe_url(&impostor), endpoint_of(&impostor), None);
    eventually("the impostor was asked", || {
        state_of(&lab, &other()).problem.is_some_and(|problem| problem.contains("UnknownIssuer"))
    })
    .await;
    assert_eq!(state_of(&lab, &other()).sequence, Some(theirs.pki().bundle(&[]).unwrap().sequence));
    let later = SystemTime::now() + Duration::from_secs(3600);
    let status = Status::read(&lab.state(), later).unwrap();
    assert!(status.problems.iter().any(|problem| problem.contains("other.example")), "{:?}", status.problems);
}
