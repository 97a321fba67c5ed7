use proptest::prelude::*;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;

/// `example.org A`, id 0x1234, as bytes.
fn query() -> Vec<u8> {
    named(b"\x07example\x03org\x00")
}

fn named(name: &[u8]) -> Vec<u8> {
    [&[0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0], name, &[0, 1, 0, 1]].concat()
}

/// An empty answer with this code.
fn response(query: &[u8], code: u8) -> Vec<u8> {
    let mut response = query.to_vec();
    response[2] |= 0x80;
    response[3] = code;
    response
}

/// Until that many questions wait: the tasks that ask take turns on this thread.
async fn all_wait(forwarder: &Forwarder, count: usize) {
    while forwarder.waiting.available_permits() > MAX_WAITING - count {
        tokio::task::yield_now().await;
    }
}

/// A server under control: what it does to each packet is up to the test.
async fn server() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut packet = [0; 1232];
    let (length, peer) = socket.recv_from(&mut packet).await.unwrap();
    (packet[..length].to_vec(), peer)
}

fn forwarder(servers: &[SocketAddr]) -> Arc<Forwarder> {
    Arc::new(Forwarder::new(Upstreams::configured((Ipv4Addr::LOCALHOST, 53).into(), servers)))
}

async fn forward(forwarder: &Forwarder, packet: &[u8]) -> Result<Vec<u8>, Failure> {
    forwarder.forward(packet, packet.len(), Over::Udp).await
}

async fn ask(forwarder: &Forwarder) -> Result<Vec<u8>, Failure> {
    forward(forwarder, &query()).await
}

#[tokio::test]
async fn an_answer_comes_back_as_it_was_but_for_the_id() {
    let (socket, address) = server().await;
    let forwarder = forwarder(&[address]);
    let answering = async {
        let (asked, peer) = receive(&socket).await;
        assert_eq!(asked[2..], query()[2..]);
        // With TC set, which is for the client to act on.
        let mut answer = [response(&asked, 0), b"anything".to_vec()].concat();
        answer[2] |= 2;
        socket.send_to(&answer, peer).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&forwarder), answering);
    let mut expected = [response(&query(), 0), b"anything".to_vec()].concat();
    expected[2] |= 2;
    assert_eq!(answer.unwrap(), expected);
}

#[tokio::test]
async fn ids_and_ports_towards_servers_are_drawn_anew() {
    let (socket, address) = server().await;
    let forwarder = forwarder(&[address]);
    let mut ids = std::collections::BTreeSet::new();
    let mut ports = std::collections::BTreeSet::new();
    for _ in 0..16 {
        let answering = async {
            let (asked, peer) = receive(&socket).await;
            ids.insert([asked[0], asked[1]]);
            ports.insert(peer.port());
            socket.send_to(&response(&asked, 0), peer).await.unwrap();
        };
        let (answer, ()) = tokio::join!(ask(&forwarder), answering);
        answer.unwrap();
    }
    // Of 65,536 ids 16 are different but for one time in 500; 28,000 ports, one in 250.
    assert!(ids.len() >= 14 && ports.len() >= 13, "{ids:?} {ports:?}");
}

