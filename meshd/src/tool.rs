//! Runs the programs of a host: `nft`, `ip`, `iptables-restore`, `systemctl`.

use std::io::{self, ErrorKind, Write};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Debian keeps them in /usr/sbin, which an unprivileged user's PATH may lack.
pub(crate) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Far beyond what any of them takes, the lock of iptables (5 s) included.
const PATIENCE: Duration = Duration::from_secs(20);

/// What it said, in English. `TimedOut` of one that hung, and was ended for it.
pub(crate) fn output(program: &str, arguments: &[&str], input: &str) -> io::Result<Output> {
    output_within(PATIENCE, program, arguments, input)
}

fn output_within(patience: Duration, program: &str, arguments: &[&str], input: &str) -> io::Result<Output> {
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = child.stdin.take();
    // Before anything is written: one that hangs may not read either.
    let watched = Watched::over(&child, patience);
    if let Some(mut stdin) = stdin {
        // One that ends early says why on stderr; the broken pipe itself says nothing.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output();
    match watched.was_ended() {
        true => Err(io::Error::new(ErrorKind::TimedOut, format!("it did not end within {} s", patience.as_secs()))),
        false => output,
    }
}

/// Ends a tool that hangs: whoever waits for it may hold the lock that a revert needs.
struct Watched {
    running: Sender<()>,
    /// Whether it had to.
    watcher: JoinHandle<bool>,
}

impl Watched {
    fn over(child: &Child, patience: Duration) -> Watched {
        let (running, ended) = channel::<()>();
        let pid = Pid::from_raw(child.id() as i32);
        let watcher = std::thread::spawn(move || {
            let hangs = ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout);
            // It has not been waited for yet, so the number is still its own.
            hangs && kill(pid, Signal::SIGKILL).is_ok()
        });
        Watched { running, watcher }
    }

    fn was_ended(self) -> bool {
        drop(self.running);
        self.watcher.join().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_tool_is_told_and_says_is_passed_on() {
        let output = output("cat", &[], "one\ntwo\n").unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout, b"one\ntwo\n");
        let environment = output_within(PATIENCE, "env", &[], "").unwrap().stdout;
        let environment = String::from_utf8(environment).unwrap();
        assert!(environment.contains(&format!("PATH={PATH}\n")) && environment.contains("LC_ALL=C\n"), "{environment}");
    }

    #[test]
    fn a_tool_that_hangs_without_reading_its_input_is_ended() {
        let more_than_a_pipe_holds = " ".repeat(1 << 20);
        let patience = Duration::from_millis(50);
        let ended = output_within(patience, "sleep", &["600"], &more_than_a_pipe_holds).unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::TimedOut);
    }
}
