//! Hosts that are whole machines: systemd as PID 1, units, cgroups, a journal, sshd; booted in a lab host's network
//! namespace by systemd-nspawn, without machined.
//!
//! A machine writes to memory over a shared tree. Everything it mounts is in a mount namespace of its own and
//! everything it runs is below the lab's slice, so it ends with its lab, however that ends.

mod daemon;
mod mesh;
mod ssh;
mod tree;
pub mod units;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub use daemon::MachineDaemon;
pub use mesh::MachineMesh;
pub use ssh::{Key, ssh};

use crate::host::Host;
use crate::lab::Lab;
use crate::process::{Finished, Process, Program};
use crate::wait::{until, until_some};
use crate::{binaries, cgroup};

const BOOT: Duration = Duration::from_secs(60);
const RUN: Duration = Duration::from_secs(120);

pub struct Machine {
    host: Host,
    cgroup: PathBuf,
    enter: PathBuf,
    programs_run: AtomicU32,
    nspawn: Process,
}

impl Machine {
    /// Boots the host; done when every unit it starts by itself runs.
    pub fn boot(lab: &Lab, host: &str, seed: &[(&str, &str)]) -> Result<Self> {
        let mut machine = Self::start(lab, host, seed)?;
        machine.wait_booted()?;
        Ok(machine)
    }

    /// The same without waiting, so that several boot at once. `seed` are files put into the tree before.
    pub fn start(lab: &Lab, host: &str, seed: &[(&str, &str)]) -> Result<Self> {
        let tree = tree::ensure()?;
        let host = lab.host(host);
        let directory = host.directory();
        let cgroups = cgroup::create_machine(lab.name(), host.name())?;
        fs::create_dir_all(directory.join("files"))?;
        write_seed(&directory.join("seed"), host.name(), seed)?;
        let boot = directory.join("boot");
        let list: Vec<String> = cgroups.all.iter().map(|cgroup| cgroup.display().to_string()).collect();
        let replaced = [
            ("@CGROUPS@", list.join(" ")),
            ("@TREE@", tree.display().to_string()),
            ("@DIRECTORY@", directory.display().to_string()),
        ];
        write_script(&boot, include_str!("boot.sh"), &replaced)?;
        let enter = directory.join("enter");
        write_script(&enter, include_str!("enter.sh"), &[("@CGROUP@", cgroups.unified.display().to_string())])?;
        let nspawn = nspawn(&host, &directory.join("files/root"))?;
        let nspawn = Process::spawn(&boot, host.name(), &nspawn, &directory.join("log/console"))?;
        Ok(Self { host, cgroup: cgroups.unified, enter, programs_run: AtomicU32::new(0), nspawn })
    }

    pub fn wait_booted(&mut self) -> Result<()> {
        until(BOOT, "a machine's systemd", || self.leader().is_some() || !self.nspawn.is_running())?;
        ensure!(self.nspawn.is_running(), "{} did not boot:\n{}", self.name(), self.nspawn.output());
        self.wait_running()
    }

    /// Its network namespace, addresses and files, as any lab host has them.
    pub fn host(&self) -> &Host {
        &self.host
    }

    pub fn name(&self) -> &str {
        self.host.name()
    }

