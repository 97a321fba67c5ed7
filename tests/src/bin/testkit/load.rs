//! Request load.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use meshd_tests::load::LoadReport;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::{JoinSet, spawn_local};

use crate::Stop;
use crate::client::{self, Failure};
use crate::pace::Pace;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// host:port
    #[arg(long)]
    target: String,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// A new connection for every request
    #[arg(long)]
    per_request: bool,
    /// Requests per second, started when due however slow the answers are
    #[arg(long)]
    rate: Option<u32>,
    #[arg(long, default_value_t = 1024)]
    size: usize,
    /// Seconds
    #[arg(long)]
    duration: Option<f64>,
    #[arg(long)]
    requests: Option<u64>,
    #[arg(long, default_value_t = 10_000)]
    timeout_ms: u64,
}

struct Load {
    target: SocketAddr,
    request: Vec<u8>,
    limit: Duration,
    left: Cell<u64>,
    per_request: bool,
    stop: Rc<Stop>,
    report: RefCell<LoadReport>,
    latencies: RefCell<Vec<u32>>,
}

pub(crate) async fn run(args: Args, stop: Rc<Stop>) -> Result<()> {
    ensure!(args.connections > 0, "--connections must be at least 1");
    let load = Rc::new(Load {
        target: client::resolve(&args.target).await?,
        request: client::request(args.size, &args.target, !args.per_request),
        limit: Duration::from_millis(args.timeout_ms),
        left: Cell::new(args.requests.unwrap_or(u64::MAX)),
        per_request: args.per_request,
        stop: stop.clone(),
        report: RefCell::default(),
        latencies: RefCell::default(),
    });
    println!("load ready");
    if let Some(seconds) = args.duration {
        let stop = stop.clone();
        spawn_local(async move {
            tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
            stop.raise();
        });
    }
    let start = Instant::now();
    let pace = args.rate.map(Pace::start);
    let mut workers = JoinSet::new();
    for _ in 0..args.connections {
        let (load, pace) = (load.clone(), pace.clone());
        workers.spawn_local(async move {
            match pace {
                Some(pace) => load.at_rate(&pace).await,
                None if args.per_request => load.one_connection_per_request().await,
                None => load.keep_alive().await,
            }
        });
    }
    while workers.join_next().await.is_some() {}
    println!("{}", serde_json::to_string(&load.finish(start.elapsed()))?);
    Ok(())
}

impl Load {
    /// Whether there is one more request to make; takes it.
    fn take(&self) -> bool {
        let left = self.left.get();
        if left == 0 || self.stop.is_raised() {
            return false;
        }
        self.left.set(left - 1);
        true
    }

    async fn keep_alive(&self) {
        let (mut stream, mut buffer) = (None, Vec::with_capacity(8192));
        while self.take() {
            let start = Instant::now();
            let result = self.on(&mut stream, &mut buffer).await;
            self.count(start, result);
        }
    }

    async fn at_rate(&self, pace: &Pace) {
        let (mut stream, mut buffer) = (None, Vec::with_capacity(8192));
        while let Some(due) = pace.next().await {
            if !self.take() {
                return;
            }
            let result = self.on(&mut stream, &mut buffer).await;
            self.count(due, result);
            if self.per_request {
                self.see_closed(stream.take(), &mut buffer).await;
            }
        }
    }

    async fn one_connection_per_request(&self) {
        let mut buffer = Vec::with_capacity(8192);
        while self.take() {
            let (start, mut stream) = (Instant::now(), None);
            let result = self.on(&mut stream, &mut buffer).await;
            self.count(start, result);
            self.see_closed(stream, &mut buffer).await;
        }
    }

    /// The server closes first, so that its side keeps the port; the answer was complete before that.
    async fn see_closed(&self, stream: Option<TcpStream>, buffer: &mut Vec<u8>) {
        if let Some(mut stream) = stream {
            let _ = tokio::time::timeout(self.limit, stream.read_buf(buffer)).await;
        }
    }

    /// One request on `stream`, connecting it when there is none; a failed one is not used again.
    async fn on(&self, stream: &mut Option<TcpStream>, buffer: &mut Vec<u8>) -> Result<(), Failure> {
        let mut connected = match stream.take() {
            Some(connected) => connected,
            None => client::connect(self.target, self.limit).await?,
        };
        client::exchange(&mut connected, &self.request, buffer, self.limit).await?;
        *stream = Some(connected);
        Ok(())
    }

    fn count(&self, start: Instant, result: Result<(), Failure>) {
        let mut report = self.report.borrow_mut();
        match result {
            Ok(()) => {
                report.ok += 1;
                let micros = u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX);
                self.latencies.borrow_mut().push(micros);
            }
            Err(kind) => {
                report.failed += 1;
                *report.errors.entry(kind.to_owned()).or_default() += 1;
            }
        }
    }

    fn finish(&self, took: Duration) -> LoadReport {
        let mut latencies = self.latencies.borrow_mut();
        latencies.sort_unstable();
        let mut report = self.report.borrow().clone();
        report.seconds = took.as_secs_f64();
        report.requests_per_second = report.ok as f64 / report.seconds;
        report.p50_us = quantile(&latencies, 50);
        report.p99_us = quantile(&latencies, 99);
        report.max_us = quantile(&latencies, 100);
        report
    }
}

/// Nearest rank.
fn quantile(sorted: &[u32], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let sorted: Vec<u32> = (1..=200).collect();
        assert_eq!((quantile(&sorted, 50), quantile(&sorted, 99), quantile(&sorted, 100)), (100, 198, 200));
        assert_eq!(quantile(&[], 99), 0);
    }
}
