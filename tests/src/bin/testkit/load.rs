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
use crate::http2::Shared;
use crate::lines::Lines;
use crate::pace::Pace;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// host:port
    #[arg(long)]
    target: String,
    /// What is spoken
    #[arg(long, value_enum, default_value_t)]
    protocol: Protocol,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Requests at the same time on each connection of HTTP/2
    #[arg(long, default_value_t = 1)]
    streams: usize,
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

#[derive(Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
enum Protocol {
    #[default]
    Http1,
    /// By prior knowledge
    Http2,
    /// Lines that a greeter echoes
    Lines,
}

/// What a worker asks on.
enum Asked {
    Http1(TcpStream),
    Http2(Rc<Shared>),
    Lines(Lines),
}

struct Load {
    target: SocketAddr,
    protocol: Protocol,
    authority: String,
    size: usize,
    request: Vec<u8>,
    limit: Duration,
    left: Cell<u64>,
    per_request: bool,
    stop: Rc<Stop>,
    report: RefCell<LoadReport>,
    latencies: RefCell<Vec<u32>>,
}

pub(crate) async fn run(args: Args, stop: Rc<Stop>) -> Result<()> {
    ensure!(args.connections > 0 && args.streams > 0, "--connections and --streams must be at least 1");
    ensure!(args.streams == 1 || args.protocol == Protocol::Http2, "--streams is for --protocol http2");
    ensure!(args.streams == 1 || !args.per_request, "--per-request has one stream on each connection");
    let load = Rc::new(Load {
        target: client::resolve(&args.target).await?,
        protocol: args.protocol,
        authority: args.target.clone(),
        size: args.size,
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
        let shared = (args.protocol == Protocol::Http2).then(|| load.shared());
        for _ in 0..args.streams {
            let (load, pace, asked) = (load.clone(), pace.clone(), shared.clone().map(Asked::Http2));
            workers.spawn_local(async move {
                match pace {
                    Some(pace) => load.at_rate(&pace, asked).await,
                    None if args.per_request => load.one_connection_per_request().await,
                    None => load.keep_alive(asked).await,
                }
            });
        }
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

    fn shared(&self) -> Rc<Shared> {
        Shared::new(self.target, &self.authority, self.size, self.limit)
    }

    async fn keep_alive(&self, mut asked: Option<Asked>) {
        let mut buffer = Vec::with_capacity(8192);
        while self.take() {
            let start = Instant::now();
            let result = self.on(&mut asked, &mut buffer).await;
            self.count(start, result);
        }
    }

    async fn at_rate(&self, pace: &Pace, mut asked: Option<Asked>) {
        let mut buffer = Vec::with_capacity(8192);
        while let Some(due) = pace.next().await {
            if !self.take() {
                return;
            }
            let result = self.on(&mut asked, &mut buffer).await;
            self.count(due, result);
            if self.per_request {
                self.see_closed(asked.take(), &mut buffer).await;
            }
        }
    }

    async fn one_connection_per_request(&self) {
        let mut buffer = Vec::with_capacity(8192);
        while self.take() {
            let (start, mut asked) = (Instant::now(), None);
            let result = self.on(&mut asked, &mut buffer).await;
            self.count(start, result);
            self.see_closed(asked, &mut buffer).await;
        }
    }

    /// The server closes first, so that its side keeps the port; the answer was complete before that.
    async fn see_closed(&self, asked: Option<Asked>, buffer: &mut Vec<u8>) {
        match asked {
            None | Some(Asked::Http2(_)) => {}
            Some(Asked::Http1(mut stream)) => {
                let _ = tokio::time::timeout(self.limit, stream.read_buf(buffer)).await;
            }
            Some(Asked::Lines(lines)) => {
                if let Err(kind) = lines.end().await {
                    self.fail(kind);
                }
            }
        }
    }

    /// One request on what is open, connecting it when there is nothing; a failed one is not used again.
    async fn on(&self, asked: &mut Option<Asked>, buffer: &mut Vec<u8>) -> Result<(), Failure> {
        let mut connected = match asked.take() {
            Some(connected) => connected,
            None => self.connect().await?,
        };
        let result = match &mut connected {
            Asked::Http1(stream) => client::exchange(stream, &self.request, buffer, self.limit).await,
            Asked::Http2(shared) => shared.exchange().await,
            Asked::Lines(lines) => lines.exchange(self.size).await,
        };
        // The one that is shared replaces itself.
        if result.is_ok() || matches!(connected, Asked::Http2(_)) {
            *asked = Some(connected);
        }
        result
    }

    async fn connect(&self) -> Result<Asked, Failure> {
        Ok(match self.protocol {
            Protocol::Http1 => Asked::Http1(client::connect(self.target, self.limit).await?),
            Protocol::Http2 => Asked::Http2(self.shared()),
            Protocol::Lines => Asked::Lines(Lines::open(self.target, self.limit).await?),
        })
    }

    fn fail(&self, kind: Failure) {
        let mut report = self.report.borrow_mut();
        report.failed += 1;
        *report.errors.entry(kind.to_owned()).or_default() += 1;
    }

    fn count(&self, start: Instant, result: Result<(), Failure>) {
        match result {
            Ok(()) => {
                self.report.borrow_mut().ok += 1;
                let micros = u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX);
                self.latencies.borrow_mut().push(micros);
            }
            Err(kind) => self.fail(kind),
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
