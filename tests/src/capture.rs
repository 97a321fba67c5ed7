//! A packet capture on a host's wire.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::host::Host;
use crate::pcap::Pcap;
use crate::process::{Process, Program};
use crate::wait::until;

const DEADLINE: Duration = Duration::from_secs(10);

pub struct Capture {
    tcpdump: Process,
    file: PathBuf,
}

impl Host {
    /// Captures everything on eth0 from now on.
    pub fn capture(&self, file: &str) -> Result<Capture> {
        let file = self.directory().join("log").join(file);
        // Full packets, given on at once, and written by root: tcpdump's own user may not write here.
        let program = Program::new("tcpdump")
            .args(["-i", "eth0", "-s", "0", "--immediate-mode", "-U", "-B", "65536", "-Z", "root", "-w"])
            .arg(&file)
            .arg("tcp")
            .unit("tcpdump.service");
        let tcpdump = self.spawn(&program)?;
        until(DEADLINE, "tcpdump to listen", || tcpdump.stderr().contains("listening on"))?;
        Ok(Capture { tcpdump, file })
    }
}

impl Capture {
    pub fn finish(mut self) -> Result<Pcap> {
        self.tcpdump.signal(Signal::SIGINT)?;
        self.tcpdump.wait(DEADLINE)?;
        let dropped =
            self.tcpdump.stderr().lines().any(|line| line.ends_with("dropped by kernel") && !line.starts_with("0 "));
        anyhow::ensure!(!dropped, "the capture is incomplete: {}", self.tcpdump.stderr());
        let bytes = std::fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        Pcap::parse(&bytes)
    }
}
