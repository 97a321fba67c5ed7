//! Fills a discovery backend with services, follows it as many hosts at once, and changes it at a steady rate: how long
//! each host takes until its next connection would use a change, and what following costs. Ends with an error when a
//! host does not end up with what was written.

mod first;
mod http;
mod measure;
mod watchers;
mod write;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use meshd_discovery::SourceConfig;
use meshd_identity::TrustDomain;
use serde::Deserialize;
use serde_json::json;
use tokio::runtime;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::measure::{Usage, resident_kib};
use crate::watchers::Watchers;
use crate::write::{Writer, WriterConfig};

#[derive(Debug, Parser)]
struct Args {
    /// TOML with the `[source]` of each host and the `[writer]` of the backend
    config: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Many hosts in this process
    Follow(Follow),
    /// The host this runs on, by the connections of a program in its mesh
    First(first::First),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Follow {
    #[arg(long, default_value_t = 1000)]
    services: usize,
    /// Of each service
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    #[arg(long, default_value_t = 200)]
    hosts: usize,
    /// Services that each host imports; 0: all of them by a pattern
    #[arg(long, default_value_t = 50)]
    imports: usize,
    /// Changes a second
    #[arg(long, default_value_t = 100)]
    rate: u32,
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// An earlier run left the services there: they are followed, and not changed
    #[arg(long)]
    filled: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    source: SourceConfig,
    writer: WriterConfig,
}

fn main() -> Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::ERROR).init();
    let args = Args::parse();
    let text = std::fs::read_to_string(&args.config).with_context(|| args.config.display().to_string())?;
    let config: Config = toml::from_str(&text).with_context(|| args.config.display().to_string())?;
    // A thread of its own: what writing costs is not what following costs.
    let writing =
        runtime::Builder::new_multi_thread().worker_threads(1).thread_name(measure::WRITER).enable_all().build()?;
    let following = runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = match args.what {
        What::Follow(args) => following.block_on(run(&args, config, writing.handle().clone()))?,
        What::First(args) => following.block_on(first::measure(&args, config.writer))?,
    };
    println!("{report}");
    // Nobody waits for the blocking queries under way.
    writing.shutdown_background();
    following.shutdown_background();
    Ok(())
}

async fn run(args: &Follow, config: Config, writing: runtime::Handle) -> Result<serde_json::Value> {
    let mut writer = Writer::open(&config.writer)?;
    if !args.filled {
        let (services, endpoints) = (args.services, args.endpoints);
        let filled = writing.spawn(async move {
            writer.fill(services, endpoints).await?;
            anyhow::Ok(writer)
        });
        writer = filled.await??;
    }

    let empty = resident_kib()?;
    let trust_domain: TrustDomain = "scale.example".parse()?;
    let began = Instant::now();
    let watchers = Watchers::start(args, &config.source, &trust_domain, writer.board()).await?;
    let first = began.elapsed() / u32::try_from(args.hosts)?;
    // What only reading all at once needed is given back.
    sleep(Duration::from_secs(2)).await;
    let full = resident_kib()?;
    let mut report = json!({
        "backend": config.source.name(),
        "services": args.services, "endpoints": args.endpoints, "hosts": args.hosts, "imports": args.imports,
        "first_ms": round(first.as_secs_f64() * 1000.0),
        "resident_mib": full / 1024,
        "bytes_per_endpoint": full.saturating_sub(empty) * 1024 / watchers.endpoints_held() as u64,
    });
    if !args.filled {
        let changed = change(args, writer, &watchers, &writing).await?;
        report.as_object_mut().context("no object")?.extend(changed);
    }
    Ok(report)
}

/// Changes the backend at the rate asked for, and waits until every host knows.
async fn change(
    args: &Follow,
    mut writer: Writer,
    watchers: &Watchers,
    writing: &runtime::Handle,
) -> Result<serde_json::Map<String, serde_json::Value>> {
    let (rate, changes) = (args.rate, args.rate * args.seconds);
    println!("changing");
    let before = Usage::now()?;
    let changed = writing.spawn(async move {
        let mut lanes = writer.begin();
        // A change that waits for one before it is late from when it was due.
        let mut pace = interval(Duration::from_secs(1) / rate);
        pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut changed = Vec::new();
        for _ in 0..changes {
            let due = pace.tick().await;
            changed.push(writer.change(due.into_std()).await);
        }
        drop(writer);
        while let Some(lane) = lanes.join_next().await {
            lane??;
        }
        anyhow::Ok(changed)
    });
    let began = Instant::now();
    let changed = changed.await??;
    let took = began.elapsed();
    let usage = Usage::now()?.since(&before);
    watchers.wait_until_right().await?;
    let delays = watchers.delays();
    let report = json!({
        "changes_per_s": round(f64::from(changes) / took.as_secs_f64()),
        "told": changed.iter().map(|service| watchers.concerned(*service)).sum::<usize>(),
        "seen": delays.len(),
        "p50_ms": round(quantile(&delays, 0.50)), "p99_ms": round(quantile(&delays, 0.99)),
        "last_ms": round(quantile(&delays, 1.0)),
        "following_cpu_percent": round(usage.follower_seconds / took.as_secs_f64() * 100.0),
    });
    Ok(report.as_object().context("no object")?.clone())
}

pub(crate) fn round(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

/// In milliseconds; of delays in order.
pub(crate) fn quantile(delays: &[Duration], share: f64) -> f64 {
    let index = ((delays.len() as f64 - 1.0) * share).max(0.0).round() as usize;
    delays.get(index).map_or(f64::NAN, |delay| delay.as_secs_f64() * 1000.0)
}
