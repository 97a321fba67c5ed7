//! `meshd/1` as docs/wire.md has it, seen from a peer that shares no code with meshd's transport.

mod common;
mod frames;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use common::application::{Application, end_of, reset_of};
use common::host::{Host, Plan, Tally};
use common::peer::{Caller, Link, Refusal, Tunnel, answered};
use common::{domain, identity, until, within};
use frames::{END_HEADERS, END_STREAM, INITIAL_WINDOW, Wire};
use h2::Reason;
use http::Request;
use meshd::fault::Fault;
use meshd::lifecycle::Stage;
use meshd::telemetry::Direction::Inbound;
use meshd_identity::{SpiffeId, server_name};
use meshd_pki_client::Svid;
use meshd_pki_client::fake::FakeCa;
use rustls::AlertDescription;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A host that serves payments.shop:80 as `payments`, and the peer's end of a connection to it.
struct Lab {
    authority: FakeCa,
    application: Application,
    host: Host,
}

impl Lab {
    async fn start() -> Lab {
        let (authority, application) = (FakeCa::new(domain()), Application::start().await);
        let host = Plan::new().workload("payments", &[("payments.shop", 80, application.address())]).start(&authority);
        Lab { authority, application, host }
    }

    fn caller(&self) -> Caller {
        Caller::new(&self.authority, "payments")
    }

    async fn link(&self) -> Link {
        self.caller().connect(self.host.mesh).await
    }

    /// Nobody who calls like this gets a connection.
    async fn refuses(&self, caller: Caller) -> io::Error {
        let before = self.host.failed_handshakes();
        let refused = caller.refused(self.host.mesh).await;
        until("the refusal to be counted", || self.host.failed_handshakes() == before + 1).await;
        refused
    }
}

#[tokio::test]
async fn a_stream_reaches_the_service_its_authority_names() {
    let lab = Lab::start().await;
    let mut link = lab.link().await;
    assert_eq!(link.presented(), identity("payments"));
    let mut tunnel = link.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    tunnel.say(b"ping");
    assert_eq!(app.hear(4).await, b"ping");
    app.say(b"pong").await;
    assert_eq!(tunnel.hear(4).await, b"pong");
}

#[tokio::test]
async fn an_application_that_speaks_first_is_heard() {
    let lab = Lab::start().await;
    let mut tunnel = lab.link().await.open("payments.shop:80").await.unwrap();
    lab.application.accept().await.say(b"220 ready").await;
    assert_eq!(tunnel.hear(9).await, b"220 ready");
}

#[tokio::test]
async fn a_caller_that_has_ended_still_hears_the_application() {
    let lab = Lab::start().await;
    let mut tunnel = lab.link().await.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    tunnel.finish();
    end_of(&mut app).await;
    app.say(b"the answer").await;
    assert_eq!(tunnel.hear(10).await, b"the answer");
    app.finish().await;
    tunnel.ending().await.unwrap();
}

#[tokio::test]
async fn an_application_that_has_ended_still_hears_the_caller() {
    let lab = Lab::start().await;
    let mut tunnel = lab.link().await.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    app.finish().await;
    tunnel.ending().await.unwrap();
    tunnel.say(b"the rest");
    tunnel.finish();
    assert_eq!(app.hear(8).await, b"the rest");
    end_of(&mut app).await;
}

#[tokio::test]
async fn bytes_sent_before_the_answer_reach_the_application() {
    const EARLY: usize = 64 * 1024;
    let lab = Lab::start().await;
    let (response, mut send) = lab.link().await.ask("payments.shop:80").await.unwrap();
    send.send_data(Bytes::from(vec![7; EARLY]), true).unwrap();
    let mut app = lab.application.accept().await;
    assert_eq!(app.hear(EARLY).await, vec![7; EARLY]);
    end_of(&mut app).await;
    answered(response, send).await.unwrap();
}

#[tokio::test]
async fn large_transfers_arrive_whole_in_both_directions() {
    const LENGTH: usize = 5_000_000;
    let authority = FakeCa::new(domain());
    let echo = Application::echo().await;
    let host = Plan::new().workload("payments", &[("payments.shop", 80, echo)]).start(&authority);
    let mut link = Caller::new(&authority, "payments").connect(host.mesh).await;
    let mut tunnel = link.open("payments.shop:80").await.unwrap();
    let text: Vec<u8> = (0..LENGTH).map(|n| ((n * 31) >> 8) as u8).collect();
    // More than any window: it only gets through if windows are given back as the application takes bytes.
    tunnel.send.send_data(text.clone().into(), true).unwrap();
    assert!(tunnel.hear(LENGTH).await == text, "other bytes than were sent");
    tunnel.ending().await.unwrap();
    let tally = host.settled(Inbound, 1).await;
    assert_eq!((tally.up_bytes, tally.down_bytes), (LENGTH as u64, LENGTH as u64));
}

