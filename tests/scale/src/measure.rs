//! What this process uses, but for the thread that writes.

use std::fs;

use anyhow::{Context, Result};

pub(crate) const WRITER: &str = "writer";
/// Of Linux on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;

pub(crate) struct Usage {
    pub(crate) follower_seconds: f64,
}

impl Usage {
    pub(crate) fn now() -> Result<Self> {
        let mut ticks = 0;
        for task in fs::read_dir("/proc/self/task")? {
            // A thread may end meanwhile.
            let Ok(stat) = fs::read_to_string(task?.path().join("stat")) else { continue };
            let (name, rest) = stat.rsplit_once(") ").context("no name")?;
            if !name.ends_with(WRITER) {
                let fields: Vec<&str> = rest.split(' ').collect();
                ticks += fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
            }
        }
        Ok(Self { follower_seconds: ticks as f64 / TICKS_PER_SECOND })
    }

    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self { follower_seconds: self.follower_seconds - earlier.follower_seconds }
    }
}

pub(crate) fn resident_kib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
