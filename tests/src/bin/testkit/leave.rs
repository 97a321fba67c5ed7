//! Clients that say something and are gone before anybody could look at them.

use std::time::{Duration, Instant};

use anyhow::Result;
use meshd_tests::load::LoadReport;
use tokio::io::AsyncWriteExt;

use crate::client;

const LIMIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// host:port
    #[arg(long)]
    target: String,
    #[arg(long, default_value_t = 1)]
    connections: u64,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let target = client::resolve(&args.target).await?;
    let (mut report, start) = (LoadReport::default(), Instant::now());
    for _ in 0..args.connections {
        match client::connect(target, LIMIT).await {
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