#[tokio::test]
async fn forged_answers_are_passed_over_and_the_true_one_is_taken() {
    let (socket, address) = server().await;
    let (stranger, _) = server().await;
    let forwarder = forwarder(&[address]);
    let answering = async {
        let (asked, peer) = receive(&socket).await;
        let good = response(&asked, 0);
        stranger.send_to(&response(&asked, 3), peer).await.unwrap();
        let wrong_id = [&[!asked[0], asked[1]], &good[2..]].concat();
        let mut wrong_question = good.clone();
        wrong_question[13] = b'f';
        let mut wrong_type = good.clone();
        wrong_type[26] = 28;
        let no_response = asked.clone();
        for forged in
            [&wrong_id, &wrong_question, &wrong_type, &no_response, &good[..12].to_vec(), &vec![], &vec![1; 5]]
        {
            socket.send_to(forged, peer).await.unwrap();
        }
        socket.send_to(&good, peer).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask(&forwarder), answering);
    assert_eq!(answer.unwrap()[2..4], [0x81, 0]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_costs_two_seconds_once_and_then_the_next_is_asked_first() {
    let ((silent, silent_address), (socket, address)) = (server().await, server().await);
    let forwarder = forwarder(&[silent_address, address]);
    for expected in [PER_SERVER, Duration::ZERO] {
        let before = Instant::now();
        let answering = async {
            let (asked, peer) = receive(&socket).await;
            socket.send_to(&response(&asked, 3), peer).await.unwrap();
        };
        let (answer, ()) = tokio::join!(ask(&forwarder), answering);
        assert_eq!(answer.unwrap()[3], 3);
        assert!(before.elapsed() >= expected && before.elapsed() < expected + PER_SERVER / 2, "{:?}", before.elapsed());
    }
    receive(&silent).await;
    assert!(silent.try_recv(&mut [0; 16]).is_err(), "the silent one was asked again");
}

#[tokio::test(start_paused = true)]
async fn with_only_silent_servers_the_end_comes_before_glibc_gives_up() {
    let mut sockets = Vec::new();
    for _ in 0..4 {
        sockets.push(server().await);
    }
    let addresses: Vec<SocketAddr> = sockets.iter().map(|(_, address)| *address).collect();
    let before = Instant::now();
    assert_eq!(ask(&forwarder(&addresses)).await, Err(Failure::Silent));
    assert!((ALTOGETHER..Duration::from_secs(5)).contains(&before.elapsed()), "{:?}", before.elapsed());
}

#[tokio::test]
async fn a_server_that_fails_is_passed_over_and_its_answer_kept_for_want_of_a_better() {
    for (second, expected) in [(0, 0), (3, 3), (2, 2)] {
        let ((first_socket, first), (second_socket, other)) = (server().await, server().await);
        let forwarder = forwarder(&[first, other]);
        let answering = async {
            let (asked, peer) = receive(&first_socket).await;
            first_socket.send_to(&response(&asked, 5), peer).await.unwrap();
            let (asked, peer) = receive(&second_socket).await;
            second_socket.send_to(&response(&asked, second), peer).await.unwrap();
        };
        let (answer, ()) = tokio::join!(ask(&forwarder), answering);
        assert_eq!(answer.unwrap()[3], expected);
    }
}

#[tokio::test]
async fn many_who_ask_the_same_are_one_question_and_all_get_their_own_id() {
    let (socket, address) = server().await;
    let forwarder = forwarder(&[address]);
    let mut asking = JoinSet::new();
    for id in 0..100u8 {
        let (forwarder, mut packet) = (forwarder.clone(), query());
        packet[0] = id;
        asking.spawn(async move { (id, forward(&forwarder, &packet).await.unwrap()) });
    }
    let (asked, peer) = receive(&socket).await;
    all_wait(&forwarder, 100).await;
    socket.send_to(&response(&asked, 0), peer).await.unwrap();
    while let Some(answered) = asking.join_next().await {
        let (id, answer) = answered.unwrap();
        assert_eq!(answer[..2], [id, 0x34]);
    }
    assert!(socket.try_recv(&mut [0; 16]).is_err(), "asked more than once");
    assert!(forwarder.flights.lock().is_empty());
}

#[tokio::test]
async fn the_same_question_in_ever_other_packets_is_cut_off() {
    let (_socket, address) = server().await;
    let forwarder = forwarder(&[address]);
    let question_end = query().len();
    let mut asking = JoinSet::new();
    for extra in 0..MAX_SAME_QUESTION {
        let (forwarder, packet) = (forwarder.clone(), [query(), vec![0; extra]].concat());
        asking.spawn(async move { forwarder.forward(&packet, question_end, Over::Udp).await });
    }
    all_wait(&forwarder, MAX_SAME_QUESTION).await;
    let another = [query(), vec![1]].concat();
    assert_eq!(forwarder.forward(&another, question_end, Over::Udp).await, Err(Failure::Limited));
    asking.shutdown().await;
    assert!(forwarder.flights.lock().is_empty(), "who goes away leaves nothing behind");
}

#[tokio::test]
async fn beyond_the_limit_questions_fail_at_once() {
    let (_socket, address) = server().await;
    let forwarder = forwarder(&[address]);
    let mut asking = JoinSet::new();
    for number in 0..MAX_WAITING {
        let packet = named(format!("\x04{number:04}\x00").as_bytes());
        let forwarder = forwarder.clone();
        asking.spawn(async move { forward(&forwarder, &packet).await });
    }
    all_wait(&forwarder, MAX_WAITING).await;
    assert_eq!(ask(&forwarder).await, Err(Failure::Limited));
}

#[tokio::test]
async fn over_tcp_a_question_is_asked_over_tcp() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let forwarder = forwarder(&[listener.local_addr().unwrap()]);
    let long = [response(&query(), 0), vec![7; 60_000]].concat();
    let answering = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = vec![0; 1232];
        let length = read_message(&mut stream, &mut asked).await.unwrap();
        let answer = [&asked[..2], &long[2..]].concat();
        assert_eq!(asked[2..length], query()[2..]);
        stream.write_all(&frame(&answer).unwrap()).await.unwrap();
    };
    let packet = query();
    let (answer, ()) = tokio::join!(forwarder.forward(&packet, packet.len(), Over::Tcp), answering);
    assert_eq!(answer.unwrap(), long);
}

#[test]
fn a_failure_without_the_question_is_an_answer_but_nothing_else_without_it_is() {
    let asked = query();
    let bare = |code| [&asked[..2], &[0x81, code], &[0; 8]].concat();
    assert!(answers(&asked, asked.len(), &bare(1)) && answers(&asked, asked.len(), &bare(2)));
    assert!(!answers(&asked, asked.len(), &bare(0)));
}

#[test]
fn types_differ_although_they_look_like_letters_of_another_case() {
    // HTTPS is type 65, which is `A`; `a` is 97.
    let mut asked = query();
    let end = asked.len();
    asked[end - 3] = 65;
    let mut answer = response(&asked, 0);
    assert!(answers(&asked, end, &answer));
    answer[end - 3] = 97;
    assert!(!answers(&asked, end, &answer));
}

proptest! {
    #[test]
    fn no_bytes_from_a_server_make_it_panic(packet in prop::collection::vec(any::<u8>(), 0..80)) {
        let asked = query();
        if answers(&asked, asked.len(), &packet) {
            prop_assert_eq!(&packet[..2], &asked[..2]);
        }
    }

    #[test]
    fn an_answer_in_any_case_is_one_and_any_other_id_is_none(upper in any::<bool>(), id in any::<u16>(), code in 0u8..16) {
        let asked = query();
        let mut answer = response(&asked, code);
        if upper {
            answer[HEADER..asked.len() - 4].make_ascii_uppercase();
        }
        answer[..2].copy_from_slice(&id.to_be_bytes());
        prop_assert_eq!(answers(&asked, asked.len(), &answer), id == 0x1234);
    }
}
