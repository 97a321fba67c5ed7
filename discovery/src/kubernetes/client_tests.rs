use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use h2::server::SendResponse;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

/// What a server says to a path: a status, headers, the pieces of a body, and whether it ends.
enum Answer {
    Says(u16, &'static [(&'static str, &'static str)], Vec<Bytes>),
    GoesOn(Vec<Bytes>),
    Nothing,
}

type Answers = fn(&str) -> Answer;

/// Over real TLS and HTTP/2; ends with the runtime of its test.
struct Server {
    directory: TempDir,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn start(answers: Answers) -> Server {
        let key = rcgen::KeyPair::generate().unwrap();
        let names = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = names.self_signed(&key).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let private = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        let address = listener.local_addr().unwrap();
        let kubeconfig = format!(
            "current-context: it\nclusters: [{{ name: it, cluster: {{ server: 'https://{address}', \
             certificate-authority: ca.pem }} }}]\nusers: [{{ name: it, user: {{ token: abc }} }}]\n\
             contexts: [{{ name: it, context: {{ cluster: it, user: it }} }}]\n"
        );
        fs::write(directory.path().join("config"), kubeconfig).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        tokio::spawn(accept(listener, TlsAcceptor::from(Arc::new(config)), connections.clone(), answers));
        Server { directory, connections }
    }

    fn client(&self) -> Client {
        Client::new(Settings { kubeconfig: Some(self.directory.path().join("config")), context: None })
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, connections: Arc<AtomicUsize>, answers: Answers) {
    loop {
        let tcp = listener.accept().await.unwrap().0;
        connections.fetch_add(1, Ordering::Relaxed);
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(acceptor.accept(tcp).await.unwrap()).await.unwrap();
            while let Some(Ok((request, respond))) = connection.accept().await {
                assert_eq!(request.headers()["authorization"], "Bearer abc");
                tokio::spawn(answer(answers(request.uri().path()), respond));
            }
        });
    }
}

async fn answer(answer: Answer, mut respond: SendResponse<Bytes>) {
    let (status, headers, pieces, ends) = match answer {
        Answer::Says(status, headers, pieces) => (status, headers, pieces, true),
        Answer::GoesOn(pieces) => (200, &[][..], pieces, false),
        Answer::Nothing => return std::future::pending().await,
    };
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    let mut body = respond.send_response(response.body(()).unwrap(), false).unwrap();
    for piece in pieces {
        body.send_data(piece, false).unwrap();
    }
    if !ends {
        return std::future::pending().await;
    }
    body.send_data(Bytes::new(), true).unwrap();
    // Its capacity is the client's to give; what it does not take is dropped with the connection.
    std::future::poll_fn(|context| body.poll_reset(context)).await.ok();
}

fn asked() -> Asked {
    Asked { verb: "list", resource: "pods in namespace shop".to_owned() }
}

