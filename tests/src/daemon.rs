//! One host's meshd: its files, its process, and what can be asked of it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::access_log::{self, AccessEvent};
use crate::backend;
use crate::host::Host;
use crate::http;
use crate::metrics::Metrics;
use crate::process::{Finished, Process, Program};
use crate::wait::until;

/// The daemon's own user, as on a real host.
pub const UID: u32 = 990;
const METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 15020);
const READY: Duration = Duration::from_secs(30);

pub struct Daemon {
    host: Host,
    directory: PathBuf,
    process: Mutex<Option<Process>>,
    earlier_logs: Mutex<String>,
    environment: Mutex<Vec<(String, String)>>,
    capabilities: Mutex<String>,
}

impl Daemon {
    /// Lays out `etc`, `state` and `run` on the host and writes meshd.toml.
    pub(crate) fn create(host: Host, access_log: bool, threads: usize) -> Result<Self> {
        let directory = host.directory().join("meshd");
        for part in ["etc/enrol.d", "etc/resources.d"] {
            fs::create_dir_all(directory.join(part))?;
        }
        for part in ["state", "run", "log"] {
            fs::create_dir_all(directory.join(part))?;
            chown(directory.join(part), Some(UID), Some(UID))?;
        }
        let daemon = Self {
            host,
            directory,
            process: Mutex::new(None),
            earlier_logs: Mutex::default(),
            environment: Mutex::default(),
            capabilities: Mutex::new(backend::capabilities().to_owned()),
        };
        fs::write(daemon.iptables_lock(), "")?;
        chown(daemon.iptables_lock(), Some(UID), Some(UID))?;
        fs::write(daemon.config(), daemon.config_text(access_log, threads))?;
        Ok(daemon)
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    pub fn config(&self) -> PathBuf {
        self.directory.join("etc/meshd.toml")
    }

    pub fn etc(&self, name: &str) -> PathBuf {
        self.directory.join("etc").join(name)
    }

    /// Where programs of the host get their identity.
    pub fn api_socket(&self) -> PathBuf {
        self.directory.join("run/api.sock")
    }

    /// The lock of legacy iptables on this host, open to meshd as docs/capture.md asks of a real one. Machine-wide
    /// by default, which hosts that are namespaces would wait for.
    pub fn iptables_lock(&self) -> PathBuf {
        self.directory.join("run/xtables.lock")
    }

    /// Runs `meshd join` with a token, as meshd's user.
    pub fn join(&self, token: &str) -> Result<Finished> {
        self.join_by(&[("--token-file", token)])
    }

    /// Runs `meshd join` as meshd's user, with options that name files of these contents.
    pub fn join_by(&self, proof: &[(&str, &str)]) -> Result<Finished> {
        let mut program = self.program(&["join", "--config"]).arg(self.config()).uid(UID);
        let mut files = Vec::new();
        for (option, text) in proof {
            let file = self.directory.join("state").join(option.trim_start_matches('-'));
            fs::write(&file, text)?;
            chown(&file, Some(UID), Some(UID))?;
            program = program.arg(option).arg(&file);
            files.push(file);
        }
        let finished = self.host.run(&self.with_environment(program));
        files.iter().try_for_each(fs::remove_file)?;
        finished
    }

    /// Variables for the next join or start, say another clock.
    pub fn set_environment(&self, variables: &[(&str, &str)]) {
        let owned = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        *lock(&self.environment) = owned;
    }

    /// The capture backend from the next start on.
    pub fn use_backend(&self, backend: &str) -> Result<()> {
        let text = fs::read_to_string(self.config())?;
        let line = text.lines().find(|line| line.starts_with("backend = ")).context("no backend in meshd.toml")?;
        fs::write(self.config(), text.replace(line, &format!("backend = {backend:?}")))?;
        Ok(())
    }

    /// Has meshd look at programs from the next start on; it may only with the capability.
    pub fn look_at_programs(&self, may: bool) -> Result<()> {
        let text = fs::read_to_string(self.config())?;
        fs::write(self.config(), text + "[workload_api]\npath_selectors = true\n")?;
        if may {
            lock(&self.capabilities).push_str(",+sys_ptrace");
        }
        Ok(())
    }

    /// Starts meshd without waiting for it.
    pub fn spawn(&self) -> Result<()> {
        let program = self.program(&["run", "--config"]).arg(self.config());
        let program = program.uid_with(UID, &lock(&self.capabilities));
        let program = self.with_environment(program);
        let mut process = lock(&self.process);
        ensure!(!process.as_mut().is_some_and(Process::is_running), "meshd on {} runs already", self.host.name());
        if let Some(ended) = process.take() {
            lock(&self.earlier_logs).push_str(&ended.output());
        }
        *process = Some(self.host.spawn(&program)?);
        Ok(())
    }

    pub fn start(&self) -> Result<()> {
        self.spawn()?;
        self.wait_ready()
    }

    pub fn wait_ready(&self) -> Result<()> {
        let is_ready = || self.with_process(|process| process.output().contains("meshd ready")).unwrap_or(false);
        let ended = || self.with_process(|process| !process.is_running()).unwrap_or(true);
        until(READY, "meshd ready", || is_ready() || ended()).with_context(|| self.describe())?;
        ensure!(is_ready() && !ended(), "meshd ended before it was ready; {}", self.describe());
        Ok(())
    }

    pub fn is_running(&self) -> bool {
        self.with_process(Process::is_running).unwrap_or(false)
    }

    pub fn pid(&self) -> Result<u32> {
        self.with_process(|process| process.pid())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.with_process(|process| process.signal(signal))?
    }

    /// SIGSTOP, and every thread stopped: once the signal is sent, a worker may still be accepting. SIGCONT ends it.
    pub fn stand_still(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        let pid = self.pid()?;
        until(READY, "meshd to stand still", || stands_still(pid))
    }

    /// SIGTERM, and the end of it; an exit code other than 0 is an error.
    pub fn stop(&self) -> Result<()> {
        let status = self.with_process(Process::stop)??;
        ensure!(status.success(), "meshd stopped with {status}; {}", self.describe());
        Ok(())
    }

    /// SIGKILL, and the end of it.
    pub fn kill(&self) -> Result<()> {
        self.with_process(Process::kill)?
    }

    pub fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start()
    }

