//! meshd as a unit of a machine, with its files where a real host has them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Machine, units};
use crate::access_log::{self, AccessEvent};
use crate::daemon::{from_metrics_port, metrics_text};
use crate::metrics::Metrics;
use crate::process::{Finished, Program};
use crate::wait::until;

const UNIT: &str = "meshd.service";
const ACCESS_LOG: &str = "/var/log/meshd/access.jsonl";
const READY: Duration = Duration::from_secs(30);

pub struct MachineDaemon<'a>(&'a Machine);

impl<'a> MachineDaemon<'a> {
    pub(super) fn of(machine: &'a Machine) -> Self {
        Self(machine)
    }

    /// Its configuration and its unit file.
    pub fn install(&self, threads: usize, backend: &str) -> Result<()> {
        let config = format!(
            "[capture]\nbackend = \"{backend}\"\n\n[proxy]\nthreads = {threads}\naccess_log = \"{ACCESS_LOG}\"\n\n\
             [[source]]\nkind = \"files\"\nname = \"files\"\ndir = \"/etc/meshd/resources.d\"\nauthority = [\"*\"]\n"
        );
        self.0.write("/etc/meshd/meshd.toml", &config)?;
        self.0.command("mkdir", &["-p", "/etc/meshd/enrol.d", "/etc/meshd/resources.d"])?;
        self.0.install_unit(UNIT, units::MESHD)
    }

    /// What only root may do to the names of a host, it may from its next start on.
    pub fn run_as_root(&self) -> Result<()> {
        self.0.write(&format!("/etc/systemd/system/{UNIT}.d/root.conf"), "[Service]\nUser=root\nGroup=root\n")?;
        self.0.systemctl(&["daemon-reload"]).map(drop)
    }

    /// Runs `meshd join` with a token, as meshd's user.
    pub fn join(&self, token: &str) -> Result<()> {
        self.0.write("/run/token", token)?;
        self.0.command("chown", &["meshd:", "/run/token"])?;
        let properties = ["--property=User=meshd", "--property=StateDirectory=meshd", "--wait", "--pipe", "--quiet"];
        let join = ["/usr/bin/meshd", "join", "--token-file", "/run/token"];
        let joined = self.0.command("systemd-run", &[&properties[..], &join[..]].concat());
        self.0.command("rm", &["/run/token"])?;
        joined.map(drop)
    }

    /// Starts the unit, also at every boot, without waiting for it to be ready.
    pub fn enable(&self) -> Result<()> {
        self.0.systemctl(&["enable", "--now", UNIT]).map(drop)
    }

    pub fn start(&self) -> Result<()> {
        self.0.systemctl(&["start", UNIT])?;
        self.wait_ready()
    }

    pub fn stop(&self) -> Result<()> {
        self.0.systemctl(&["stop", UNIT]).map(drop)
    }

    /// SIGKILL; its unit says what happens next.
    pub fn kill(&self) -> Result<()> {
        self.0.systemctl(&["kill", "--signal=KILL", "--kill-who=main", UNIT]).map(drop)
    }

    /// Its process, as seen on the machine.
    pub fn pid(&self) -> Result<u32> {
        let shown = self.0.systemctl(&["show", "--property=MainPID", "--value", UNIT])?;
        shown.trim().parse().with_context(|| format!("MainPID is {shown}"))
    }

    pub fn is_ready(&self) -> bool {
        from_metrics_port(self.0.host(), "/ready").is_ok_and(|(status, _)| status == 200)
    }

    pub fn wait_ready(&self) -> Result<()> {
        let what = format!("meshd ready on {}", self.0.name());
        until(READY, &what, || self.is_ready()).with_context(|| self.log())
    }

    /// Hands new enrolment to a running meshd, without a restart.
    pub fn reload(&self) -> Result<()> {
        self.0.systemctl(&["reload", UNIT]).map(drop)
    }

    pub fn log(&self) -> String {
        self.0.journal(UNIT).unwrap_or_else(|error| error.to_string())
    }

    /// A meshd verb as the operator (root) runs it.
    pub fn run(&self, verb: &[&str]) -> Result<Finished> {
        self.0.run(&Program::new("/usr/bin/meshd").args(verb))
    }

    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&metrics_text(self.0.host())?))
    }

    pub fn access_log(&self) -> Result<Vec<AccessEvent>> {
        Ok(access_log::read(&self.0.path(ACCESS_LOG)?))
    }

    pub fn enrol(&self, text: &str) -> Result<()> {
        self.0.write("/etc/meshd/enrol.d/harness.toml", text)
    }

    pub fn resource(&self, name: &str, text: &str) -> Result<()> {
        self.0.write(&format!("/etc/meshd/resources.d/{name}"), text)
    }

    /// How many descriptors it holds.
    pub fn open_descriptors(&self) -> Result<usize> {
        let listed = self.0.command("ls", &[&format!("/proc/{}/fd", self.pid()?)])?;
        ensure!(!listed.is_empty(), "meshd on {} holds none", self.0.name());
        Ok(listed.lines().count())
    }
}