#[tokio::test]
async fn an_address_is_no_target() {
    let lab = Lab::start().await;
    let mut link = lab.link().await;
    let address = lab.application.address().to_string();
    for target in [address.as_str(), "[::1]:80", "payments.shop", "payments.shop:0", "payments:80"] {
        assert_eq!(link.open(target).await.err(), Some(Refusal::new(400, None)), "{target}");
    }
    assert_eq!(lab.host.refused(Inbound, Fault::UnknownTarget), 5);
}

#[tokio::test]
async fn an_ordinary_request_is_refused() {
    let lab = Lab::start().await;
    let mut link = lab.link().await;
    let request = Request::get("http://payments.shop:80/").header("meshd-target", "payments.shop:80").body(()).unwrap();
    assert_eq!(link.request(request).await, Refusal::new(400, None));
}

#[tokio::test]
async fn what_the_host_does_not_serve_is_an_unknown_target() {
    let lab = Lab::start().await;
    let mut link = lab.link().await;
    for target in ["payments.shop:81", "orders.shop:80", "payments.bank:80"] {
        let refused = link.open(target).await.err();
        assert_eq!(refused, Some(Refusal::new(404, Some("unknown_target"))), "{target}");
    }
    assert_eq!(lab.host.refused(Inbound, Fault::UnknownTarget), 3);
    assert_eq!(lab.host.settled(Inbound, 3).await.connected, 0);
}

#[tokio::test]
async fn a_service_of_another_identity_than_the_asked_for_is_misdirected() {
    let (authority, application) = (FakeCa::new(domain()), Application::start().await);
    let host = Plan::new()
        .workload("payments", &[("payments.shop", 80, application.address())])
        .workload("orders", &[("orders.shop", 80, application.address())])
        .start(&authority);
    let mut link = Caller::new(&authority, "orders").connect(host.mesh).await;
    assert_eq!(link.presented(), identity("orders"));
    assert_eq!(link.open("payments.shop:80").await.err(), Some(Refusal::new(421, Some("misdirected"))));
    assert!(link.open("orders.shop:80").await.is_ok());
    assert_eq!(host.refused(Inbound, Fault::Misdirected), 1);
}

#[tokio::test]
async fn an_application_that_does_not_listen_is_told_as_refused() {
    let authority = FakeCa::new(domain());
    let (_closed, address) = Application::closed();
    let host = Plan::new().workload("payments", &[("payments.shop", 80, address)]).start(&authority);
    let mut link = Caller::new(&authority, "payments").connect(host.mesh).await;
    let refused = link.open("payments.shop:80").await.err();
    assert_eq!(refused, Some(Refusal::new(503, Some("connect_refused"))));
    assert_eq!(host.refused(Inbound, Fault::ConnectRefused), 1);
}

#[tokio::test]
async fn an_identity_the_host_does_not_hold_cannot_be_asked_for() {
    let lab = Lab::start().await;
    let elsewhere = server_name(&identity("orders"));
    for name in [elsewhere.as_str(), "payments.shop.mesh", "id.mesh.internal"] {
        lab.refuses(lab.caller().server_name(Some(name))).await;
    }
}

#[tokio::test]
async fn without_a_name_the_default_identity_is_shown_and_serves_every_owner() {
    let (authority, application) = (FakeCa::new(domain()), Application::start().await);
    let host = Plan::new()
        .workload("payments", &[("payments.shop", 80, application.address())])
        .workload("orders", &[("orders.shop", 80, application.address())])
        .default_identity("orders")
        .start(&authority);
    let mut link = Caller::new(&authority, "payments").server_name(None).connect(host.mesh).await;
    assert_eq!(link.presented(), identity("orders"));
    assert!(link.open("payments.shop:80").await.is_ok());
}

#[tokio::test]
async fn without_a_name_and_a_default_identity_there_is_no_connection() {
    let lab = Lab::start().await;
    lab.refuses(lab.caller().server_name(None)).await;
}

#[tokio::test]
async fn a_caller_needs_a_certificate() {
    let lab = Lab::start().await;
    let refused = lab.refuses(lab.caller().certificate(None)).await;
    assert_eq!(alert(&refused), Some(AlertDescription::CertificateRequired));
}

