use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use meshd_discovery::fake;

use super::*;
use crate::telemetry::AccessLog;
use std::net::Ipv4Addr;

struct Server {
    udp: SocketAddr,
    tcp: SocketAddr,
    directory: watch::Sender<Arc<Directory>>,
    vips: Arc<Vips>,
    telemetry: Arc<Telemetry>,
    _state: tempfile::TempDir,
    _task: JoinSet<()>,
}

async fn start() -> Server {
    start_with(DnsConfig { upstream: Some(Vec::new()), ..DnsConfig::default() }).await
}

async fn start_with(config: DnsConfig) -> Server {
    let state = tempfile::tempdir().unwrap();
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addresses = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
    let vips =
        Vips::open(&state.path().join("vips.json"), "240.240.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap());
    let vips = Arc::new(vips.unwrap());
    let directory = watch::Sender::new(Arc::new(Directory::from_services([fake::service("web.shop", "test", &[])])));
    let mut task = JoinSet::new();
    let telemetry = Telemetry::new(1, AccessLog::off());
    let config = DnsConfig { listen: addresses.0, ..config };
    task.spawn(serve(udp, tcp, config, directory.subscribe(), vips.clone(), Lookups::off(), telemetry.clone()));
    Server { telemetry, udp: addresses.0, tcp: addresses.1, directory, vips, _state: state, _task: task }
}

fn question(name: &str) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

fn framed(packet: &[u8]) -> Vec<u8> {
    [&(packet.len() as u16).to_be_bytes(), packet].concat()
}

async fn receive(stream: &mut TcpStream) -> Message {
    let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut answer).await.unwrap();
    Message::from_vec(&answer).unwrap()
}

async fn ask_udp(server: &Server, packet: &[u8]) -> Message {
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    client.send_to(packet, server.udp).await.unwrap();
    let mut answer = [0; 1232];
    let (length, _) = client.recv_from(&mut answer).await.unwrap();
    Message::from_vec(&answer[..length]).unwrap()
}

#[tokio::test]
async fn udp_answers_with_the_virtual_ip_that_capture_will_recognise() {
    let server = start().await;
    let answer = ask_udp(&server, &question("web.shop.mesh.")).await;
    let address = answer.answers[0].data.ip_addr().unwrap();
    assert_eq!(server.vips.service_of(address).unwrap().as_str(), "web.shop");
}

