//! The one connection of a host: what goes over it, and when it is left.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use meshd_pki_client::{Credentials, Tokens};
use rusqlite::Connection;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::support::{Host, Lab, eventually, workload};

const LEAF_S: u64 = 24 * 3600;
/// For so long another process keeps the PKI from writing; it would wait for 5 s.
const BUSY: Duration = Duration::from_secs(3);

/// Forwards connections to the PKI, until it forgets those it has: then they stay open, and nothing comes through.
struct Relay {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    forget: watch::Sender<()>,
    _forwarding: JoinSet<()>,
}

impl Relay {
    async fn to(pki: String) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (connections, forget) = (Arc::new(AtomicUsize::new(0)), watch::Sender::new(()));
        let (counted, forgotten) = (connections.clone(), forget.clone());
        let mut forwarding = JoinSet::new();
        forwarding.spawn(async move {
            let mut each = JoinSet::new();
            loop {
                let (mut host, _) = listener.accept().await.unwrap();
                counted.fetch_add(1, SeqCst);
                let (pki, mut forgotten) = (pki.clone(), forgotten.subscribe());
                each.spawn(async move {
                    let mut server = TcpStream::connect(pki).await.unwrap();
                    tokio::select! {
                        _ = copy_bidirectional(&mut host, &mut server) => {}
                        _ = forgotten.changed() => std::future::pending().await,
                    }
                });
            }
        });
        Relay { address, connections, forget, _forwarding: forwarding }
    }

    fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

#[tokio::test]
async fn renewals_and_tokens_go_over_the_connection_of_the_conversation() {
    let (mut lab, pay) = (Lab::start().await, workload("pay"));
    let relay = Relay::to(lab.address()).await;
    lab.lead_by(relay.address).await;
    lab.join("web", &[&pay]).await.unwrap();
    let joining = relay.connections();
    let (mut host, line) = lab.host_and_line("web");
    eventually("a conversation", || host.metrics.is_connected()).await;
    assert_eq!(relay.connections(), joining + 1);

    host.want(&[&pay]);
    host.until(|held| held.workloads.contains_key(&pay)).await;
    let tokens = Arc::new(Tokens::new(host.credentials.clone(), line));
    tokens.issue(&pay, &["api".to_owned()]).await.unwrap();
    assert_eq!(relay.connections(), joining + 1);
}

/// A host that joined through a relay and has a conversation.
async fn joined_by_relay() -> (Lab, Relay, Credentials, Host) {
    let mut lab = Lab::start().await;
    let relay = Relay::to(lab.address()).await;
    lab.lead_by(relay.address).await;
    let joined = lab.join("web", &[]).await.unwrap();
    let host = lab.host("web");
    eventually("a conversation", || host.metrics.is_connected()).await;
    (lab, relay, joined, host)
}

#[tokio::test]
async fn a_connection_that_died_without_a_word_is_left_for_another_while_the_certificate_lasts() {
    let (lab, relay, joined, mut host) = joined_by_relay().await;

    let before = relay.connections();
    relay.forget.send_replace(());
    // So close to the end that it waits for a second only, and long before a report would have found it out.
    lab.pass(LEAF_S - 4);
    host.want(&[]);
    host.until(|held| held.host.serial != joined.host.serial).await;
    assert!(relay.connections() > before);
    assert_eq!(host.metrics.readmissions(), 0, "it did not have to come back");
}

#[tokio::test]
async fn a_busy_server_that_lives_is_waited_for_over_the_same_connection() {
    let (lab, relay, joined, mut host) = joined_by_relay().await;

    let before = relay.connections();
    // Doubted after 2 s, a quarter of what is left.
    lab.pass(LEAF_S - 8);
    let writing = Connection::open(lab.state().join("pki.db")).unwrap();
    writing.execute_batch("BEGIN IMMEDIATE").unwrap();
    host.want(&[]);
    sleep(BUSY).await;
    assert_eq!((relay.connections(), &host.now().host.serial), (before, &joined.host.serial));
    writing.execute_batch("ROLLBACK").unwrap();
    host.until(|held| held.host.serial != joined.host.serial).await;
}