#[tokio::test]
async fn a_caller_of_another_trust_domain_is_refused() {
    let lab = Lab::start().await;
    let foreign: SpiffeId = "spiffe://other.example.org/ns/shop/sa/web".parse().unwrap();
    // Signed by our own authority: the name alone must be enough.
    let refused = lab.refuses(lab.caller().certificate(Some(lab.authority.svid(&foreign)))).await;
    assert!(alert(&refused).is_some(), "{refused:?}");
}

#[tokio::test]
async fn a_caller_of_another_authority_is_refused() {
    let lab = Lab::start().await;
    let impostor = FakeCa::new(domain()).svid(&identity("web"));
    let refused = lab.refuses(lab.caller().certificate(Some(impostor))).await;
    assert_eq!(alert(&refused), Some(AlertDescription::UnknownCA));
}

#[tokio::test]
async fn a_caller_whose_certificate_has_ended_is_refused() {
    let lab = Lab::start().await;
    let ended = lab.authority.expired_svid(&identity("web"));
    let refused = lab.refuses(lab.caller().certificate(Some(ended))).await;
    assert_eq!(alert(&refused), Some(AlertDescription::CertificateExpired));
}

#[tokio::test]
async fn a_caller_that_speaks_no_known_version_is_refused() {
    let lab = Lab::start().await;
    let refused = lab.refuses(lab.caller().alpn(b"http/1.1")).await;
    assert_eq!(alert(&refused), Some(AlertDescription::NoApplicationProtocol));
}

