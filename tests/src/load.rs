//! What testkit's clients report, and how a host runs them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::host::Host;
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
