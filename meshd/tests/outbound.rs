//! The way out: who is dialled, whom a dial believes, which connections are shared, which candidate is next.

mod common;

use std::net::{SocketAddr, TcpListener as StdListener};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use common::application::{Application, Connection, end_of, reset_by, reset_of};
use common::far_side::{FarSide, Reaction, react};
use common::host::{Host, Plan, Tally, endpoint};
use common::{domain, identity, until, within};
use meshd::fault::Fault;
use meshd::lifecycle::Stage;
use meshd::telemetry::Direction::{Inbound, Outbound};
use meshd::telemetry::{AccessLog, Telemetry, Tls};
use meshd::transport::dial::{Dialer, Opened, OwnAddresses, PoolKey};
use meshd::transport::pool::{Pool, Slot};
use meshd::transport::tls::TlsState;
use meshd::transport::wire::{STREAMS, WireVersion};
use meshd_discovery::{Endpoint, Transport};
use meshd_identity::server_name;
use meshd_pki_client::fake::FakeCa;
use meshd_sys::sockets::Mark;
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, LocalSet};
use tokio_rustls::server::TlsStream;

/// How long a dial waits for a peer that never answers.
const SHORT: Duration = Duration::from_millis(200);
/// Long for a peer that answers.
const LONG: Duration = Duration::from_secs(10);
/// The far side must be left within this.
const LEFT_WITHIN: Duration = Duration::from_secs(3);

/// The workload `web` on its way out, without the pipeline around it.
struct Web {
    authority: FakeCa,
    tls: TlsState,
    dialer: Dialer,
}

impl Web {
    fn new(connect_timeout: Duration) -> Web {
        let authority = FakeCa::new(domain());
        let tls = TlsState::build(&authority.credentials("near", &[identity("web")]), None, 0).unwrap();
        let telemetry = Telemetry::new(1, AccessLog::off());
        Web {
            authority,
            tls,
            dialer: Dialer { mark: Mark(0), connect_timeout, telemetry, own: OwnAddresses::default() },
        }
    }

    async fn dial(&self, address: SocketAddr, version: WireVersion) -> Result<Opened, Fault> {
        let key = PoolKey { version, ..self.key(address) };
        within("a dial to end", self.dialer.mesh(&self.tls, &key)).await
    }

    /// What a far side that never answers gets to see of a dial.
    async fn dialling(&self, far: &FarSide, version: WireVersion) -> TlsStream<TcpStream> {
        tokio::select! {
            accepted = far.tls() => accepted.unwrap(),
            _ = self.dial(far.address(), version) => panic!("the dial ended before its handshake"),
        }
    }

    /// Why a dial to the identity `payments` fails.
    async fn refused(&self, address: SocketAddr) -> Fault {
        let fault = self.dial(address, WireVersion::Meshd1).await.err().expect("no connection");
        assert_eq!(self.dialer.telemetry.handshakes.dial_failed.load(Ordering::Relaxed), 1);
        fault
    }

    /// Why a dial fails when the far side shows this.
    async fn refuses(&self, far: FarSide) -> Fault {
        let address = far.address();
        tokio::spawn(async move { far.tls().await });
        self.refused(address).await
    }

    fn key(&self, address: SocketAddr) -> PoolKey {
        let (source, expected) = (identity("web"), identity("payments"));
        PoolKey { source, expected, address, version: WireVersion::Meshd1 }
    }

    /// A host of the same mesh that serves payments.shop:80.
    fn far(&self, application: SocketAddr) -> Host {
        Plan::new().workload("payments", &[("payments.shop", 80, application)]).start(&self.authority)
    }
}

fn handshakes(host: &Host) -> u64 {
    host.telemetry().handshakes.accepted.load(Ordering::Relaxed)
}

#[tokio::test]
async fn the_name_a_dial_sends_is_that_of_the_identity_it_wants() {
    let web = Web::new(LONG);
    let far = FarSide::new(&web.authority.svid(&identity("payments")), &[b"meshd/1", b"h2"]).await;
    let accepted = web.dialling(&far, WireVersion::Meshd1).await;
    let session = accepted.get_ref().1;
    assert_eq!(session.server_name(), Some(server_name(&identity("payments")).as_str()));
    assert_eq!(session.alpn_protocol(), Some(&b"meshd/1"[..]));
}

