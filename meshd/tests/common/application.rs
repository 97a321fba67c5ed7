//! Applications behind the mesh: plain TCP servers the test plays by hand, or that echo.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::within;

pub(crate) struct Application(TcpListener);

impl Application {
    pub(crate) async fn start() -> Application {
        Application(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    /// Repeats what it hears and ends when its caller does.
    pub(crate) async fn echo() -> SocketAddr {
        let application = Application::start().await;
        let address = application.address();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = application.0.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = socket.split();
                    // What breaks here is seen at the other end.
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                    let _ = write.shutdown().await;
                });
            }
        });
        address
    }

    /// An address that refuses connections for as long as the returned socket is kept.
    pub(crate) fn closed() -> (TcpSocket, SocketAddr) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        (socket, address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Whether somebody has connected and waits to be accepted.
    pub(crate) async fn is_wanted(&self) -> bool {
        let ready = self.0.accept();
        tokio::select! {
            biased;
            accepted = ready => accepted.is_ok(),
            () = tokio::task::yield_now() => false,
        }
    }

    pub(crate) async fn accept(&self) -> Connection {
        Connection(within("a connection to the application", self.0.accept()).await.unwrap().0)
    }
}

/// One end of an application's connection.
pub(crate) struct Connection(TcpStream);

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Connection {
        Connection(within("a connection", TcpStream::connect(address)).await.unwrap())
    }

    pub(crate) async fn say(&mut self, text: &[u8]) {
        within("the other side to take bytes", self.0.write_all(text)).await.unwrap();
    }

    pub(crate) async fn hear(&mut self, count: usize) -> Vec<u8> {
        let mut heard = vec![0; count];
        within("bytes", self.0.read_exact(&mut heard)).await.unwrap();
        heard
    }

    pub(crate) async fn finish(&mut self) {
        self.0.shutdown().await.unwrap();
    }

    /// How the other side's bytes end; whatever is left of them is dropped.
    pub(crate) async fn ending(&mut self) -> io::Result<()> {
        let mut rest = Vec::new();
        within("the other side to end", self.0.read_to_end(&mut rest)).await.map(|_| ())
    }

    /// Closes with a reset.
    pub(crate) fn abort(self) {
        SockRef::from(&self.0).set_linger(Some(Duration::ZERO)).unwrap();
    }
}

/// Waits for a clean end.
pub(crate) async fn end_of(connection: &mut Connection) {
    connection.ending().await.expect("a clean end, not a reset");
}

/// A connection that is reset at once, or as soon as it is there.
pub(crate) async fn reset_by(address: SocketAddr) {
    match within("a connection", TcpStream::connect(address)).await {
        Ok(socket) => reset_of(&mut Connection(socket)).await,
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

/// Waits for a reset.
pub(crate) async fn reset_of(connection: &mut Connection) {
    let error = connection.ending().await.expect_err("a reset, not a clean end");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}
