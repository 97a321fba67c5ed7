//! Programs on hosts: what to run, as whom, and how to end it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::backend;
use crate::wait::until_some;

const STOP_DEADLINE: Duration = Duration::from_secs(45);

/// What to run, in which unit, as which user.
#[derive(Clone)]
pub struct Program {
    words: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    unit: String,
    privileges: Vec<String>,
}

impl Program {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            words: vec![program.as_ref().to_owned()],
            environment: Vec::new(),
            unit: "harness.service".to_owned(),
            privileges: Vec::new(),
        }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.words.push(arg.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn unit(mut self, unit: &str) -> Self {
        unit.clone_into(&mut self.unit);
        self
    }

    /// An ordinary user without any privilege.
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.privileges = setpriv(uid, &["--inh-caps=-all", "--ambient-caps=-all"]);
        self
    }

    /// As meshd's systemd unit runs it: an ordinary user with a few ambient capabilities.
    #[must_use]
    pub fn uid_with_net_admin(self, uid: u32) -> Self {
        self.uid_with(uid, backend::capabilities())
    }

    /// The same with others, as setpriv(1) has them.
    #[must_use]
    pub(crate) fn uid_with(mut self, uid: u32, capabilities: &str) -> Self {
        let (inherit, ambient) = (format!("--inh-caps={capabilities}"), format!("--ambient-caps={capabilities}"));
        self.privileges = setpriv(uid, &[&inherit, &ambient]);
        self
    }

    /// For the program alone: what starts it, as root, must not see them.
    fn assignments(&self) -> Vec<OsString> {
        let env = (!self.environment.is_empty()).then(|| OsString::from("env"));
        let assignments = self.environment.iter().map(|(name, value)| {
            let mut word = name.clone();
            word.push("=");
            word.push(value);
            word
        });
        env.into_iter().chain(assignments).collect()
    }

    pub fn label(&self) -> String {
        let program = Path::new(&self.words[0]).file_name().unwrap_or_default().to_string_lossy();
        // A cgroup below a unit has a path.
        format!("{}-{program}", self.unit.replace('/', "-"))
    }
}

fn setpriv(uid: u32, capabilities: &[&str]) -> Vec<String> {
    let mut words = vec!["setpriv".to_owned(), format!("--reuid={uid}"), format!("--regid={uid}")];
    words.push("--clear-groups".to_owned());
    words.extend(capabilities.iter().map(|&word| word.to_owned()));
    words.push("--".to_owned());
    words
}

/// A running program; dropped, it and its group are killed.
pub struct Process {
    child: Child,
    exited: Option<ExitStatus>,
    label: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    pub(crate) fn spawn(enter: &Path, host: &str, program: &Program, log: &Path) -> Result<Self> {
        let stdout = PathBuf::from(format!("{}.out", log.display()));
        let stderr = PathBuf::from(format!("{}.err", log.display()));
        // Not executed itself: a program another thread starts just now may still hold it open for writing.
        let child = Command::new("sh")
            .arg(enter)
            .args([host, &program.unit])
            .args(&program.privileges)
            .args(program.assignments())
            .args(&program.words)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            // Ctrl-C ends the harness, which then ends its programs in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {} on {host}", program.label()))?;
        Ok(Self { child, exited: None, label: program.label(), stdout, stderr })
    }

    /// The program's own process id: everything before it was exec'ed away.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stdout(&self) -> String {
        fs::read(&self.stdout).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    pub fn stderr(&self) -> String {
        fs::read(&self.stderr).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Both, for looking for a line wherever the program wrote it.
    pub fn output(&self) -> String {
        self.stdout() + &self.stderr()
    }

    pub fn is_running(&mut self) -> bool {
        self.try_wait().is_none()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.raw_pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.label))
    }

    /// SIGTERM, and the end of it.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if self.is_running() {
            self.signal(Signal::SIGTERM)?;
        }
        self.wait(STOP_DEADLINE)
    }

    /// SIGKILL to the program alone.
    pub fn kill(&mut self) -> Result<()> {
        if self.is_running() {
            self.signal(Signal::SIGKILL)?;
            self.wait(STOP_DEADLINE)?;
        }
        Ok(())
    }

    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("end of {} (process {})", self.label, self.pid());
        until_some(deadline, &what, || self.try_wait())
    }

    pub fn finish(mut self, deadline: Duration) -> Result<Finished> {
        let status = self.wait(deadline)?;
        Ok(Finished { status, stdout: self.stdout(), stderr: self.stderr() })
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.exited.is_none() {
            self.exited = self.child.try_wait().ok().flatten();
        }
        self.exited
    }

    fn raw_pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exited.is_none() {
            let _ = killpg(self.raw_pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// Its stdout, or an error with everything it said.
    pub fn expect_success(self, what: &str) -> Result<String> {
        anyhow::ensure!(self.success(), "{what} failed ({}):\n{}{}", self.status, self.stdout, self.stderr);
        Ok(self.stdout)
    }

    pub fn exit_code(&self) -> Option<i32> {
        self.status.code()
    }
}
