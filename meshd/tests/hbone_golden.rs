//! The HBONE side of the wire, frame by frame: a peer that writes what Istio's ztunnel writes, and what it is answered.
//!
//! `hbone_golden.txt` is the expected transcript: `>` the peer sends, `<` meshd sends, `=` the application.

mod common;
mod frames;

use std::net::SocketAddr;

use common::application::{Application, Connection, end_of, reset_of};
use common::host::{Host, Plan};
use common::identity;
use common::peer::Caller;
use frames::{CANCEL, END_HEADERS, END_STREAM, Wire};
use meshd_pki_client::fake::FakeCa;

const GOLDEN: &str = include_str!("hbone_golden.txt");

/// What ztunnel writes with each CONNECT besides its target.
const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
const BAGGAGE: &str = "k8s.namespace.name=shop,k8s.pod.name=web-1,service.name=web,service.version=1";
const FORWARDED: &str = "for=\"10.1.2.3:7000\";host=payments.shop.svc.cluster.local";

#[tokio::test]
async fn a_ztunnel_peer_gets_the_recorded_answers() {
    let authority = FakeCa::new(common::domain());
    let application = Application::start().await;
    let address = application.address();
    let serves = [("payments.shop", 80, address)];
    let host = Plan::new().workload("payments", &serves).default_identity("payments").start(&authority);
    let ports = vec![(address.port(), "APP"), (host.mesh.port(), "MESH")];
    let mut peer = Ztunnel::connect(&authority, &host, ports).await;
    peer.open().await;
    peer.talks_and_each_side_ends_alone(&application).await;
    peer.is_refused_everything_else(address, host.mesh).await;
    peer.breaks_off(&application).await;
    assert_matches_golden(&peer.wire.transcript);
}

/// ztunnel's end of the connection.
struct Ztunnel {
    wire: Wire,
    next_stream: u32,
}

impl Ztunnel {
    async fn connect(authority: &FakeCa, host: &Host, ports: Vec<(u16, &'static str)>) -> Ztunnel {
        let caller = Caller {
            certificate: Some(authority.svid(&identity("web"))),
            alpn: b"h2",
            // ztunnel sends none: the certificate is chosen by the address it dials.
            server_name: None,
        };
        let tls = caller.tls(host.mesh).await.unwrap();
        assert_eq!(tls.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        Ztunnel { wire: Wire::new(tls, ports), next_stream: 1 }
    }

    async fn open(&mut self) {
        self.wire.note("# the connection opens");
        self.wire.preface().await;
        let settings = [
            (frames::ENABLE_PUSH, 0),
            (frames::INITIAL_WINDOW, 4 << 20),
            (frames::MAX_FRAME, 1 << 20),
            (frames::MAX_HEADERS, 16 << 10),
        ];
        self.wire.settings(&settings).await;
        self.wire.window_update((16 << 20) - 65_535).await;
        self.wire.hear_opening().await;
        self.wire.acknowledge_settings().await;
        self.wire.note("\n# the caller asks whether meshd is there");
        self.wire.ping().await;
        self.wire.hear_frame().await;
    }

    async fn talks_and_each_side_ends_alone(&mut self, application: &Application) {
        self.wire.note("\n# a CONNECT to the application is carried; the caller ends first");
        let (stream, mut app) = self.accepted(application).await;
        self.says(stream, &mut app, "ping").await;
        self.hears(stream, &mut app, "pong").await;
        self.wire.data(stream, END_STREAM, "").await;
        end_of(&mut app).await;
        self.wire.note("= hears the end");
        self.hears(stream, &mut app, "after the end").await;
        app.finish().await;
        self.wire.hear_frame().await;

        self.wire.note("\n# the application ends first");
        let (stream, mut app) = self.accepted(application).await;
        app.finish().await;
        self.wire.hear_frame().await;
        self.says(stream, &mut app, "not done yet").await;
        self.wire.data(stream, END_STREAM, "").await;
        end_of(&mut app).await;
        self.wire.note("= hears the end");
    }

    async fn is_refused_everything_else(&mut self, address: SocketAddr, mesh: SocketAddr) {
        self.wire.note("\n# an ordinary request is none of ours");
        let get = [(":method", "GET"), (":scheme", "http"), (":authority", &address.to_string()), (":path", "/")];
        self.asks(END_HEADERS | END_STREAM, &get).await;
        self.wire.hear_frame().await;
        let port = address.port();
        for (why, target) in [
            ("an authority that is no address", "nonsense".to_owned()),
            ("an authority that is a name", "payments.shop:80".to_owned()),
            ("another address than the dialled one", format!("127.0.0.2:{port}")),
            ("a port that is no service", "127.0.0.1:9".to_owned()),
            ("meshd's own listener", mesh.to_string()),
        ] {
            self.wire.note(&format!("\n# {why} is refused"));
            self.connects(&target).await;
            self.wire.hear_frame().await;
            // The refusal is whole, and the rest of the request is not wanted (RFC 9113, 8.1).
            self.wire.hear_frame().await;
        }
    }

    async fn breaks_off(&mut self, application: &Application) {
        self.wire.note("\n# a stream the caller breaks off breaks the application's connection");
        let (stream, mut app) = self.accepted(application).await;
        self.wire.reset(stream, CANCEL).await;
        reset_of(&mut app).await;
        self.wire.note("= sees a reset");

        self.wire.note("\n# a stream the application breaks off is broken for the caller; others go on");
        let (_, app) = self.accepted(application).await;
        app.abort();
        self.wire.hear_frame().await;
        let (stream, mut app) = self.accepted(application).await;
        self.says(stream, &mut app, "still here").await;
    }

    /// A stream that the application has accepted.
    async fn accepted(&mut self, application: &Application) -> (u32, Connection) {
        let stream = self.connects(&application.address().to_string()).await;
        let app = application.accept().await;
        self.wire.hear_frame().await;
        (stream, app)
    }

    async fn connects(&mut self, target: &str) -> u32 {
        let headers = [
            (":method", "CONNECT"),
            (":authority", target),
            ("forwarded", FORWARDED),
            ("baggage", BAGGAGE),
            ("traceparent", TRACEPARENT),
        ];
        self.asks(END_HEADERS, &headers).await
    }

    async fn asks(&mut self, flags: u8, headers: &[(&str, &str)]) -> u32 {
        let stream = self.next_stream;
        self.next_stream += 2;
        self.wire.headers(stream, flags, headers).await;
        stream
    }

    async fn says(&mut self, stream: u32, app: &mut Connection, text: &str) {
        self.wire.data(stream, 0, text).await;
        let heard = app.hear(text.len()).await;
        self.wire.note(&format!("= hears {:?}", String::from_utf8_lossy(&heard)));
    }

    async fn hears(&mut self, stream: u32, app: &mut Connection, text: &str) {
        app.say(text.as_bytes()).await;
        self.wire.note(&format!("= says {text:?}"));
        self.wire.hear_data(stream, text.len()).await;
    }
}

fn assert_matches_golden(transcript: &str) {
    for (line, (now, expected)) in transcript.lines().zip(GOLDEN.lines()).enumerate() {
        assert_eq!(now, expected, "line {} of hbone_golden.txt", line + 1);
    }
    assert_eq!(transcript.lines().count(), GOLDEN.lines().count(), "lines of hbone_golden.txt");
}
