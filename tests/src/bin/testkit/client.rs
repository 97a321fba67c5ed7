//! What every client does: resolve, connect, ask, read one answer, and name what went wrong.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

pub(crate) static CHUNK: [u8; 65536] = [b'x'; 65536];

/// Why a request failed, in the words of the report.
pub(crate) type Failure = &'static str;

pub(crate) async fn resolve(target: &str) -> Result<SocketAddr> {
    let mut found = lookup_host(target).await.with_context(|| format!("cannot resolve {target}"))?;
    found.next().with_context(|| format!("{target} has no address"))
}

pub(crate) async fn connect(target: SocketAddr, limit: Duration) -> Result<TcpStream, Failure> {
    let stream = match timeout(limit, TcpStream::connect(target)).await {
        Err(_) => return Err("connect_timeout"),
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => return Err("connect_refused"),
        Ok(Err(error)) => return Err(name(&error)),
        Ok(Ok(stream)) => stream,
    };
    stream.set_nodelay(true).map_err(|error| name(&error))?;
    Ok(stream)
}

/// A request asking for `size` bytes, with as many in its own body.
pub(crate) fn request(size: usize, host: &str, keep_alive: bool) -> Vec<u8> {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let head = format!(
        "POST /bytes/{size} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\nContent-Length: {size}\r\n\r\n"
    );
    let mut request = head.into_bytes();
    request.resize(request.len() + size, b'x');
    request
}

/// Sends a request and reads its whole answer.
pub(crate) async fn exchange(
    stream: &mut TcpStream,
    request: &[u8],
    buffer: &mut Vec<u8>,
    limit: Duration,
) -> Result<(), Failure> {
    timeout(limit, ask(stream, request, buffer)).await.unwrap_or(Err("timeout"))
}

async fn ask(stream: &mut TcpStream, request: &[u8], buffer: &mut Vec<u8>) -> Result<(), Failure> {
    stream.write_all(request).await.map_err(|error| name(&error))?;
    buffer.clear();
    loop {
        if let Some(end) = head_end(buffer) {
            let head = String::from_utf8_lossy(&buffer[..end]);
            if !head.starts_with("HTTP/1.1 200 ") {
                return Err("bad_status");
            }
            let length = content_length(&head).ok_or("bad_answer")?;
            return read_body(stream, buffer, end + length).await;
        }
        receive(stream, buffer).await?;
    }
}

async fn read_body(stream: &mut TcpStream, buffer: &mut Vec<u8>, whole: usize) -> Result<(), Failure> {
    while buffer.len() < whole {
        receive(stream, buffer).await?;
    }
    if buffer.len() == whole { Ok(()) } else { Err("bad_answer") }
}

async fn receive(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<(), Failure> {
    match stream.read_buf(buffer).await {
        Ok(0) => Err("closed"),
        Ok(_) => Ok(()),
        Err(error) => Err(name(&error)),
    }
}

pub(crate) fn name(error: &std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset",
        ErrorKind::ConnectionRefused => "connect_refused",
        ErrorKind::TimedOut => "timeout",
        ErrorKind::AddrNotAvailable => "no_local_port",
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable",
        _ => "other",
    }
}

/// Where the head of an HTTP/1 message ends, its empty line included.
pub(crate) fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

pub(crate) fn content_length(head: &str) -> Option<usize> {
    let mut headers = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    let (_, value) = headers.find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_as_much_as_it_asks_for() {
        let request = request(1024, "payments", true);
        let end = head_end(&request).unwrap();
        let head = String::from_utf8_lossy(&request[..end]);
        assert_eq!(content_length(&head), Some(1024));
        assert_eq!(request.len(), end + 1024);
    }
}
