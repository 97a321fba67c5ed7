//! Lines that come back as they were sent, on a connection whose server speaks first.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::client::{self, Failure, name};

pub(crate) struct Lines {
    stream: BufReader<TcpStream>,
    limit: Duration,
    said: u64,
}

impl Lines {
    pub(crate) async fn open(target: SocketAddr, limit: Duration) -> Result<Self, Failure> {
        let mut stream = BufReader::new(client::connect(target, limit).await?);
        let mut greeting = String::new();
        match timeout(limit, stream.read_line(&mut greeting)).await {
            Err(_) => Err("timeout"),
            Ok(Err(error)) => Err(name(&error)),
            Ok(Ok(0)) => Err("closed"),
            Ok(Ok(_)) if !greeting.starts_with("220 ") => Err("bad_answer"),
            Ok(Ok(_)) => Ok(Self { stream, limit, said: 0 }),
        }
    }

    /// A line like no other on this connection: what was lost, repeated or mixed up shows.
    pub(crate) async fn exchange(&mut self, size: usize) -> Result<(), Failure> {
        self.said += 1;
        let line = format!("{:<size$}\r\n", format!("line {}", self.said));
        let echo = async {
            self.stream.get_mut().write_all(line.as_bytes()).await.map_err(|error| name(&error))?;
            let mut heard = Vec::with_capacity(line.len());
            self.stream.read_until(b'\n', &mut heard).await.map_err(|error| name(&error))?;
            if heard.is_empty() {
                return Err("closed");
            }
            if heard == line.as_bytes() { Ok(()) } else { Err("bad_answer") }
        };
        timeout(self.limit, echo).await.unwrap_or(Err("timeout"))
    }

    /// Ends this direction; the other has a last line, and then its end.
    pub(crate) async fn end(mut self) -> Result<(), Failure> {
        let mut last = String::new();
        let ending = async {
            self.stream.get_mut().shutdown().await.map_err(|error| name(&error))?;
            self.stream.read_to_string(&mut last).await.map_err(|error| name(&error))
        };
        timeout(self.limit, ending).await.unwrap_or(Err("timeout"))?;
        if last.starts_with("221 ") { Ok(()) } else { Err("bad_answer") }
    }
}