#[tokio::test]
async fn answers_follow_the_directory() {
    let server = start().await;
    assert_eq!(ask_udp(&server, &question("new.shop.mesh.")).await.metadata.response_code, ResponseCode::NXDomain);
    server.directory.send_replace(Arc::new(Directory::from_services([fake::service("new.shop", "test", &[])])));
    assert_eq!(ask_udp(&server, &question("new.shop.mesh.")).await.answers.len(), 1);
    assert_eq!(ask_udp(&server, &question("web.shop.mesh.")).await.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn nonsense_over_udp_does_not_stop_the_next_question() {
    let server = start().await;
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    for nonsense in [&b""[..], b"x", &[0xff; 600], &[0; 5000]] {
        client.send_to(nonsense, server.udp).await.unwrap();
    }
    assert_eq!(ask_udp(&server, &question("web.shop.mesh.")).await.answers.len(), 1);
}

#[tokio::test]
async fn tcp_carries_several_questions_also_in_one_write() {
    let server = start().await;
    let mut stream = TcpStream::connect(server.tcp).await.unwrap();
    let questions = [framed(&question("web.shop.mesh.")), framed(&question("none.shop.mesh."))].concat();
    stream.write_all(&questions).await.unwrap();
    assert_eq!(receive(&mut stream).await.answers.len(), 1);
    assert_eq!(receive(&mut stream).await.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn a_tcp_message_longer_than_any_question_or_without_a_header_ends_the_connection() {
    let server = start().await;
    for start in [&[0xff, 0xff][..], &[0, 0], &[0, 3, 1, 2, 3]] {
        let mut stream = TcpStream::connect(server.tcp).await.unwrap();
        stream.write_all(start).await.unwrap();
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0, "{start:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_tcp_connection_is_closed_after_two_seconds() {
    let server = start().await;
    for start in [&b""[..], &[0], &[0, 40, 1, 2]] {
        let mut stream = TcpStream::connect(server.tcp).await.unwrap();
        stream.write_all(start).await.unwrap();
        let before = tokio::time::Instant::now();
        assert_eq!(stream.read(&mut [0; 16]).await.unwrap_or(0), 0);
        assert!(before.elapsed() >= IDLE, "{:?}", before.elapsed());
    }
}

#[tokio::test]
async fn a_client_with_its_share_of_connections_gets_no_more_until_one_ends() {
    let server = start().await;
    let mut held = Vec::new();
    for _ in 0..MAX_CONNECTIONS_OF_ONE {
        let mut stream = TcpStream::connect(server.tcp).await.unwrap();
        // Answered, so it was accepted.
        stream.write_all(&framed(&question("web.shop.mesh."))).await.unwrap();
        assert_eq!(receive(&mut stream).await.answers.len(), 1);
        held.push(stream);
    }
    let mut one_more = TcpStream::connect(server.tcp).await.unwrap();
    assert_eq!(one_more.read(&mut [0; 16]).await.unwrap_or(0), 0);
    assert_eq!(ask_udp(&server, &question("web.shop.mesh.")).await.answers.len(), 1);

    let mut ended = held.pop().unwrap();
    ended.shutdown().await.unwrap();
    assert_eq!(ended.read(&mut [0; 16]).await.unwrap_or(0), 0);
    let mut next = TcpStream::connect(server.tcp).await.unwrap();
    next.write_all(&framed(&question("web.shop.mesh."))).await.unwrap();
    assert_eq!(receive(&mut next).await.answers.len(), 1);
}

/// A server of the host that answers everything with one address, over UDP and TCP.
struct Elsewhere {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Elsewhere {
    async fn start() -> Elsewhere {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = tcp.local_addr().unwrap();
        let udp = UdpSocket::bind(address).await.unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut packet = [0; 1232];
            loop {
                let (length, peer) = udp.recv_from(&mut packet).await.unwrap();
                udp.send_to(&address_answer(&packet[..length]), peer).await.unwrap();
            }
        });
        tasks.spawn(async move {
            loop {
                let (mut stream, _) = tcp.accept().await.unwrap();
                let mut packet = vec![0; 1232];
                let length = read_message(&mut stream, &mut packet).await.unwrap();
                stream.write_all(&framed(&address_answer(&packet[..length]))).await.unwrap();
            }
        });
        Elsewhere { address, _tasks: tasks }
    }
}

fn address_answer(packet: &[u8]) -> Vec<u8> {
    let asked = Message::from_vec(packet).unwrap();
    let mut answer = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
    let name = asked.queries[0].name().clone();
    answer.add_queries(asked.queries);
    let data = hickory_proto::rr::RData::A(Ipv4Addr::new(192, 0, 2, 7).into());
    answer.add_answer(hickory_proto::rr::Record::from_rdata(name, 60, data));
    answer.to_vec().unwrap()
}

#[tokio::test]
async fn names_outside_the_mesh_are_asked_elsewhere_over_both_transports() {
    let elsewhere = Elsewhere::start().await;
    let server = start_with(DnsConfig { upstream: Some(vec![elsewhere.address]), ..DnsConfig::default() }).await;
    let answer = ask_udp(&server, &question("example.org.")).await;
    assert_eq!((answer.metadata.id, answer.answers[0].data.ip_addr()), (7, Some(Ipv4Addr::new(192, 0, 2, 7).into())));
    let mut stream = TcpStream::connect(server.tcp).await.unwrap();
    let questions = ["example.org.", "new.shop.svc.cluster.local.", "web.shop.svc.cluster.local.", "none.shop.mesh."];
    for name in questions {
        stream.write_all(&framed(&question(name))).await.unwrap();
    }
    assert_eq!(receive(&mut stream).await.answers[0].data.ip_addr(), Some(Ipv4Addr::new(192, 0, 2, 7).into()));
    assert_eq!(receive(&mut stream).await.answers[0].data.ip_addr(), Some(Ipv4Addr::new(192, 0, 2, 7).into()));
    let ours = receive(&mut stream).await.answers[0].data.ip_addr().unwrap();
    assert_eq!(server.vips.service_of(ours).unwrap().as_str(), "web.shop");
    assert_eq!(receive(&mut stream).await.metadata.response_code, ResponseCode::NXDomain);
    let counted = |outcome| server.telemetry.dns.value(outcome);
    assert_eq!(
        (counted(DnsOutcome::Forwarded), counted(DnsOutcome::Answered), counted(DnsOutcome::Nxdomain)),
        (3, 1, 1)
    );
}

#[tokio::test]
async fn without_a_server_to_ask_the_rest_is_refused() {
    let server = start().await;
    assert_eq!(ask_udp(&server, &question("example.org.")).await.metadata.response_code, ResponseCode::Refused);
    assert_eq!(server.telemetry.dns.value(DnsOutcome::Refused), 1);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_failure_at_once() {
    let closed = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let server = start_with(DnsConfig { upstream: Some(vec![closed]), ..DnsConfig::default() }).await;
    let answer = ask_udp(&server, &question("example.org.")).await;
    assert_eq!((answer.metadata.response_code, answer.metadata.id), (ResponseCode::ServFail, 7));
    assert_eq!(server.telemetry.dns.value(DnsOutcome::ForwardFailed), 1);
    assert_eq!(ask_udp(&server, &question("web.shop.mesh.")).await.answers.len(), 1);
}

/// Forwards every packet to `target` from a socket of its own, as another forwarder on this host would.
async fn relay(socket: UdpSocket, target: SocketAddr, passed: Arc<std::sync::atomic::AtomicUsize>) {
    let socket = Arc::new(socket);
    let mut tasks = JoinSet::new();
    let mut packet = [0; 1232];
    loop {
        let (length, peer) = socket.recv_from(&mut packet).await.unwrap();
        passed.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (socket, packet) = (socket.clone(), packet[..length].to_vec());
        tasks.spawn(async move {
            let onward = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            onward.send_to(&packet, target).await.unwrap();
            let mut answer = [0; 1232];
            let (length, _) = onward.recv_from(&mut answer).await.unwrap();
            socket.send_to(&answer[..length], peer).await.unwrap();
        });
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_asks_us_back_is_asked_once_and_the_question_fails() {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let relay_address = socket.local_addr().unwrap();
    let server = start_with(DnsConfig { upstream: Some(vec![relay_address]), ..DnsConfig::default() }).await;
    let passed = Arc::default();
    let mut task = JoinSet::new();
    task.spawn(relay(socket, server.udp, Arc::clone(&passed)));
    let answer = ask_udp(&server, &question("example.org.")).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(passed.load(std::sync::atomic::Ordering::Relaxed), 1);
}
