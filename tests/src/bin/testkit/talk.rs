//! A client of a server that speaks first.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;

use crate::client;

const LIMIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// host:port
    #[arg(long)]
    target: String,
    #[arg(long, default_value = "hello")]
    say: String,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let target = client::resolve(&args.target).await?;
    let stream = client::connect(target, LIMIT).await.map_err(|kind| anyhow!("cannot connect to {target}: {kind}"))?;
    timeout(LIMIT, talk(stream, &args.say)).await.context("the server fell silent")?
}

async fn talk(stream: tokio::net::TcpStream, say: &str) -> Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut heard = String::new();
    read.read_line(&mut heard).await.context("no greeting")?;
    write.write_all(format!("{say}\r\n").as_bytes()).await?;
    read.read_line(&mut heard).await.context("no echo")?;
    // From here on only the other direction is open.
    write.shutdown().await?;
    read.read_to_string(&mut heard).await.context("nothing after the half-close")?;
    print!("{heard}");
    Ok(())
}
