//! Load from before a fault until after it: what it is the measure of.

use std::time::Duration;

use anyhow::{Result, ensure};
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::process::Process;

use crate::{SERVERS, figure};

const END: Duration = Duration::from_secs(30);

/// 500 requests a second from web to payments on api-1 and api-2: over connections that stay, and over one each.
pub(crate) struct Witness {
    pids: Vec<(&'static str, u32)>,
    loads: Vec<Process>,
}

impl Witness {
    pub(crate) fn start(mesh: &Mesh) -> Result<Self> {
        let pids = SERVERS.map(|host| mesh.daemon(host).pid().map(|pid| (host, pid)));
        let host = mesh.host("web");
        let load = |name: &str, more: &[&str]| {
            let args = [&["load", "--target", "payments.shop.mesh:80"], more].concat();
            host.start_testkit(&mesh.testkit("web", name, &args))
        };
        let stay = load("checkout", &["--connections", "16", "--rate", "400"])?;
        let short = load("checkout", &["--connections", "8", "--rate", "100", "--per-request"])?;
        Ok(Self { pids: pids.into_iter().collect::<Result<_>>()?, loads: vec![stay, short] })
    }

    /// Not a request failed, and every meshd under it is the process it was.
    pub(crate) fn end(self, mesh: &Mesh, of: &str) -> Result<()> {
        let mut told = Vec::new();
        for mut load in self.loads {
            load.stop()?;
            let report: LoadReport = report(&load.finish(END)?)?;
            ensure!(report.failed == 0 && report.ok > 0, "{of}: requests failed: {report:?}");
            told.push(format!("{} requests in {:.0} s, p99 {} ms", report.ok, report.seconds, report.p99_us / 1000));
        }
        for (host, pid) in self.pids {
            let daemon = mesh.daemon(host);
            ensure!(daemon.is_running() && daemon.pid()? == pid, "{of}: meshd on {host} is not the process it was");
        }
        figure(&format!("{of}: 0 failed; connections that stay: {}; one each: {}", told[0], told[1]));
        Ok(())
    }
}
