//! The revert timer: a plan nobody confirms is taken back, by a process of its own.
//!
//! It outlives the daemon, the command and the session it was typed in: a transient unit of systemd where that
//! runs this host, otherwise a process in a session of its own. Measured on a clock nobody sets.

use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::unix_time::unix_now;
use crate::{host, tool};

/// What the process says once nothing can take it along any more.
pub const ARMED: &str = "armed";

/// Armed for a plan that is not confirmed yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timer {
    pub hash: String,
    /// The boot it runs in: a reboot ends every process.
    boot_id: String,
    /// When it fires, in milliseconds since that boot.
    deadline_ms: u64,
    /// The same as Unix time, for showing.
    pub until: u64,
}

/// A clock that only goes forward, also during suspend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootClock {
    boot_id: String,
    since_boot: Duration,
}

impl BootClock {
    pub fn now() -> BootClock {
        // Every kernel since 2.6.39 has this clock.
        let since_boot = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        BootClock { boot_id: boot_id(), since_boot }
    }
}

/// Empty only without /proc; what was written down by another boot is judged as carefully then.
pub(super) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl Timer {
    pub fn armed(hash: String, after: Duration, now: &BootClock) -> Timer {
        let deadline_ms = (now.since_boot + after).as_millis() as u64;
        Timer { hash, boot_id: now.boot_id.clone(), deadline_ms, until: unix_now() + after.as_secs() }
    }

    /// How long there is for confirming; None when time is up, or the process that waits ended with its boot.
    pub fn left(&self, now: &BootClock) -> Option<Duration> {
        if self.boot_id != now.boot_id {
            return None;
        }
        Duration::from_millis(self.deadline_ms).checked_sub(now.since_boot).filter(|left| !left.is_zero())
    }

    /// How long ago it should have fired.
    pub fn overdue(&self, now: &BootClock) -> Option<Duration> {
        match self.boot_id == now.boot_id {
            true => now.since_boot.checked_sub(Duration::from_millis(self.deadline_ms)),
            false => Some(Duration::MAX),
        }
    }
}

/// Starts the process that takes `hash` back after `after`; it runs when this returns.
pub fn start(program: &Path, config: &Path, hash: &str, after: Duration) -> io::Result<()> {
    if systemd_runs_this_host() { with_systemd(program, config, hash, after) } else { detached(program, config, hash) }
}

/// systemd may run this machine and yet know nothing of a network namespace somebody typed the command in.
fn systemd_runs_this_host() -> bool {
    host::systemd_runs() && host::in_namespace_of_process_1() == Some(true)
}

fn with_systemd(program: &Path, config: &Path, hash: &str, after: Duration) -> io::Result<()> {
    let arguments = systemd_run(program, config, hash, after);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = tool::output("systemd-run", &arguments, "")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(format!("systemd-run: {said}")))
}

fn systemd_run(program: &Path, config: &Path, hash: &str, after: Duration) -> Vec<String> {
    let mut arguments = vec![
        "--quiet".to_owned(),
        "--collect".to_owned(),
        format!("--description=Takes meshd's plan {hash} back unless it is confirmed"),
        format!("--on-active={}ms", after.as_millis()),
        // systemd may be a minute late unless told.
        "--timer-property=AccuracySec=100ms".to_owned(),
    ];
    arguments.extend(fire(program, config, hash));
    arguments
}

/// The command that fires: it waits for what is left, and does nothing for a confirmed plan.
fn fire(program: &Path, config: &Path, hash: &str) -> Vec<String> {
    let (program, config) = (program.display().to_string(), config.display().to_string());
    let words = ["intercept", "revert", "--unless-confirmed", hash, "--config", &config];
    std::iter::once(program).chain(words.map(str::to_owned)).collect()
}

fn detached(program: &Path, config: &Path, hash: &str) -> io::Result<()> {
    let command = fire(program, config, hash);
    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A terminal or a pipe kept open would keep the session waiting that started us.
        .stderr(Stdio::null())
        .spawn()?;
    let mut said = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut said)?;
    }
    match said.trim() == ARMED {
        true => Ok(()),
        false => Err(io::Error::other("the process that waits ended at once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(boot_id: &str, seconds: u64) -> BootClock {
        BootClock { boot_id: boot_id.into(), since_boot: Duration::from_secs(seconds) }
    }

    #[test]
    fn a_timer_runs_out_with_its_time_or_its_boot() {
        let timer = Timer::armed("abc".into(), Duration::from_secs(60), &at("one", 100));
        assert_eq!(timer.left(&at("one", 130)), Some(Duration::from_secs(30)));
        assert_eq!(timer.overdue(&at("one", 130)), None);
        for (later, overdue) in [(at("one", 160), Duration::ZERO), (at("two", 1), Duration::MAX)] {
            assert_eq!((timer.left(&later), timer.overdue(&later)), (None, Some(overdue)));
        }
    }

    #[test]
    fn systemd_is_told_to_be_on_time_and_to_revert_only_this_plan() {
        let arguments =
            systemd_run(Path::new("/usr/bin/meshd"), Path::new("/etc/m.toml"), "abc", Duration::from_secs(2));
        assert!(arguments.contains(&"--on-active=2000ms".to_owned()), "{arguments:?}");
        assert!(arguments.contains(&"--timer-property=AccuracySec=100ms".to_owned()), "{arguments:?}");
        let command = ["/usr/bin/meshd", "intercept", "revert", "--unless-confirmed", "abc", "--config", "/etc/m.toml"];
        assert!(arguments.ends_with(&command.map(str::to_owned)), "{arguments:?}");
    }
}
