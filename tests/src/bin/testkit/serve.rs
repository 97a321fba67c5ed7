//! The servers.

use std::rc::Rc;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;

use crate::client::{CHUNK, content_length, head_end};
use crate::http2;

#[derive(clap::Args)]
pub(crate) struct Listen {
    #[arg(long)]
    listen: String,
    #[arg(long, default_value = "testkit")]
    name: String,
}

pub(crate) async fn echo_http(Listen { listen, name }: Listen) -> Result<()> {
    let listener = bind(&listen).await?;
    let name = Rc::<str>::from(format!("{name}\n"));
    loop {
        let (stream, _) = listener.accept().await?;
        // A client that went away is not the server's concern.
        spawn_local(answer_requests(stream, name.clone()));
    }
}

pub(crate) async fn greeter(Listen { listen, name }: Listen) -> Result<()> {
    let listener = bind(&listen).await?;
    let name = Rc::<str>::from(name);
    loop {
        let (stream, _) = listener.accept().await?;
        spawn_local(greet(stream, name.clone()));
    }
}

pub(crate) async fn bind(address: &str) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    println!("ready on {address}");
    Ok(listener)
}

async fn greet(stream: TcpStream, name: Rc<str>) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    write.write_all(format!("220 {name} ready\r\n").as_bytes()).await?;
    let (mut read, mut line) = (BufReader::new(read), Vec::new());
    while read.read_until(b'\n', &mut line).await? > 0 {
        write.write_all(&line).await?;
        line.clear();
    }
    write.write_all(format!("221 {name} bye\r\n").as_bytes()).await?;
    write.shutdown().await
}

async fn answer_requests(mut stream: TcpStream, name: Rc<str>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let Some(end) = read_head(&mut stream, &mut buffer).await? else { return Ok(()) };
        if http2::begins(&buffer[..end]) {
            return http2::serve(stream, buffer, name).await.map_err(std::io::Error::other);
        }
        let request = Request::of(&buffer[..end]);
        while buffer.len() < end + request.body {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        buffer.drain(..end + request.body);
        answer(&mut stream, &request, &name).await?;
        if request.close {
            return stream.shutdown().await;
        }
    }
}

/// The length of the request head, or None at the end of the stream.
async fn read_head(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<Option<usize>> {
    loop {
        if let Some(end) = head_end(buffer) {
            return Ok(Some(end));
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// `/bytes/N` asks for N; anything else for the name.
pub(crate) fn bytes_asked(path: &str) -> Option<usize> {
    path.strip_prefix("/bytes/").and_then(|count| count.parse().ok())
}

struct Request {
    bytes: Option<usize>,
    body: usize,
    close: bool,
}

impl Request {
    fn of(head: &[u8]) -> Self {
        let head = String::from_utf8_lossy(head);
        let path = head.split(' ').nth(1).unwrap_or("/");
        Self {
            bytes: bytes_asked(path),
            body: content_length(&head).unwrap_or(0),
            close: head.contains("onnection: close") || head.contains(" HTTP/1.0\r\n"),
        }
    }
}

async fn answer(stream: &mut TcpStream, request: &Request, name: &str) -> std::io::Result<()> {
    let length = request.bytes.unwrap_or(name.len());
    let mut response = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    match request.bytes {
        None => response.extend_from_slice(name.as_bytes()),
        Some(count) if count <= 4096 => response.resize(response.len() + count, b'x'),
        Some(_) => {}
    }
    stream.write_all(&response).await?;
    let mut left = request.bytes.filter(|count| *count > 4096).unwrap_or(0);
    while left > 0 {
        let count = left.min(CHUNK.len());
        stream.write_all(&CHUNK[..count]).await?;
        left -= count;
    }
    Ok(())
}
