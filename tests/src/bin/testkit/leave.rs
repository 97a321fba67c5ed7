//! Clients that say something and are gone before anybody could look at them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use meshd_tests::load::LoadReport;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};

use crate::client;

const LIMIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// host:port
    #[arg(long)]
    target: String,
    #[arg(long, default_value_t = 1)]
    connections: u64,
    /// Where to connect from, also when an earlier connection from there is in TIME_WAIT.
    #[arg(long)]
    from: Option<SocketAddr>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let target = client::resolve(&args.target).await?;
    let (mut report, start) = (LoadReport::default(), Instant::now());
    for _ in 0..args.connections {
        let connected = match args.from {
            Some(from) => connect_from(from, target).await.map_err(|_| "connect_from"),
            None => client::connect(target, LIMIT).await,
        };
        match connected {
            Ok(mut stream) => {
                // Refused already or not: a client like this never learns.
                let _ = stream.write_all(b"bye\n").await;
                report.ok += 1;
            }
            Err(kind) => {
                report.failed += 1;
                *report.errors.entry(kind.to_owned()).or_default() += 1;
            }
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

async fn connect_from(from: SocketAddr, target: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(from)?;
    socket.connect(target).await
}