    /// Everything it logged, over all its runs.
    pub fn log(&self) -> String {
        let current = self.with_process(|process| process.output()).unwrap_or_default();
        lock(&self.earlier_logs).clone() + &current
    }

    /// A meshd verb as the operator (root) runs it.
    pub fn run(&self, verb: &[&str]) -> Result<Finished> {
        self.host.run(&self.program(verb).arg("--config").arg(self.config()).unit("admin.service"))
    }

    /// A verb's `-o json`.
    pub fn json(&self, verb: &str) -> Result<serde_json::Value> {
        let words: Vec<&str> = verb.split(' ').chain(["-o", "json"]).collect();
        let output = self.run(&words)?.expect_success(&format!("meshd {verb} on {}", self.host.name()))?;
        serde_json::from_str(&output).with_context(|| format!("meshd {verb} -o json gave:\n{output}"))
    }

    pub fn metrics_text(&self) -> Result<String> {
        metrics_text(&self.host)
    }

    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.metrics_text()?))
    }

    pub fn access_log(&self) -> Vec<AccessEvent> {
        access_log::read(&self.access_log_file())
    }

    pub fn enrol(&self, text: &str) -> Result<()> {
        Ok(fs::write(self.etc("enrol.d/harness.toml"), text)?)
    }

    /// Writes a resource file as a tool would: whole, by rename.
    pub fn resource(&self, name: &str, text: &str) -> Result<()> {
        let path = self.etc("resources.d").join(name);
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, text)?;
        Ok(fs::rename(&temporary, &path)?)
    }

    fn access_log_file(&self) -> PathBuf {
        self.directory.join("log/access.jsonl")
    }

    fn program(&self, args: &[&str]) -> Program {
        let program = Program::new(self.host.binary("meshd")).args(args).unit("meshd.service");
        program.env("XTABLES_LOCKFILE", self.iptables_lock())
    }

    fn with_environment(&self, program: Program) -> Program {
        let environment = lock(&self.environment);
        environment.iter().fold(program, |program, (name, value)| program.env(name, value))
    }

    fn with_process<T>(&self, work: impl FnOnce(&mut Process) -> T) -> Result<T> {
        let mut process = lock(&self.process);
        let process = process.as_mut().with_context(|| format!("meshd on {} was never started", self.host.name()))?;
        Ok(work(process))
    }

    fn describe(&self) -> String {
        format!("host {}, log:\n{}", self.host.name(), self.log())
    }

    fn config_text(&self, access_log: bool, threads: usize) -> String {
        let path = |name: &str| quoted(&self.directory.join(name));
        let access_log =
            if access_log { format!("access_log = {}\n", quoted(&self.access_log_file())) } else { String::new() };
        format!(
            "state_dir = {}\nrun_dir = {}\nenrol_dir = {}\n\
             [capture]\nbackend = {:?}\n\
             [proxy]\nthreads = {threads}\n{access_log}\n\
             [[source]]\nkind = \"files\"\nname = \"files\"\ndir = {}\nauthority = [\"*\"]\n\
             [dns]\nintegration = \"off\"\n",
            path("state"),
            path("run"),
            path("etc/enrol.d"),
            backend::chosen(),
            path("etc/resources.d"),
        )
    }
}

pub(crate) fn metrics_text(host: &Host) -> Result<String> {
    let (status, body) = from_metrics_port(host, "/metrics")?;
    ensure!(status == 200, "metrics of {} answered {status}: {body}", host.name());
    Ok(body)
}

/// Status and body of what meshd's metrics port answers.
pub(crate) fn from_metrics_port(host: &Host, path: &str) -> Result<(u16, String)> {
    host.within(|| http::get(SocketAddr::from(METRICS), path))?
}

/// Every thread of it.
fn stands_still(pid: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stopped = |stat: String| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'));
    threads.map(|thread| fs::read_to_string(thread.path().join("stat"))).all(|stat| stat.is_ok_and(stopped))
}

fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
