//! Load from before a fault until after it: what it is the measure of.

use std::time::Duration;

use anyhow::{Result, ensure};
use meshd_tests::load::{LoadReport, report};
use meshd_tests::mesh::Mesh;
use meshd_tests::process::Process;

use crate::{SERVERS, figure};

const END: Duration = Duration::from_secs(30);

const PAYMENTS: [&str; 2] = ["--target", "payments.shop.mesh:80"];
const SMTP: [&str; 4] = ["--target", "smtp.shop.mesh:25", "--protocol", "lines"];

/// 500 requests a second from web to payments and smtp on api-1 and api-2, by HTTP/1.1, HTTP/2 and lines that must come
/// back as they were sent: over connections that stay, and over one each.
pub(crate) struct Witness {
    pids: Vec<(&'static str, u32)>,
    loads: Vec<(&'static str, Process)>,
}

impl Witness {
    pub(crate) fn start(mesh: &Mesh) -> Result<Self> {
        let pids = SERVERS.map(|host| mesh.daemon(host).pid().map(|pid| (host, pid)));
        let host = mesh.host("web");
        let load = |of: &'static str, target: &[&str], more: &[&str]| {
            let args = [&["load"], target, more].concat();
            host.start_testkit(&mesh.testkit("web", "checkout", &args)).map(|process| (of, process))
        };
        let http2 = [&PAYMENTS[..], &["--protocol", "http2"]].concat();
        let loads = vec![
            load("HTTP/1 that stays", &PAYMENTS, &["--connections", "16", "--rate", "225"])?,
            load("one each", &PAYMENTS, &["--connections", "8", "--rate", "60", "--per-request"])?,
            load("HTTP/2 that stays", &http2, &["--connections", "4", "--streams", "4", "--rate", "100"])?,
            load("one each", &http2, &["--connections", "4", "--rate", "20", "--per-request"])?,
            load("TCP that stays", &SMTP, &["--connections", "16", "--rate", "75"])?,
            load("one each", &SMTP, &["--connections", "4", "--rate", "20", "--per-request"])?,
        ];
        Ok(Self { pids: pids.into_iter().collect::<Result<_>>()?, loads })
    }

    /// Not a request failed, and every meshd under it is the process it was.
    pub(crate) fn end(self, mesh: &Mesh, of: &str) -> Result<()> {
        let (mut told, mut all, mut seconds) = (Vec::new(), 0, 0.0_f64);
        for (kind, mut load) in self.loads {
            load.stop()?;
            let report: LoadReport = report(&load.finish(END)?)?;
            ensure!(report.failed == 0 && report.ok > 0, "{of}: requests failed, {kind}: {report:?}");
            told.push(format!("{kind} {} (p99 {} ms)", report.ok, report.p99_us / 1000));
            (all, seconds) = (all + report.ok, seconds.max(report.seconds));
        }
        for (host, pid) in self.pids {
            let daemon = mesh.daemon(host);
            ensure!(daemon.is_running() && daemon.pid()? == pid, "{of}: meshd on {host} is not the process it was");
        }
        figure(&format!("{of}: 0 of {all} requests in {seconds:.0} s failed: {}", told.join(", ")));
        Ok(())
    }
}
