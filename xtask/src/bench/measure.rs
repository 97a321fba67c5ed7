//! One subject, measured once.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use meshd_tests::load::{BulkReport, LoadReport, report};
use meshd_tests::wait::rest;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::bed::{Bed, Running};
use super::subject::Subject;

const CONNECTIONS: &str = "64";
const RATE: &str = "5000";
const IDLE: &str = "2000";
/// Longer than meshd takes to settle after its start; the same for everyone.
const IDLE_FOR: Duration = Duration::from_secs(15);
const LIMIT: Duration = Duration::from_secs(180);

/// How much work a phase is.
pub(crate) struct Effort {
    seconds: &'static str,
    bulk_bytes: &'static str,
}

impl Effort {
    pub(crate) fn full() -> Self {
        Self { seconds: "4", bulk_bytes: "4000000000" }
    }

    pub(crate) fn quick() -> Self {
        Self { seconds: "1", bulk_bytes: "400000000" }
    }
}

/// Processor time and memory are of both proxies together unless the name says else; absent where there is no proxy.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Sample {
    pub(crate) cpu_us_per_request: Option<f64>,
    pub(crate) requests_per_second: f64,
    pub(crate) cpu_us_per_connection: Option<f64>,
    pub(crate) connections_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) bulk_gbit_per_second: f64,
    pub(crate) bulk_cpu_s_per_gb: Option<f64>,
    pub(crate) idle_mib: Option<f64>,
    pub(crate) idle_larger_mib: Option<f64>,
    pub(crate) idle_2000_mib: Option<f64>,
    pub(crate) idle_2000_larger_mib: Option<f64>,
    pub(crate) failed: u64,
}

pub(crate) fn measure(bed: &Bed, subject: Subject, effort: &Effort) -> Result<Sample> {
    let running = bed.start(subject)?;
    let mut sample = Sample::default();
    memory(bed, &running, &mut sample)?;
    let target = running.target.as_str();
    let load = |more: &[&str]| -> Result<Costed<LoadReport>> {
        costed(bed, &running, &[&["load", "--target", target, "--connections"], more].concat())
    };
    // Connections, buffers and branch predictors as they are in the middle of a day.
    load(&[CONNECTIONS, "--duration", "0.5"])?;

    let keep_alive = load(&[CONNECTIONS, "--duration", effort.seconds])?;
    sample.cpu_us_per_request = keep_alive.cpu_us_per(keep_alive.report.ok);
    sample.requests_per_second = keep_alive.report.requests_per_second;

    let connections = load(&["16", "--per-request", "--duration", effort.seconds])?;
    sample.cpu_us_per_connection = connections.cpu_us_per(connections.report.ok);
    sample.connections_per_second = connections.report.requests_per_second;

    let rate = load(&[CONNECTIONS, "--rate", RATE, "--duration", effort.seconds])?;
    (sample.p50_us, sample.p99_us) = (rate.report.p50_us as f64, rate.report.p99_us as f64);

    let bulk: Costed<BulkReport> = costed(bed, &running, &["bulk", "--target", target, "--bytes", effort.bulk_bytes])?;
    sample.bulk_gbit_per_second = bulk.report.gbit_per_second;
    sample.bulk_cpu_s_per_gb = bulk.cpu_us_per(bulk.report.bytes).map(|us_per_byte| us_per_byte * 1e3);

    sample.failed = keep_alive.report.failed + connections.report.failed + rate.report.failed + bulk.report.failed;
    bed.stop(subject, running)?;
    Ok(sample)
}

/// Proxies that have been idle for a while after one request, then with many connections held.
fn memory(bed: &Bed, running: &Running, sample: &mut Sample) -> Result<()> {
    if running.pids.is_empty() {
        return Ok(());
    }
    rest(IDLE_FOR);
    (sample.idle_mib, sample.idle_larger_mib) = resident(&running.pids)?;
    let program = bed.client(&["idle", "--target", &running.target, "--connections", IDLE]);
    let mut idle = bed.near().start_testkit(&program)?;
    (sample.idle_2000_mib, sample.idle_2000_larger_mib) = resident(&running.pids)?;
    ensure!(idle.stop()?.success(), "the idle connections did not last:\n{}", idle.output());
    Ok(())
}

/// What a client reported, and what the proxies spent meanwhile.
struct Costed<T> {
    report: T,
    cpu_ns: Option<u64>,
}

impl<T> Costed<T> {
    fn cpu_us_per(&self, count: u64) -> Option<f64> {
        Some(self.cpu_ns? as f64 / 1e3 / count.max(1) as f64)
    }
}

fn costed<T: DeserializeOwned>(bed: &Bed, running: &Running, args: &[&str]) -> Result<Costed<T>> {
    let before = cpu_ns(&running.pids)?;
    let finished = bed.near().spawn(&bed.client(args))?.finish(LIMIT)?;
    let after = cpu_ns(&running.pids)?;
    ensure!(finished.success(), "{} failed:\n{}", args[0], finished.stderr);
    let cpu_ns = (!running.pids.is_empty()).then(|| after.saturating_sub(before));
    Ok(Costed { report: report(&finished)?, cpu_ns })
}

/// Time on a processor of every thread.
fn cpu_ns(pids: &[u32]) -> Result<u64> {
    let mut total = 0;
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task")).context("a proxy ended")? {
            let text = fs::read_to_string(task?.path().join("schedstat"))?;
            total += text.split(' ').next().unwrap_or_default().parse::<u64>().unwrap_or(0);
        }
    }
    Ok(total)
}

/// MiB of both together, and of the larger.
fn resident(pids: &[u32]) -> Result<(Option<f64>, Option<f64>)> {
    let each = pids.iter().map(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("a proxy ended")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib / 1024.0)
    });
    let each = each.collect::<Result<Vec<f64>>>()?;
    Ok((Some(each.iter().sum()), each.into_iter().reduce(f64::max)))
}
