use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use meshd_discovery::fake;

use super::*;

struct Server {
    udp: SocketAddr,
    tcp: SocketAddr,
    directory: watch::Sender<Arc<Directory>>,
    vips: Arc<Vips>,
    _state: tempfile::TempDir,
    _task: JoinSet<()>,
}

async fn start() -> Server {
    let state = tempfile::tempdir().unwrap();
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addresses = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
    let vips =
        Vips::open(&state.path().join("vips.json"), "240.240.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap());
    let vips = Arc::new(vips.unwrap());
    let directory = watch::Sender::new(Arc::new(Directory::from_services([fake::service("web.shop", "test", &[])])));
    let mut task = JoinSet::new();
    task.spawn(serve(udp, tcp, DnsConfig::default().domain, directory.subscribe(), vips.clone()));
    Server { udp: addresses.0, tcp: addresses.1, directory, vips, _state: state, _task: task }
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
async fn idle_connections_up_to_the_limit_hold_up_tcp_but_not_udp() {
    let server = start().await;
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS + 4 {
        idle.push(TcpStream::connect(server.tcp).await.unwrap());
    }
    assert_eq!(ask_udp(&server, &question("web.shop.mesh.")).await.answers.len(), 1);
    let (mut last, rest) = (idle.pop().unwrap(), idle);
    last.write_all(&framed(&question("web.shop.mesh."))).await.unwrap();
    drop(rest);
    assert_eq!(receive(&mut last).await.answers.len(), 1);
}

#[test]
fn the_configuration_has_defaults_and_refuses_what_it_does_not_know() {
    let parse = |text: &str| toml::from_str::<DnsConfig>(text).map_err(|error| error.to_string());
    assert_eq!(parse("").unwrap(), DnsConfig::default());
    assert_eq!(parse("domain = \"mesh.corp\"").unwrap().domain, Zone::new("mesh.corp").unwrap());
    assert!(parse("domian = \"x\"").unwrap_err().contains("unknown field `domian`"));
    assert!(parse("domain = \"a b\"").unwrap_err().contains("is not a domain"));
}
