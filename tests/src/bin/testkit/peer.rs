//! A server that tells callers who it thinks they are.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::spawn_local;

use crate::{client, serve};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    listen: String,
    /// Refuse connections that do not begin with a PROXY header of version 2
    #[arg(long)]
    proxy_header: bool,
}

pub(crate) async fn run(Args { listen, proxy_header }: Args) -> Result<()> {
    let listener = serve::bind(&listen).await?;
    loop {
        let (stream, peer) = listener.accept().await?;
        spawn_local(async move {
            if let Err(error) = answer(stream, peer, proxy_header).await {
                eprintln!("{peer}: {error:#}");
            }
        });
    }
}

async fn answer(mut stream: TcpStream, peer: SocketAddr, proxy_header: bool) -> Result<()> {
    let mut who = format!("from {}", peer.ip().to_canonical());
    if proxy_header {
        let Header { source, destination, spiffe_id } = read_header(&mut stream).await?;
        who += &format!(" for {} to {destination} as {spiffe_id}", source.ip());
    }
    let mut head = Vec::new();
    while client::head_end(&head).is_none() {
        ensure!(stream.read_buf(&mut head).await? > 0, "no request");
    }
    let answer = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{who}\n", who.len() + 1);
    stream.write_all(answer.as_bytes()).await?;
    Ok(stream.shutdown().await?)
}

struct Header {
    source: SocketAddr,
    destination: SocketAddr,
    spiffe_id: String,
}

/// PROXY protocol 2.2, written from the specification and not from what meshd sends.
async fn read_header(stream: &mut TcpStream) -> Result<Header> {
    let mut fixed = [0; 16];
    stream.read_exact(&mut fixed).await.context("no PROXY header")?;
    ensure!(fixed[..12] == *b"\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A", "not a PROXY header");
    ensure!(fixed[12] == 0x21, "version and command are {:#x}", fixed[12]);
    let mut rest = vec![0; usize::from(u16::from_be_bytes([fixed[14], fixed[15]]))];
    stream.read_exact(&mut rest).await.context("the PROXY header ends early")?;
    let size = match fixed[13] {
        0x11 => 4,
        0x21 => 16,
        other => bail!("address family {other:#x}"),
    };
    ensure!(rest.len() >= 2 * size + 4, "no room for addresses");
    let (addresses, vectors) = rest.split_at(2 * size + 4);
    let port = |at: usize| u16::from_be_bytes([addresses[at], addresses[at + 1]]);
    let source = SocketAddr::new(ip(&addresses[..size])?, port(2 * size));
    let destination = SocketAddr::new(ip(&addresses[size..2 * size])?, port(2 * size + 2));
    let spiffe_id = vector(vectors, 0xD0).context("no SPIFFE ID in it")?;
    Ok(Header { source, destination, spiffe_id })
}

fn ip(bytes: &[u8]) -> Result<IpAddr> {
    Ok(match bytes.len() {
        4 => Ipv4Addr::from(<[u8; 4]>::try_from(bytes)?).into(),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(bytes)?).into(),
    })
}

/// The value of one type-length-value triple.
fn vector(mut vectors: &[u8], kind: u8) -> Option<String> {
    while let [found, high, low, rest @ ..] = vectors {
        let (value, next) = rest.split_at_checked(usize::from(u16::from_be_bytes([*high, *low])))?;
        if *found == kind {
            return String::from_utf8(value.to_vec()).ok();
        }
        vectors = next;
    }
    None
}
