//! Bulk download.

use std::time::{Duration, Instant};

use anyhow::Result;
use meshd_tests::load::BulkReport;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::client::{self, Failure, content_length, head_end};

const CONNECT_LIMIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// host:port
    #[arg(long)]
    target: String,
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Bytes in all
    #[arg(long, default_value_t = 1 << 30)]
    bytes: usize,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let target = client::resolve(&args.target).await?;
    let start = Instant::now();
    let mut downloads = JoinSet::new();
    for _ in 0..args.connections {
        downloads.spawn_local(download(target, args.bytes / args.connections));
    }
    let mut report = BulkReport::default();
    while let Some(done) = downloads.join_next().await {
        match done? {
            Ok(bytes) => report.bytes += bytes,
            Err(_) => report.failed += 1,
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    report.gbit_per_second = report.bytes as f64 * 8.0 / 1e9 / report.seconds;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

async fn download(target: std::net::SocketAddr, bytes: usize) -> Result<u64, Failure> {
    let mut stream = client::connect(target, CONNECT_LIMIT).await?;
    let request = format!("GET /bytes/{bytes} HTTP/1.1\r\nHost: bulk\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|_| "reset")?;
    let mut buffer = vec![0; 256 * 1024];
    let (mut read, mut whole) = (0_u64, None);
    loop {
        let count = stream.read(&mut buffer).await.map_err(|_| "reset")?;
        read += count as u64;
        if whole.is_none()
            && let Some(end) = head_end(&buffer[..count])
        {
            let length = content_length(&String::from_utf8_lossy(&buffer[..end])).ok_or("bad_answer")?;
            whole = Some((end + length) as u64);
        }
        match whole {
            Some(whole) if read >= whole => return Ok(bytes as u64),
            _ if count == 0 => return Err("closed"),
            _ => {}
        }
    }
}