#[tokio::test]
async fn a_dial_to_a_plain_hbone_peer_sends_no_name() {
    let web = Web::new(LONG);
    let far = FarSide::new(&web.authority.svid(&identity("payments")), &[b"meshd/1", b"h2"]).await;
    let accepted = web.dialling(&far, WireVersion::Hbone).await;
    let session = accepted.get_ref().1;
    assert_eq!(session.server_name(), None);
    assert_eq!(session.alpn_protocol(), Some(&b"h2"[..]));
}

#[tokio::test]
async fn a_peer_of_another_identity_is_not_believed() {
    let web = Web::new(LONG);
    let far = FarSide::new(&web.authority.svid(&identity("orders")), &[b"meshd/1"]).await;
    assert_eq!(web.refuses(far).await, Fault::IdentityMismatch);
}

#[tokio::test]
async fn a_peer_whose_certificate_has_ended_is_not_believed() {
    let web = Web::new(LONG);
    let far = FarSide::new(&web.authority.expired_svid(&identity("payments")), &[b"meshd/1"]).await;
    assert_eq!(web.refuses(far).await, Fault::CertExpired);
}

#[tokio::test]
async fn a_peer_of_another_authority_is_not_believed() {
    let web = Web::new(LONG);
    let far = FarSide::new(&FakeCa::new(domain()).svid(&identity("payments")), &[b"meshd/1"]).await;
    assert_eq!(web.refuses(far).await, Fault::TlsHandshake);
}

#[tokio::test]
async fn a_peer_that_agrees_to_no_version_is_not_spoken_to() {
    for alpn in [&[][..], &[&b"h2"[..]]] {
        let web = Web::new(LONG);
        let far = FarSide::new(&web.authority.svid(&identity("payments")), alpn).await;
        assert_eq!(web.refuses(far).await, Fault::TlsHandshake, "{alpn:?}");
    }
}

#[tokio::test]
async fn a_host_that_does_not_believe_us_is_a_failed_handshake_and_no_broken_stream() {
    let web = Web::new(LONG);
    let mut credentials = web.authority.credentials("far", &[identity("payments")]);
    credentials.bundle = FakeCa::new(domain()).bundle();
    let far = Plan::new().workload("payments", &[]).start_with(&credentials);
    assert_eq!(web.refused(far.mesh).await, Fault::TlsHandshake);
}