#[tokio::test]
async fn nonsense_is_a_failed_handshake_and_disturbs_nobody() {
    let lab = Lab::start().await;
    let mut tunnel = lab.link().await.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    for nonsense in
        [&b"GET / HTTP/1.1\r\nHost: payments.shop\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 4096]]
    {
        let before = lab.host.failed_handshakes();
        let mut socket = TcpStream::connect(lab.host.mesh).await.unwrap();
        socket.write_all(nonsense).await.unwrap();
        // An alert may precede the end; how the kernel words the end is all the same.
        let _ = within("the host to close", socket.read_to_end(&mut Vec::new())).await;
        until("the failure to be counted", || lab.host.failed_handshakes() == before + 1).await;
    }
    tunnel.say(b"undisturbed");
    assert_eq!(app.hear(11).await, b"undisturbed");
    assert!(lab.link().await.open("payments.shop:80").await.is_ok());
}

#[tokio::test]
async fn a_peer_that_speaks_no_http2_after_the_handshake_is_a_failed_handshake() {
    let lab = Lab::start().await;
    let mut tls = lab.caller().tls(lab.host.mesh).await.unwrap();
    tls.write_all(b"GET / HTTP/1.1\r\nHost: payments.shop\r\n\r\n").await.unwrap();
    let _ = within("the host to close", tls.read_to_end(&mut Vec::new())).await;
    until("the failure to be counted", || lab.host.failed_handshakes() == 1).await;
    assert_eq!(lab.host.telemetry().handshakes.accepted.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_left_when_its_time_is_up() {
    let lab = Lab::start().await;
    let mut silent = TcpStream::connect(lab.host.mesh).await.unwrap();
    let mut after_tls = lab.caller().tls(lab.host.mesh).await.unwrap();
    let _ = within("the host to close", silent.read_to_end(&mut Vec::new())).await;
    let _ = within("the host to close", after_tls.read_to_end(&mut Vec::new())).await;
    until("both to be counted", || lab.host.failed_handshakes() == 2).await;
}

#[tokio::test]
async fn a_stream_the_caller_breaks_off_is_a_reset_for_the_application() {
    let lab = Lab::start().await;
    let mut tunnel = lab.link().await.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    tunnel.send.send_reset(Reason::CANCEL);
    reset_of(&mut app).await;
    let tally = lab.host.settled(Inbound, 1).await;
    assert_eq!(tally.faults.get(&Fault::PeerReset), Some(&1));
}

#[tokio::test]
async fn a_stream_given_up_before_its_answer_never_looks_finished_to_the_application() {
    let lab = Lab::start().await;
    let (response, mut send) = lab.link().await.ask("payments.shop:80").await.unwrap();
    send.send_reset(Reason::CANCEL);
    drop(response);
    let tally = lab.host.settled(Inbound, 1).await;
    assert_eq!(tally.faults.get(&Fault::PeerReset), Some(&1), "{tally:?}");
    reset_of(&mut lab.application.accept().await).await;
}

#[tokio::test]
async fn an_application_that_breaks_off_is_a_reset_for_the_caller() {
    let lab = Lab::start().await;
    let mut tunnel = lab.link().await.open("payments.shop:80").await.unwrap();
    lab.application.accept().await.abort();
    assert_eq!(tunnel.ending().await.unwrap_err().reason(), Some(Reason::CANCEL));
    let tally = lab.host.settled(Inbound, 1).await;
    assert_eq!(tally.faults.get(&Fault::AppReset), Some(&1));
}

#[tokio::test]
async fn a_vanished_peer_is_a_reset_for_its_applications() {
    let lab = Lab::start().await;
    let mut link = lab.link().await;
    let _tunnels = [link.open("payments.shop:80").await.unwrap(), link.open("payments.shop:80").await.unwrap()];
    let mut apps = [lab.application.accept().await, lab.application.accept().await];
    link.ended.abort();
    for app in &mut apps {
        reset_of(app).await;
    }
    let tally = lab.host.settled(Inbound, 2).await;
    assert_eq!(tally.faults.get(&Fault::PeerReset), Some(&2));
}

#[tokio::test]
async fn a_draining_host_finishes_what_is_under_way_and_takes_nothing_new() {
    let lab = Lab::start().await;
    let mut link = lab.link().await;
    let mut tunnel = link.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    lab.host.enter(Stage::Draining);
    sent_away(&mut link).await;
    let refused = within("the listener to close", listener_closed(&lab)).await;
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    tunnel.say(b"still under way");
    assert_eq!(app.hear(15).await, b"still under way");
    app.finish().await;
    tunnel.ending().await.unwrap();
    tunnel.finish();
    end_of(&mut app).await;
    // How it ends is the kernel's word: we may have been saying goodbye ourselves.
    let _ = within("the connection to end", link.ended).await.unwrap();
    assert_eq!(lab.host.settled(Inbound, 1).await.ok, 1);
}

/// More than a connection that nobody reads takes at once.
const TAIL: usize = 600_000;

/// A draining host whose last stream has ended, all of it still on its way to a peer that has not read yet.
async fn tail_of(lab: &Lab) -> Wire {
    let mut wire = Wire::new(lab.caller().narrow_tls(lab.host.mesh).await.unwrap(), Vec::new());
    wire.preface().await;
    wire.settings(&[(INITIAL_WINDOW, 4 << 20)]).await;
    wire.window_update(16 << 20).await;
    wire.hear_opening().await;
    wire.headers(1, END_HEADERS, &[(":method", "CONNECT"), (":authority", "payments.shop:80")]).await;
    let mut app = lab.application.accept().await;
    lab.host.enter(Stage::Draining);
    wire.hear_farewell().await;
    wire.data(1, END_STREAM, "").await;
    end_of(&mut app).await;
    app.say(&[7; TAIL]).await;
    app.finish().await;
    lab.host.settled(Inbound, 1).await;
    wire
}

#[tokio::test]
async fn a_slow_reader_gets_all_that_was_said_before_a_draining_host_ended_the_connection() {
    let lab = Lab::start().await;
    let mut wire = tail_of(&lab).await;
    assert_eq!(wire.drain_data(1).await.expect("the end of the stream"), TAIL);
}

#[tokio::test]
async fn a_drain_is_not_over_before_slow_readers_have_everything() {
    let lab = Lab::start().await;
    let mut wire = tail_of(&lab).await;
    let stop = async {
        until("the drain to be over", || lab.host.under_way() == 0).await;
        lab.host.enter(Stage::Stopped);
    };
    let (got, ()) = tokio::join!(wire.drain_data(1), stop);
    assert_eq!(got.expect("the end of the stream"), TAIL);
}

#[tokio::test]
async fn a_rotation_moves_new_streams_to_new_connections_and_cuts_none() {
    let lab = Lab::start().await;
    let mut old = lab.link().await;
    let mut tunnel = old.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    lab.host.rotate(&lab.authority.credentials("host", &[identity("payments")]));
    sent_away(&mut old).await;
    let mut new = lab.link().await;
    assert_ne!(new.serial(), old.serial());
    assert!(new.open("payments.shop:80").await.is_ok());
    tunnel.say(b"old but open");
    assert_eq!(app.hear(12).await, b"old but open");
    assert!(!new.sent_away().await);
}

#[tokio::test]
async fn a_connection_takes_no_streams_once_the_callers_certificate_has_ended() {
    let lab = Lab::start().await;
    let caller = lab.caller().certificate(Some(ending_soon(&lab.authority)));
    let mut link = caller.connect(lab.host.mesh).await;
    let mut tunnel = link.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    sent_away(&mut link).await;
    tunnel.say(b"still open");
    assert_eq!(app.hear(10).await, b"still open");
}

#[tokio::test]
async fn every_stream_is_counted_and_logged_once() {
    let lab = Lab::start().await;
    let mut link = lab.link().await;
    let mut finished = link.open("payments.shop:80").await.unwrap();
    let mut app = lab.application.accept().await;
    finished.say(b"12345");
    finished.finish();
    end_of(&mut app).await;
    app.say(b"123").await;
    app.finish().await;
    finished.hear(3).await;
    finished.ending().await.unwrap();
    let mut broken = link.open("payments.shop:80").await.unwrap();
    lab.application.accept().await.abort();
    broken.ending().await.unwrap_err();
    link.open("nobody.shop:80").await.err().unwrap();
    let open = link.open("payments.shop:80").await.unwrap();
    until("the streams to be reported", || Tally::of(&lab.host, Inbound).closed() == 3).await;
    let tally = Tally::of(&lab.host, Inbound);
    assert_eq!((tally.opened, tally.connected, tally.ok), (4, 3, 1));
    assert_eq!((tally.up_bytes, tally.down_bytes), (5, 3));
    assert_eq!(tally.faults, [(Fault::UnknownTarget, 1), (Fault::AppReset, 1)].into());
    assert_eq!(lab.host.refused(Inbound, Fault::UnknownTarget), 1);
    drop((open, link));
    lab.host.settled(Inbound, 4).await;
    let mut outcomes = outcomes(lab.host);
    outcomes.sort_unstable();
    assert_eq!(outcomes, ["app_reset", "ok", "peer_reset", "unknown_target"]);
}

#[tokio::test]
async fn the_access_log_names_both_identities_and_the_service() {
    let lab = Lab::start().await;
    let mut tunnel = lab.link().await.open("payments.shop:80").await.unwrap();
    tunnel.finish();
    lab.application.accept().await.finish().await;
    tunnel.ending().await.unwrap();
    lab.host.settled(Inbound, 1).await;
    let log = lab.host.access_log();
    let [line] = log.as_slice() else { panic!("{log:?}") };
    for (field, expected) in [
        ("direction", "inbound"),
        ("unit", "payments.service"),
        ("client_id", "spiffe://prod.example.org/ns/shop/sa/web"),
        ("server_id", "spiffe://prod.example.org/ns/shop/sa/payments"),
        ("service", "payments.shop"),
        ("outcome", "ok"),
    ] {
        assert_eq!(line[field], expected, "{line}");
    }
}

#[tokio::test]
async fn workers_share_the_connections_and_miss_none() {
    let (authority, echo) = (FakeCa::new(domain()), Application::echo().await);
    let host = Plan::new().workload("payments", &[("payments.shop", 80, echo)]).workers(3).start(&authority);
    let caller = Caller::new(&authority, "payments");
    for _ in 0..12 {
        let mut tunnel = caller.connect(host.mesh).await.open("payments.shop:80").await.unwrap();
        talk(&mut tunnel).await;
    }
    assert_eq!(host.settled(Inbound, 12).await.ok, 12);
}

/// A question, its echo, and both ends.
async fn talk(tunnel: &mut Tunnel) {
    tunnel.say(b"hello");
    tunnel.finish();
    assert_eq!(tunnel.hear(5).await, b"hello");
    tunnel.ending().await.unwrap();
}

fn alert(error: &io::Error) -> Option<AlertDescription> {
    match error.get_ref()?.downcast_ref()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}

async fn sent_away(link: &mut Link) {
    let goes = async {
        while !link.sent_away().await {
            tokio::task::yield_now().await;
        }
    };
    within("a GOAWAY", goes).await;
}

/// How the host's port refuses, once it does.
async fn listener_closed(lab: &Lab) -> io::Error {
    loop {
        if let Err(error) = TcpStream::connect(lab.host.mesh).await {
            return error;
        }
    }
}

/// Valid long enough for a handshake on a busy machine.
fn ending_soon(authority: &FakeCa) -> Arc<Svid> {
    let now = SystemTime::now();
    authority.svid_between(&identity("web"), now - Duration::from_secs(60), now + Duration::from_secs(4))
}

fn outcomes(host: Host) -> Vec<String> {
    let outcome = |line: serde_json::Value| line["outcome"].as_str().unwrap().to_owned();
    host.access_log().into_iter().map(outcome).collect()
}
