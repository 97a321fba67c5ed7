//! What testkit's clients report, and how a host runs them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::mesh::Mesh;
use crate::process::{Finished, Process, Program};
use crate::wait::until;

const READY: Duration = Duration::from_secs(30);

/// The result of `testkit load`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LoadReport {
    pub ok: u64,
    pub failed: u64,
    pub errors: BTreeMap<String, u64>,
    pub seconds: f64,
    pub requests_per_second: f64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

/// The result of `testkit bulk`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BulkReport {
    pub bytes: u64,
    pub failed: u64,
    pub seconds: f64,
    pub gbit_per_second: f64,
}

impl Host {
    /// `testkit` as seen on this host, with these arguments.
    pub fn testkit(&self, args: &[&str]) -> Program {
        Program::new(self.binary("testkit")).args(args)
    }

    /// Starts a testkit program that says `ready` once it serves, holds or loads.
    pub fn start_testkit(&self, program: &Program) -> Result<Process> {
        let mut process = self.spawn(program)?;
        let began = until(READY, "testkit to be ready", || process.output().contains("ready") || !process.is_running());
        began.with_context(|| format!("{} on {}:\n{}", program.label(), self.name(), process.output()))?;
        anyhow::ensure!(process.is_running(), "{} on {} ended:\n{}", program.label(), self.name(), process.output());
        Ok(process)
    }
}

/// The JSON line a testkit client ends with.
pub fn report<T: for<'de> Deserialize<'de>>(finished: &Finished) -> Result<T> {
    let line = finished.stdout.lines().rev().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("no report in:\n{}{}", finished.stdout, finished.stderr))?;
    serde_json::from_str(line).with_context(|| format!("not a report: {line}"))
}

/// A load of one connection per request from checkout on web to payments, for as long as it is wanted.
pub struct Load<'a> {
    mesh: &'a Mesh,
    client: Process,
}

impl<'a> Load<'a> {
    pub fn start(mesh: &'a Mesh, connections: u64) -> Result<Self> {
        Self::start_with(mesh, connections, &[])
    }

    pub fn start_with(mesh: &'a Mesh, connections: u64, more: &[&str]) -> Result<Self> {
        let connections = connections.to_string();
        let args = ["load", "--target", "payments.shop.mesh:80", "--per-request", "--connections", &connections];
        let args = [&args, more].concat();
        let client = mesh.host("web").start_testkit(&mesh.testkit("web", "checkout", &args))?;
        Ok(Self { mesh, client })
    }

    /// Waits until so many more connections arrived at a host.
    pub fn reaches(&self, host: &str, more: u32) -> Result<()> {
        let arrived = || {
            let metrics = self.mesh.daemon(host).metrics();
            metrics.map_or(0.0, |metrics| metrics.sum("tcp_open_total", &[("direction", "inbound"), ("peer", "src")]))
        };
        let goal = arrived() + f64::from(more);
        until(READY, &format!("{more} more connections at {host}"), || arrived() >= goal)
    }

    /// Waits for a load with a bounded number of requests.
    pub fn finish(self) -> Result<LoadReport> {
        report(&self.client.finish(READY)?)
    }

    pub fn end(mut self) -> Result<LoadReport> {
        self.client.stop()?;
        report(&self.client.finish(READY)?)
    }
}