#[tokio::test]
async fn with_an_ended_certificate_of_our_own_nobody_is_dialled() {
    let mut web = Web::new(LONG);
    let mut credentials = web.authority.credentials("near", &[identity("web")]);
    credentials.workloads.insert(identity("web"), web.authority.expired_svid(&identity("web")));
    web.tls = TlsState::build(&credentials, None, 0).unwrap();
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    assert_eq!(web.refused(listener.local_addr().unwrap()).await, Fault::CertExpired);
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn a_peer_that_does_not_listen_is_refused_at_once() {
    let (_closed, address) = Application::closed();
    assert_eq!(Web::new(LONG).refused(address).await, Fault::ConnectRefused);
}

#[tokio::test]
async fn a_peer_that_takes_no_connection_is_left() {
    let web = Web::new(SHORT);
    let full = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    // The queue holds one connection; the next is not answered until somebody takes this one.
    let _first = TcpStream::connect(address).await.unwrap();
    let started = Instant::now();
    assert_eq!(web.refused(address).await, Fault::ConnectTimeout);
    assert!(started.elapsed() < LEFT_WITHIN);
}

#[tokio::test]
async fn a_peer_that_never_answers_the_handshake_is_left() {
    let web = Web::new(SHORT);
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let started = Instant::now();
    assert_eq!(web.refused(silent.local_addr().unwrap()).await, Fault::ConnectTimeout);
    assert!(started.elapsed() < LEFT_WITHIN);
}

#[tokio::test]
async fn a_peer_that_falls_silent_after_the_handshake_is_left() {
    let web = Web::new(Duration::from_secs(1));
    let far = FarSide::new(&web.authority.svid(&identity("payments")), &[b"meshd/1"]).await;
    let started = Instant::now();
    let (fault, accepted) = tokio::join!(web.refused(far.address()), far.tls());
    assert!(accepted.is_ok());
    assert_eq!(fault, Fault::ConnectTimeout);
    assert!(started.elapsed() < LEFT_WITHIN);
}

#[tokio::test]
async fn a_peer_that_lets_go_of_a_fresh_connection_is_dialled_once_more() {
    let web = Web::new(LONG);
    let far = FarSide::new(&web.authority.svid(&identity("payments")), &[b"meshd/1"]).await;
    let address = far.address();
    tokio::spawn(async move {
        far.leave().await;
        let mut stays = far.connection().await;
        while stays.accept().await.is_some() {}
    });
    assert!(web.dial(address, WireVersion::Meshd1).await.is_ok());
}

#[tokio::test]
async fn a_peer_that_lets_go_of_every_connection_is_leaving() {
    let web = Web::new(LONG);
    let far = FarSide::new(&web.authority.svid(&identity("payments")), &[b"meshd/1"]).await;
    let address = far.address();
    tokio::spawn(async move {
        far.leave().await;
        far.leave().await;
    });
    assert_eq!(web.refused(address).await, Fault::Drain);
}

/// A pool's connections are driven by tasks of its own thread.
async fn on_a_worker(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn streams_share_a_connection_until_it_is_full() {
    on_a_worker(async {
        let (web, pool) = (Web::new(LONG), Pool::default());
        let far = web.far(Application::echo().await);
        let key = web.key(far.mesh);
        let mut slots = Vec::new();
        for _ in 0..STREAMS {
            slots.push(pool.checkout(&web.dialer, &web.tls, &key).await.unwrap());
        }
        assert_eq!(pool.size(), (1, STREAMS));
        slots.push(pool.checkout(&web.dialer, &web.tls, &key).await.unwrap());
        assert_eq!(pool.size(), (2, STREAMS + 1));
        assert_eq!(handshakes(&far), 2);
        slots.clear();
        slots.push(pool.checkout(&web.dialer, &web.tls, &key).await.unwrap());
        assert_eq!(pool.size(), (2, 1));
    })
    .await;
}

#[tokio::test]
async fn streams_of_two_workloads_never_share_a_connection() {
    on_a_worker(async {
        let (mut web, pool) = (Web::new(LONG), Pool::default());
        let credentials = web.authority.credentials("near", &[identity("web"), identity("batch")]);
        web.tls = TlsState::build(&credentials, None, 0).unwrap();
        let far = web.far(Application::echo().await);
        let key = web.key(far.mesh);
        let _web = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        let key = PoolKey { source: identity("batch"), ..key };
        let _batch = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        assert_eq!(pool.size(), (2, 2));
    })
    .await;
}

#[tokio::test]
async fn many_who_ask_at_once_share_one_dial() {
    on_a_worker(async {
        let web = Web::new(LONG);
        let far = web.far(Application::echo().await);
        let slots = checkout_at_once(web, far.mesh, 20).await;
        assert!(slots.iter().all(Result::is_ok));
        assert_eq!(handshakes(&far), 1);
    })
    .await;
}

#[tokio::test]
async fn many_who_ask_at_once_share_one_failure() {
    on_a_worker(async {
        let web = Web::new(SHORT);
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let telemetry = web.dialer.telemetry.clone();
        let slots = checkout_at_once(web, silent.local_addr().unwrap(), 20).await;
        assert!(slots.into_iter().all(|slot| slot.err() == Some(Fault::ConnectTimeout)));
        assert_eq!(telemetry.handshakes.dial_failed.load(Ordering::Relaxed), 1);
    })
    .await;
}

/// How `count` callers fare that all ask before the first is answered.
async fn checkout_at_once(web: Web, address: SocketAddr, count: usize) -> Vec<Result<Slot, Fault>> {
    let (web, pool) = (Rc::new(web), Rc::new(Pool::default()));
    let mut asking = JoinSet::new();
    for _ in 0..count {
        let (web, pool) = (web.clone(), pool.clone());
        asking.spawn_local(async move { pool.checkout(&web.dialer, &web.tls, &web.key(address)).await });
    }
    within("every caller to get an answer", asking.join_all()).await
}

#[tokio::test]
async fn a_retired_connection_takes_no_more_streams() {
    on_a_worker(async {
        let (web, pool) = (Web::new(LONG), Pool::default());
        let far = web.far(Application::echo().await);
        let key = web.key(far.mesh);
        let old = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        old.retire();
        let _new = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        assert_eq!(handshakes(&far), 2);
        pool.sweep(&web.tls, Instant::now());
        assert_eq!(pool.size(), (2, 2), "a stream is still on the old one");
        drop(old);
        pool.sweep(&web.tls, Instant::now());
        assert_eq!(pool.size(), (1, 1));
    })
    .await;
}

#[tokio::test]
async fn a_connection_of_an_earlier_certificate_takes_no_more_streams() {
    on_a_worker(async {
        let (mut web, pool) = (Web::new(LONG), Pool::default());
        let far = web.far(Application::echo().await);
        let key = web.key(far.mesh);
        drop(pool.checkout(&web.dialer, &web.tls, &key).await.unwrap());
        web.tls = TlsState::build(&web.authority.credentials("near", &[identity("web")]), None, 1).unwrap();
        let _new = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        assert_eq!(handshakes(&far), 2);
    })
    .await;
}

#[tokio::test]
async fn a_connection_takes_no_more_streams_once_a_certificate_has_ended() {
    on_a_worker(async {
        let (mut web, pool) = (Web::new(LONG), Pool::default());
        let far = web.far(Application::echo().await);
        let now = SystemTime::now();
        let ending = web.authority.svid_between(&identity("web"), now - LONG, now + Duration::from_secs(4));
        let mut credentials = web.authority.credentials("near", &[]);
        credentials.workloads.insert(identity("web"), ending.clone());
        web.tls = TlsState::build(&credentials, None, 0).unwrap();
        let key = web.key(far.mesh);
        let _open = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        until("the certificate to end", || SystemTime::now() > ending.not_after).await;
        assert_eq!(pool.checkout(&web.dialer, &web.tls, &key).await.err(), Some(Fault::CertExpired));
        assert_eq!(handshakes(&far), 1);
    })
    .await;
}

#[tokio::test]
async fn a_suspected_connection_takes_no_more_streams() {
    on_a_worker(async {
        let (web, pool) = (Web::new(LONG), Pool::default());
        let far = web.far(Application::echo().await);
        let key = web.key(far.mesh);
        let silent = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        silent.suspect(Instant::now());
        let _other = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        assert_eq!(handshakes(&far), 2);
    })
    .await;
}

#[tokio::test]
async fn a_connection_the_peer_has_ended_is_not_used_again() {
    on_a_worker(async {
        let (web, pool) = (Web::new(LONG), Pool::default());
        let far = web.far(Application::echo().await);
        let key = web.key(far.mesh);
        let old = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        far.rotate(&web.authority.credentials("far", &[identity("payments")]));
        until("the connection to end", || old.ended()).await;
        let _new = pool.checkout(&web.dialer, &web.tls, &key).await.unwrap();
        assert_eq!(handshakes(&far), 2);
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_is_let_go_of_after_its_time() {
    on_a_worker(async {
        let (web, pool) = (Web::new(LONG), Pool::default());
        let far = web.far(Application::echo().await);
        drop(pool.checkout(&web.dialer, &web.tls, &web.key(far.mesh)).await.unwrap());
        let now = Instant::now();
        pool.sweep(&web.tls, now + Duration::from_secs(290));
        assert_eq!(pool.size(), (1, 0));
        pool.sweep(&web.tls, now + Duration::from_secs(310));
        assert_eq!(pool.size(), (0, 0));
    })
    .await;
}

/// Whoever runs this test, enrolled as `web`, and payments.shop somewhere else.
struct Mesh {
    authority: FakeCa,
    near: Host,
}

impl Mesh {
    fn new() -> Mesh {
        Mesh::planned(Plan::new())
    }

    fn planned(near: Plan) -> Mesh {
        let authority = FakeCa::new(domain());
        let near = near.caller("web").start(&authority);
        Mesh { authority, near }
    }

    /// A host that serves payments.shop as `payments`, and its endpoint.
    fn far(&self, application: SocketAddr) -> (Host, Endpoint) {
        let serves = [("payments.shop", self.near.captured.port(), application)];
        let plan = Plan::new().workload("payments", &serves).default_identity("payments");
        let host = plan.start(&self.authority);
        let endpoint = endpoint("payments.shop", "payments", host.mesh, application);
        (host, endpoint)
    }

    /// How a connection to payments.shop fails that must fail.
    async fn fault(&self, endpoints: Vec<Endpoint>) -> Fault {
        reset_by(self.near.announce(endpoints)).await;
        let tally = self.near.settled(Outbound, 1).await;
        let (fault, _) = tally.faults.first_key_value().unwrap();
        assert_eq!(self.near.refused(Outbound, *fault), 1);
        *fault
    }
}

/// A question and its echo, ended by the caller.
async fn talk(address: SocketAddr) {
    let mut caller = Connection::open(address).await;
    caller.say(b"question").await;
    assert_eq!(caller.hear(8).await, b"question");
    caller.finish().await;
    end_of(&mut caller).await;
}

#[tokio::test]
async fn an_enrolled_program_reaches_a_service_by_its_virtual_address() {
    let mesh = Mesh::new();
    let (far, endpoint) = mesh.far(Application::echo().await);
    talk(mesh.near.announce(vec![endpoint])).await;
    let (sent, got) = (mesh.near.settled(Outbound, 1).await, far.settled(Inbound, 1).await);
    assert_eq!((sent.ok, sent.up_bytes, sent.down_bytes), (1, 8, 8));
    assert_eq!(sent, got);
    let rows = far.telemetry().edges.rows();
    let (edge, _) = rows.first_key_value().unwrap();
    assert_eq!((&edge.peer, &edge.own), (&Some(identity("web")), &Some(identity("payments"))));
    let rows = mesh.near.telemetry().edges.rows();
    let (edge, _) = rows.first_key_value().unwrap();
    assert_eq!((&edge.peer, &edge.own), (&Some(identity("payments")), &Some(identity("web"))));
}

#[tokio::test]
async fn connections_of_a_program_share_the_connection_to_its_peer() {
    let mesh = Mesh::new();
    let (far, endpoint) = mesh.far(Application::echo().await);
    let address = mesh.near.announce(vec![endpoint]);
    for _ in 0..5 {
        talk(address).await;
    }
    assert_eq!(handshakes(&far), 1);
    assert_eq!(far.settled(Inbound, 5).await.ok, 5);
}

#[tokio::test]
async fn each_side_may_end_alone_across_the_mesh() {
    let mesh = Mesh::new();
    let application = Application::start().await;
    let (_far, endpoint) = mesh.far(application.address());
    let address = mesh.near.announce(vec![endpoint]);
    let mut caller = Connection::open(address).await;
    let mut app = application.accept().await;
    app.say(b"220 ready").await;
    assert_eq!(caller.hear(9).await, b"220 ready");
    app.finish().await;
    end_of(&mut caller).await;
    caller.say(b"the rest").await;
    caller.finish().await;
    assert_eq!(app.hear(8).await, b"the rest");
    end_of(&mut app).await;
    assert_eq!(mesh.near.settled(Outbound, 1).await.ok, 1);
}

#[tokio::test]
async fn a_reset_at_one_end_is_a_reset_at_the_other() {
    let mesh = Mesh::new();
    let application = Application::start().await;
    let (_far, endpoint) = mesh.far(application.address());
    let address = mesh.near.announce(vec![endpoint]);
    let (mut caller, app) = greeted(address, &application).await;
    app.abort();
    reset_of(&mut caller).await;
    let (caller, mut app) = greeted(address, &application).await;
    caller.abort();
    reset_of(&mut app).await;
    let tally = mesh.near.settled(Outbound, 2).await;
    assert_eq!(tally.faults, [(Fault::PeerReset, 1), (Fault::AppReset, 1)].into());
}

/// Both ends of a connection through the mesh on which bytes have gone both ways.
async fn greeted(address: SocketAddr, application: &Application) -> (Connection, Connection) {
    let mut caller = Connection::open(address).await;
    let mut app = application.accept().await;
    app.say(b"hello").await;
    caller.hear(5).await;
    caller.say(b"hello").await;
    app.hear(5).await;
    (caller, app)
}

#[tokio::test]
async fn a_plain_hbone_endpoint_is_spoken_to_in_its_own_words() {
    let mesh = Mesh::new();
    let (far, endpoint) = mesh.far(Application::echo().await);
    talk(mesh.near.announce(vec![Endpoint { transport: Transport::Hbone, ..endpoint }])).await;
    assert_eq!(far.settled(Inbound, 1).await.ok, 1);
}

#[tokio::test]
async fn a_plaintext_endpoint_is_dialled_itself_and_counted_as_such() {
    let mesh = Mesh::new();
    let application = Application::echo().await;
    let plain = endpoint("payments.shop", "payments", application, application);
    talk(mesh.near.announce(vec![Endpoint { transport: Transport::Plaintext, ..plain }])).await;
    assert_eq!(mesh.near.settled(Outbound, 1).await.ok, 1);
    assert!(mesh.near.telemetry().edges.rows().keys().all(|edge| edge.tls == Tls::Disabled));
}

#[tokio::test]
async fn a_program_nobody_enrolled_is_reset() {
    let authority = FakeCa::new(domain());
    let near = Plan::new().workload("web", &[]).start(&authority);
    let application = Application::echo().await;
    let address = near.announce(vec![endpoint("payments.shop", "payments", application, application)]);
    reset_by(address).await;
    assert_eq!(near.settled(Outbound, 1).await.faults, [(Fault::Unenrolled, 1)].into());
    assert_eq!(near.refused(Outbound, Fault::Unenrolled), 1);
}

#[tokio::test]
async fn an_address_without_a_service_is_reset() {
    let mesh = Mesh::new();
    let nobody = SocketAddr::from(([127, 77, 200, 200], mesh.near.captured.port()));
    reset_by(nobody).await;
    assert_eq!(mesh.near.settled(Outbound, 1).await.faults, [(Fault::NoService, 1)].into());
}

#[tokio::test]
async fn whoever_dials_the_capture_port_itself_is_reset() {
    let mesh = Mesh::new();
    reset_by(mesh.near.capture_itself).await;
    assert_eq!(mesh.near.settled(Outbound, 1).await.faults, [(Fault::Loop, 1)].into());
}

#[tokio::test]
async fn a_connection_fails_as_its_last_candidate_did() {
    let (mesh, application) = (Mesh::new(), Application::echo().await);
    let (_far, good) = mesh.far(application);
    let orders = Endpoint { identity: identity("orders"), transport: Transport::Hbone, ..good };
    assert_eq!(mesh.fault(vec![orders]).await, Fault::IdentityMismatch);
    let (mesh, (_closed, address)) = (Mesh::new(), Application::closed());
    let closed = endpoint("payments.shop", "payments", address, application);
    assert_eq!(mesh.fault(vec![closed]).await, Fault::ConnectRefused);
    let (mesh, (_closed, address)) = (Mesh::new(), Application::closed());
    let (_far, endpoint) = mesh.far(address);
    assert_eq!(mesh.fault(vec![endpoint]).await, Fault::ConnectRefused);
}

#[tokio::test]
async fn a_target_the_far_host_does_not_know_is_not_tried_elsewhere() {
    let mesh = Mesh::new();
    let far = Plan::new().workload("payments", &[]).start(&mesh.authority);
    let unknown = endpoint("payments.shop", "payments", far.mesh, far.mesh);
    let (good, endpoint) = mesh.far(Application::echo().await);
    let first = Endpoint { weight: ALWAYS_FIRST, ..unknown };
    assert_eq!(mesh.fault(vec![first, endpoint]).await, Fault::UnknownTarget);
    assert_eq!(Tally::of(&good, Inbound), Tally::default());
}

/// Against an endpoint of ordinary weight, whatever its costs are.
const ALWAYS_FIRST: u32 = 1_000_000;

#[tokio::test]
async fn a_candidate_that_fails_is_left_for_the_next_with_all_the_program_said() {
    let (_closed, nobody) = Application::closed();
    for what in ["closed port", "another identity", "closed application"] {
        let mesh = Mesh::new();
        let (_far, other) = mesh.far(nobody);
        let bad = match what {
            "closed port" => Endpoint { dial: nobody, ..other },
            "another identity" => Endpoint { identity: identity("orders"), transport: Transport::Hbone, ..other },
            _ => other,
        };
        is_left_for_the_next(&mesh, bad).await;
    }
}

#[tokio::test]
async fn a_candidate_that_never_answers_is_left_for_the_next() {
    let mesh = Mesh::planned(Plan::new().connect_timeout(Duration::from_secs(2)));
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    is_left_for_the_next(&mesh, endpoint("payments.shop", "payments", address, address)).await;
}

async fn is_left_for_the_next(mesh: &Mesh, bad: Endpoint) {
    let (good, endpoint) = mesh.far(Application::echo().await);
    let what = format!("{bad:?}");
    talk(mesh.near.announce(vec![Endpoint { weight: ALWAYS_FIRST, ..bad }, endpoint])).await;
    assert_eq!(good.settled(Inbound, 1).await.ok, 1, "{what}");
    assert_eq!(mesh.near.settled(Outbound, 1).await.ok, 1, "{what}");
}

#[tokio::test]
async fn a_draining_host_loses_no_connection_to_others() {
    let mesh = Mesh::new();
    let echo = Application::echo().await;
    let (leaving, first) = mesh.far(echo);
    let (staying, second) = mesh.far(echo);
    let address = mesh.near.announce(vec![Endpoint { weight: ALWAYS_FIRST, ..first }, second]);
    talk(address).await;
    assert_eq!(leaving.settled(Inbound, 1).await.ok, 1);
    leaving.enter(Stage::Draining);
    for _ in 0..5 {
        talk(address).await;
    }
    let (before, after) = (Tally::of(&leaving, Inbound).ok, Tally::of(&staying, Inbound).ok);
    assert_eq!(mesh.near.settled(Outbound, 6).await.ok, 6);
    assert!(after > 0, "{before} streams on the host that leaves, {after} on the other");
}

#[tokio::test]
async fn bytes_a_far_host_may_have_delivered_are_not_repeated() {
    let mesh = Mesh::new();
    let application = Application::start().await;
    let (_good, endpoint) = mesh.far(application.address());
    let (far, first) = scripted(&mesh).await;
    let played = tokio::spawn(async move { react(far, &[Reaction::Echo, Reaction::BreakAfterBytes]).await });
    let address = mesh.near.announce(vec![first, endpoint]);
    talk(address).await;
    let mut caller = Connection::open(address).await;
    caller.say(b"pay once").await;
    reset_of(&mut caller).await;
    assert_eq!(within("the far side", played).await.unwrap(), b"pay once");
    let tally = mesh.near.settled(Outbound, 2).await;
    assert_eq!(tally.faults, [(Fault::ConnectRefused, 1)].into());
    assert!(!application.is_wanted().await);
}

#[tokio::test]
async fn bytes_a_far_host_refused_unseen_go_to_the_next() {
    let mesh = Mesh::new();
    let (good, endpoint) = mesh.far(Application::echo().await);
    let (far, first) = scripted(&mesh).await;
    tokio::spawn(async move { react(far, &[Reaction::Echo, Reaction::Refuse]).await });
    let address = mesh.near.announce(vec![first, endpoint]);
    talk(address).await;
    talk(address).await;
    assert_eq!(good.settled(Inbound, 1).await.ok, 1);
    assert_eq!(mesh.near.settled(Outbound, 2).await.ok, 2);
}

#[tokio::test]
async fn bytes_a_far_host_left_unseen_reach_it_on_the_next_connection() {
    let mesh = Mesh::new();
    let (far, only) = scripted(&mesh).await;
    let played = tokio::spawn(async move {
        far.leave_during_a_stream().await;
        react(far, &[Reaction::Echo]).await
    });
    let address = mesh.near.announce(vec![only]);
    let mut caller = Connection::open(address).await;
    caller.say(b"pay once").await;
    assert_eq!(caller.hear(8).await, b"pay once");
    caller.finish().await;
    end_of(&mut caller).await;
    assert_eq!(mesh.near.settled(Outbound, 1).await.ok, 1);
    drop(mesh);
    within("the far side", played).await.unwrap();
}

#[tokio::test]
async fn what_a_program_says_while_a_host_refuses_reaches_the_next_whole() {
    // Whether the refusal or the program's next words are seen first is the scheduler's choice, so it gets many.
    for pauses in 0..40 {
        let mesh = Mesh::new();
        let (_good, endpoint) = mesh.far(Application::echo().await);
        let (far, first) = scripted(&mesh).await;
        tokio::spawn(async move { react(far, &[Reaction::Echo, Reaction::RefuseAfterBytes]).await });
        let address = mesh.near.announce(vec![first, endpoint]);
        talk(address).await;
        let mut caller = Connection::open(address).await;
        for word in [&b"one "[..], b"two ", b"three ", b"four"] {
            caller.say(word).await;
            for _ in 0..pauses {
                tokio::task::yield_now().await;
            }
        }
        assert_eq!(caller.hear(18).await, b"one two three four", "with {pauses} pauses");
        caller.finish().await;
        end_of(&mut caller).await;
    }
}

/// A far side the test plays, which is asked before all others.
async fn scripted(mesh: &Mesh) -> (FarSide, Endpoint) {
    let far = FarSide::new(&mesh.authority.svid(&identity("payments")), &[b"meshd/1"]).await;
    let first = endpoint("payments.shop", "payments", far.address(), far.address());
    (far, Endpoint { weight: ALWAYS_FIRST, ..first })
}
