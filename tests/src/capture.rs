//! A packet capture on a host's wire.

use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::host::Host;
use crate::pcap::Pcap;
use crate::process::{Process, Program};
use crate::wait::until;

const DEADLINE: Duration = Duration::from_secs(10);

/// Where nobody listens: a datagram there is for the capture alone.
const DISCARD: &str = "10.87.0.1:9";

pub struct Capture {
    host: Host,
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
            .arg("tcp or udp port 9")
            .unit("tcpdump.service");
        let tcpdump = self.spawn(&program)?;
        until(DEADLINE, "tcpdump to listen", || tcpdump.stderr().contains("listening on"))?;
        Ok(Capture { host: self.clone(), tcpdump, file })
    }
}

impl Capture {
    /// All that crossed the wire before this call.
    pub fn finish(mut self) -> Result<Pcap> {
        self.catch_up()?;
        self.tcpdump.signal(Signal::SIGINT)?;
        self.tcpdump.wait(DEADLINE)?;
        let dropped =
            self.tcpdump.stderr().lines().any(|line| line.ends_with("dropped by kernel") && !line.starts_with("0 "));
        anyhow::ensure!(!dropped, "the capture is incomplete: {}", self.tcpdump.stderr());
        let bytes = std::fs::read(&self.file).with_context(|| format!("cannot read {}", self.file.display()))?;
        Pcap::parse(&bytes)
    }

    /// tcpdump may lag: when it has written a datagram sent now, it has written everything before.
    fn catch_up(&self) -> Result<()> {
        let cookie = format!("capture-until-{}", self.tcpdump.pid());
        let send = || UdpSocket::bind("0.0.0.0:0")?.send_to(cookie.as_bytes(), DISCARD);
        self.host.within(send)??;
        let written = || std::fs::read(&self.file).is_ok_and(|bytes| contains(&bytes, cookie.as_bytes()));
        until(DEADLINE, "tcpdump to catch up", written)
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
