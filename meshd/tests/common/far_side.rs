//! The far side of a connection, played by the test: shows whatever certificate and says whatever it is told to.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Connection, SendResponse};
use http::{Request, Response};
use meshd_pki_client::Svid;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::within;

pub(crate) struct FarSide {
    listener: TcpListener,
    config: Arc<ServerConfig>,
}

impl FarSide {
    pub(crate) async fn new(shown: &Svid, alpn: &[&[u8]]) -> FarSide {
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(shown.chain.clone(), shown.key.clone_key())
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|token| token.to_vec()).collect();
        FarSide { listener: TcpListener::bind("127.0.0.1:0").await.unwrap(), config: Arc::new(config) }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub(crate) async fn tls(&self) -> io::Result<TlsStream<TcpStream>> {
        let (socket, _) = within("a connection to the far side", self.listener.accept()).await?;
        TlsAcceptor::from(self.config.clone()).accept(socket).await
    }

    pub(crate) async fn connection(&self) -> Connection<TlsStream<TcpStream>, Bytes> {
        h2::server::handshake(self.tls().await.unwrap()).await.unwrap()
    }

    /// Says goodbye on the next connection before it answers anything, and reads until the dialler has gone.
    pub(crate) async fn leave(&self) {
        const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let mut stream = self.tls().await.unwrap();
        stream.write_all(&[&SETTINGS[..], &GOAWAY].concat()).await.unwrap();
        // However it ends.
        _ = stream.read_to_end(&mut Vec::new()).await;
    }
}

impl FarSide {
    /// Takes the first bytes of a stream on the next connection, and leaves in order without having looked at it: the
    /// last GOAWAY, TLS close_notify and the end arrive together.
    pub(crate) async fn leave_during_a_stream(&self) {
        const SETTINGS: [u8; 18] = [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0];
        const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        const PREFACE: usize = 24;
        let mut stream = self.tls().await.unwrap();
        stream.write_all(&SETTINGS).await.unwrap();
        stream.read_exact(&mut [0; PREFACE]).await.unwrap();
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            stream.read_exact(&mut payload).await.unwrap();
            match (head[3], head[4]) {
                // DATA
                (0, _) => break,
                // PING, not an answer to one
                (6, 0) => {
                    stream.write_all(&[&[0, 0, 8, 6, 1, 0, 0, 0, 0], &payload[..]].concat()).await.unwrap();
                }
                _ => {}
            }
        }
        stream.write_all(&GOAWAY).await.unwrap();
        stream.shutdown().await.unwrap();
        _ = stream.read_to_end(&mut Vec::new()).await;
    }
}

/// What the far side does with a stream it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    Echo,
    /// Refuses it unseen.
    Refuse,
    /// Looks at the first bytes, and refuses all the same.
    RefuseAfterBytes,
    /// Takes the first bytes, then breaks the whole connection.
    BreakAfterBytes,
}

/// Serves streams of one connection, one after the other, each as told; gives all bytes it got.
pub(crate) async fn react(far: FarSide, reactions: &[Reaction]) -> Vec<u8> {
    let mut got = Vec::new();
    let mut connection = far.connection().await;
    for reaction in reactions {
        let (request, respond) = connection.accept().await.unwrap().unwrap();
        let mut connection_moves = async || while connection.accept().await.is_some() {};
        tokio::select! {
            bytes = stream(*reaction, request, respond) => got.extend(bytes),
            () = connection_moves() => panic!("the connection ended during a stream"),
        }
    }
    if !reactions.contains(&Reaction::BreakAfterBytes) {
        while connection.accept().await.is_some() {}
    }
    got
}

async fn stream(reaction: Reaction, request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Vec<u8> {
    let mut body = request.into_body();
    match reaction {
        Reaction::Refuse => {
            respond.send_reset(h2::Reason::REFUSED_STREAM);
            Vec::new()
        }
        Reaction::RefuseAfterBytes => {
            body.data().await.unwrap().unwrap();
            respond.send_reset(h2::Reason::REFUSED_STREAM);
            Vec::new()
        }
        Reaction::BreakAfterBytes => body.data().await.unwrap().unwrap().to_vec(),
        Reaction::Echo => {
            let mut send = respond.send_response(Response::new(()), false).unwrap();
            while let Some(data) = body.data().await {
                send.send_data(data.unwrap(), false).unwrap();
            }
            send.send_data(Bytes::new(), true).unwrap();
            Vec::new()
        }
    }
}