    pub fn daemon(&self) -> MachineDaemon<'_> {
        MachineDaemon::of(self)
    }

    /// Starts a program on the machine: in a transient unit when it names one, in no unit otherwise.
    /// A unit outlives the `Process`; what must be stopped is better a unit file.
    pub fn spawn(&self, program: &Program) -> Result<Process> {
        let number = self.programs_run.fetch_add(1, Ordering::Relaxed);
        let log = self.host.directory().join("log").join(format!("{number:03}-{}", program.label()));
        Process::spawn(&self.enter, self.name(), program, &log)
    }

    /// Runs a program to its end.
    pub fn run(&self, program: &Program) -> Result<Finished> {
        self.spawn(program)?.finish(RUN).with_context(|| format!("on machine {}", self.name()))
    }

    /// A command as root in no unit; its output, or an error with everything it said.
    pub fn command(&self, program: &str, args: &[&str]) -> Result<String> {
        let what = format!("`{program} {}` on {}", args.join(" "), self.name());
        self.run(&Program::new(program).args(args))?.expect_success(&what)
    }

    pub fn systemctl(&self, args: &[&str]) -> Result<String> {
        self.command("systemctl", args)
    }

    /// All a unit logged, over all boots.
    pub fn journal(&self, unit: &str) -> Result<String> {
        self.command("journalctl", &["--quiet", "--no-pager", "--output=cat", "--unit", unit])
    }

    /// Writes a unit file that systemd then knows; starting it is another step.
    pub fn install_unit(&self, name: &str, text: &str) -> Result<()> {
        self.write(&format!("/etc/systemd/system/{name}"), text)?;
        self.systemctl(&["daemon-reload"]).map(drop)
    }

    /// Installs and starts a unit.
    pub fn start_unit(&self, name: &str, text: &str) -> Result<()> {
        self.install_unit(name, text)?;
        self.systemctl(&["start", name]).map(drop)
    }

    /// Replaces a file of the machine.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let outside = self.path(path)?;
        fs::create_dir_all(outside.parent().context("a file is in a directory")?)?;
        // A link would lead out of the machine.
        let _ = fs::remove_file(&outside);
        fs::write(&outside, text).with_context(|| format!("cannot write {path} on {}", self.name()))
    }

    pub fn read(&self, path: &str) -> Result<String> {
        fs::read_to_string(self.path(path)?).with_context(|| format!("cannot read {path} on {}", self.name()))
    }

    /// Where a file of the machine is seen from here, until its next reboot.
    pub fn path(&self, path: &str) -> Result<PathBuf> {
        let leader = self.leader().with_context(|| format!("{} does not run", self.name()))?;
        Ok(Path::new(&format!("/proc/{leader}/root")).join(path.trim_start_matches('/')))
    }

    /// A restart as an administrator does it; back when every unit runs again.
    pub fn reboot(&mut self) -> Result<()> {
        let before = self.leader();
        self.systemctl(&["--no-block", "reboot"])?;
        let another = || self.leader().is_some_and(|leader| Some(leader) != before) || !self.nspawn.is_running();
        until(BOOT, "the machine to boot again", another)?;
        self.wait_booted()
    }

    /// The process that is PID 1 inside.
    fn leader(&self) -> Option<u32> {
        let processes = fs::read_to_string(self.cgroup.join("payload/init.scope/cgroup.procs")).ok()?;
        processes.lines().next()?.parse().ok()
    }

    fn wait_running(&self) -> Result<()> {
        let wait = Program::new("systemctl").args(["is-system-running", "--wait"]);
        // Until systemd listens, systemctl only says so.
        let state = until_some(BOOT, "systemd to answer", || {
            let finished = self.run(&wait).ok()?;
            let state = finished.stdout.trim();
            ["running", "degraded", "maintenance"].contains(&state).then(|| state.to_owned())
        });
        let state = state.with_context(|| format!("{}:\n{}", self.name(), self.nspawn.output()))?;
        if state == "running" {
            return Ok(());
        }
        let failed = self.systemctl(&["--failed", "--no-pager", "--plain"])?;
        anyhow::bail!("{} is {state}:\n{failed}", self.name())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // For whoever looks at a failed test; the lab keeps `log`.
        if let Ok(journal) = self.command("journalctl", &["--no-pager", "--output=short-precise"]) {
            let _ = fs::write(self.host.directory().join("log/journal"), journal);
        }
    }
}

/// Whether machines work here at all: boots one. The error says what is in the way.
pub fn preflight() -> Result<()> {
    ensure!(cgroup::is_writable(), "cgroup2 is not mounted, or not writable");
    let lab = Lab::new(&["preflight"])?;
    Machine::boot(&lab, "preflight", &[]).map(drop)
}

fn nspawn(host: &Host, root: &Path) -> Result<Program> {
    let programs = binaries::directory()?;
    let binds = binaries::NEEDED.map(|(_, name)| format!("--bind-ro={}/{name}:/usr/bin/{name}", programs.display()));
    Ok(Program::new("systemd-nspawn")
        .args(["--quiet", "--boot", "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"])
        .args(["--resolv-conf=off", "--bind=/dev/net/tun"])
        // Without bpf systemd silently enforces neither IPAddressDeny= nor DeviceAllow=.
        .args(["--capability=CAP_NET_ADMIN,CAP_NET_RAW,CAP_BPF", "--system-call-filter=bpf"])
        .args(binds)
        .arg(format!("--machine={}", host.name()))
        .arg(format!("--network-namespace-path={}", host.network_namespace().display()))
        .arg(format!("--directory={}", root.display())))
}

fn write_seed(directory: &Path, name: &str, seed: &[(&str, &str)]) -> Result<()> {
    let hostname = format!("{name}\n");
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {name}\n");
    for (path, text) in [("/etc/hostname", hostname.as_str()), ("/etc/hosts", &hosts)].iter().chain(seed) {
        let path = directory.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        fs::write(path, text)?;
    }
    Ok(())
}

fn write_script(path: &Path, text: &str, replaced: &[(&str, String)]) -> Result<()> {
    let text = replaced.iter().fold(text.to_owned(), |text, (mark, value)| text.replace(mark, value));
    Ok(fs::write(path, text)?)
}
