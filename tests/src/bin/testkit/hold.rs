//! Connections that stay: idle ones, and ones whose reader stopped.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::Stop;
use crate::client;

const LIMIT: Duration = Duration::from_secs(30);
/// Opened at a time: more would measure the accept queue.
const AT_ONCE: usize = 64;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// host:port
    #[arg(long)]
    target: String,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Bytes each asks for
    #[arg(long, default_value_t = 1)]
    size: usize,
}

pub(crate) async fn idle(args: Args, stop: Rc<Stop>) -> Result<()> {
    let target = client::resolve(&args.target).await?;
    let request: Rc<[u8]> = client::request(args.size, &args.target, true).into();
    let (mut opening, mut open, mut left) = (JoinSet::new(), Vec::with_capacity(args.connections), args.connections);
    while left > 0 || !opening.is_empty() {
        while left > 0 && opening.len() < AT_ONCE {
            opening.spawn_local(open_one(target, request.clone()));
            left -= 1;
        }
        if let Some(Ok(Ok(stream))) = opening.join_next().await {
            open.push(stream);
        }
    }
    ensure!(open.len() == args.connections, "only {} of {} connections came to be", open.len(), args.connections);
    println!("idle ready: {} connections", open.len());
    stop.raised().await;
    Ok(())
}

async fn open_one(target: SocketAddr, request: Rc<[u8]>) -> Result<TcpStream, client::Failure> {
    let mut stream = client::connect(target, LIMIT).await?;
    client::exchange(&mut stream, &request, &mut Vec::new(), LIMIT).await?;
    Ok(stream)
}

pub(crate) async fn stall(args: Args, stop: Rc<Stop>) -> Result<()> {
    let target = client::resolve(&args.target).await?;
    let request = format!("GET /bytes/{} HTTP/1.1\r\nHost: stall\r\n\r\n", args.size);
    let mut open = Vec::new();
    for _ in 0..args.connections {
        let connected = client::connect(target, LIMIT).await;
        let mut stream = connected.map_err(|kind| anyhow::anyhow!("cannot connect: {kind}"))?;
        stream.write_all(request.as_bytes()).await?;
        open.push(stream);
    }
    // The answer has begun to arrive everywhere, so each stream is really open to its end.
    for stream in &open {
        stream.readable().await?;
    }
    println!("stall ready: {} connections", open.len());
    stop.raised().await;
    Ok(())
}