fn pieces(texts: &[&'static str]) -> Vec<Bytes> {
    texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect()
}

#[tokio::test]
async fn lines_are_told_one_by_one_however_they_are_cut() {
    let server = Server::start(|path| match path {
        "/watch" => Answer::Says(200, &[], pieces(&["on", "e\ntwo\nth", "ree", "\n\nfour\nunended"])),
        _ => Answer::GoesOn(vec![Bytes::from(vec![b'x'; 1024 * 1024]); 17]),
    });
    let server = server.await;
    let client = server.client();
    let mut lines = client.lines("/watch", &asked()).await.unwrap();
    for expected in ["one", "two", "three", "", "four"] {
        assert_eq!(lines.next().await.unwrap().unwrap(), expected);
    }
    assert!(lines.next().await.unwrap().is_none(), "what has no end was not said");
    let mut endless = client.lines("/endless", &asked()).await.unwrap();
    let error = endless.next().await.unwrap_err().to_string();
    assert!(error.contains("a line has more than") && error.contains("list of pods in namespace shop"), "{error}");
}

#[tokio::test]
async fn a_refusal_says_what_it_is_of_and_costs_no_connection() {
    let server = Server::start(|path| match path {
        "/busy" => Answer::Says(429, &[("retry-after", "7")], pieces(&[r#"{"message":"too many requests"}"#])),
        "/gone" => Answer::Says(410, &[], pieces(&[r#"{"message":"too old"}"#])),
        "/forbidden" => Answer::Says(403, &[], pieces(&[r#"{"message":"not you"}"#])),
        "/broken" => Answer::Says(500, &[], pieces(&[r#"{"message":"etcdserver: no leader"}"#])),
        "/long" => Answer::Says(500, &[], vec![Bytes::from(vec![b'x'; LARGEST_REFUSAL + 1])]),
        _ => Answer::Says(200, &[], pieces(&["well"])),
    });
    let server = server.await;
    let client = server.client();
    let refused = async |path| client.get(path, &asked()).await.unwrap_err();
    assert!(matches!(refused("/busy").await, Error::Busy { after: Some(after), .. } if after.as_secs() == 7));
    assert!(matches!(refused("/gone").await, Error::Expired));
    assert!(matches!(refused("/forbidden").await, Error::Forbidden { .. }));
    assert!(matches!(refused("/long").await, Error::Garbled(_)));
    let error = refused("/broken").await.to_string();
    assert_eq!(error, "the API server refused a list of pods in namespace shop (status 500): etcdserver: no leader");
    assert_eq!(client.get("/well", &asked()).await.unwrap(), "well");
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_named_and_asked_by_another_connection() {
    let server = Server::start(|path| match path {
        "/silent" => Answer::Nothing,
        _ => Answer::Says(200, &[], pieces(&["well"])),
    });
    let server = server.await;
    let client = server.client();
    client.get("/well", &asked()).await.unwrap();
    tokio::time::pause();
    let error = client.get("/silent", &asked()).await.unwrap_err();
    tokio::time::resume();
    assert!(matches!(error, Error::Deadline(_)), "{error}");
    let said = error.to_string();
    assert!(said.contains("https://127.0.0.1:") && said.contains("did not answer within 4 s"), "{said}");
    assert_eq!(client.get("/well", &asked()).await.unwrap(), "well");
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn those_who_leave_a_connection_meet_at_another_one() {
    let server = Server::start(|_| Answer::Says(200, &[], pieces(&["well"]))).await;
    let mut clients = vec![server.client(); 3];
    for client in &clients {
        client.get("/", &asked()).await.unwrap();
    }
    assert_eq!(server.connections(), 1);
    for client in &mut clients[..2] {
        client.leave();
        client.get("/", &asked()).await.unwrap();
    }
    clients[2].get("/", &asked()).await.unwrap();
    assert_eq!(server.connections(), 2, "and who has no trouble stays");
}

#[tokio::test]
async fn each_connection_that_carries_watches_is_asked_and_none_carries_more_than_a_server_takes() {
    let server = Server::start(|path| match path {
        "/watch" => Answer::GoesOn(pieces(&["begun\n"])),
        _ => Answer::Says(200, &[], pieces(&["well"])),
    });
    let server = server.await;
    let client = server.client();
    assert_eq!(client.callers().await.unwrap().len(), 1, "that of calls");
    let mut watches = Vec::new();
    for _ in 0..=MOST_STREAMS {
        let mut watch = client.lines("/watch", &asked()).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap(), "begun");
        watches.push(watch);
    }
    assert_eq!(server.connections(), 3);
    let callers = client.callers().await.unwrap();
    assert_eq!(callers.len(), 2);
    for caller in &callers {
        assert_eq!(caller.get("/well", &asked()).await.unwrap(), "well");
    }
    // One that ends makes room.
    watches.pop();
    watches.push(client.lines("/watch", &asked()).await.unwrap());
    assert_eq!(server.connections(), 3);
}

/// Nobody reads them: the host is busy with something else.
#[tokio::test]
async fn watches_that_are_not_read_do_not_keep_a_probe_from_its_answer() {
    let server = Server::start(|path| match path {
        "/watch" => Answer::GoesOn(vec![Bytes::from(vec![b'\n'; 1024 * 1024]); 2]),
        _ => Answer::Says(200, &[], pieces(&["well"])),
    });
    let server = server.await;
    let client = server.client();
    let mut watches = Vec::new();
    for _ in 0..40 {
        watches.push(client.lines("/watch", &asked()).await.unwrap());
    }
    for caller in client.callers().await.unwrap() {
        assert_eq!(caller.get("/well", &asked()).await.unwrap(), "well");
    }
}
