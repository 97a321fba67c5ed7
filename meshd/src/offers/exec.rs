//! Runs a check's program: no shell, no environment of ours, no capabilities, and nothing of it is left.

use std::io::{self, PipeReader, Read, pipe};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use meshd_sys::child::without_privileges;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, User, geteuid};

use crate::enrol::Program;

/// Of what it printed: the reason is in its first lines.
const MOST_KEPT: usize = 400;
/// How often it is looked whether it ended, where it prints nothing.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// All processes it started, unless they left its group.
struct Group(Child);

impl Group {
    fn leader(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }

    /// Without waiting for it: until then its number, which is the group's, is nobody else's.
    fn leader_ended(&self) -> bool {
        let looks = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(self.leader()), looks), Ok(WaitStatus::StillAlive))
    }

    fn end(&mut self) -> io::Result<ExitStatus> {
        // One that has no process left is no trouble.
        let _ = killpg(self.leader(), Signal::SIGKILL);
        self.0.wait()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = self.end();
        }
    }
}

/// Until it ended, or its time is over. Blocks.
pub(super) fn run(program: &Program, variables: &[(&str, String)]) -> Result<(), String> {
    let ends = Instant::now() + program.timeout;
    let (mut reader, writer) = pipe().map_err(|error| format!("no pipe: {error}"))?;
    let mut command = command(program, variables)?;
    command.stdout(writer.try_clone().map_err(|error| error.to_string())?).stderr(writer);
    let child = without_privileges(&mut command).spawn().map_err(|error| refused(program, &error))?;
    // And with it our ends of the pipe.
    drop(command);
    let mut group = Group(child);
    let mut said = Vec::new();
    loop {
        listen(&mut reader, &mut said);
        let has_ended = group.leader_ended();
        if has_ended || Instant::now() >= ends {
            let status = group.end().map_err(|error| error.to_string())?;
            listen(&mut reader, &mut said);
            let late = || with_words(format!("it did not end within {} s", program.timeout.as_secs()), &said);
            return if has_ended { judge(status, &said) } else { Err(late()) };
        }
    }
}

fn command(program: &Program, variables: &[(&str, String)]) -> Result<Command, String> {
    let mut command = Command::new(&program.command[0]);
    command.args(&program.command[1..]).env_clear().env("PATH", PATH).env("LC_ALL", "C").current_dir("/");
    command.envs(variables.iter().map(|(name, value)| (name, value))).stdin(Stdio::null()).process_group(0);
    match &program.user {
        Some(name) => {
            let user = User::from_name(name).ok().flatten().ok_or_else(|| format!("there is no user `{name}` here"))?;
            if user.uid != geteuid() {
                command.gid(user.gid.as_raw()).uid(user.uid.as_raw());
            }
        }
        None if geteuid().is_root() => {
            return Err("meshd runs as root, and no check should; name a `user` for it".to_owned());
        }
        None => {}
    }
    Ok(command)
}

fn refused(program: &Program, error: &io::Error) -> String {
    let hint = match (&program.user, error.kind()) {
        (Some(user), io::ErrorKind::PermissionDenied) => format!(
            "; if it is that meshd may not become `{user}`: give meshd CAP_SETUID and CAP_SETGID, or leave `user` out"
        ),
        _ => String::new(),
    };
    format!("`{}` cannot be run: {error}{hint}", program.command[0])
}

/// Takes what it printed so far, and waits a moment where that is nothing.
fn listen(reader: &mut PipeReader, said: &mut Vec<u8>) {
    let timeout = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::ZERO);
    let mut polled = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    let is_ready = poll(&mut polled, timeout).is_ok_and(|ready| ready > 0);
    let has_words = polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
    if is_ready && has_words {
        let mut buffer = [0; 4096];
        let length = reader.read(&mut buffer).unwrap_or(0);
        said.extend(buffer[..length].iter().take(MOST_KEPT.saturating_sub(said.len())));
    } else if is_ready {
        // It closed what it prints to, and goes on.
        let _ = poll(&mut [], timeout);
    }
}

fn judge(status: ExitStatus, said: &[u8]) -> Result<(), String> {
    if status.success() { Ok(()) } else { Err(with_words(status.to_string(), said)) }
}

fn with_words(outcome: String, said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let shown: String = text.trim().chars().flat_map(char::escape_debug).take(MOST_KEPT).collect();
    if shown.is_empty() { outcome } else { format!("{outcome}: {shown}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(script: &str) -> Program {
        let command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        // Tests run as root, or as somebody who is nobody else.
        let user = geteuid().is_root().then(|| "nobody".to_owned());
        Program { command, timeout: Duration::from_secs(5), user }
    }

    #[test]
    fn what_exits_with_0_passes_and_what_fails_says_why_in_few_words() {
        assert_eq!(run(&of("exit 0"), &[]), Ok(()));
        let why = run(&of("echo 'no\x1b database'; echo again >&2; exit 3"), &[]).unwrap_err();
        assert_eq!(why, "exit status: 3: no\\u{1b} database\\nagain");
        let long = run(&of("head -c 1000000 /dev/zero | tr '\\0' x; exit 1"), &[]).unwrap_err();
        assert!(long.len() < 2 * MOST_KEPT, "{}", long.len());
    }

    #[test]
    fn one_that_hangs_ends_with_all_it_started() {
        let slow = Program { timeout: Duration::from_millis(200), ..of("sleep 600 & echo $!; sleep 600") };
        let why = run(&slow, &[]).unwrap_err();
        let (within, child) = why.split_once(": ").unwrap();
        assert!(within.starts_with("it did not end within"), "{why}");
        let child = Pid::from_raw(child.parse().unwrap());
        // Its parent is gone: it is reaped by whoever takes orphans, or a zombie until then.
        let status = || std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let is_gone = || status().rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.starts_with(" Z"));
        let until = Instant::now() + Duration::from_secs(10);
        while !is_gone() && Instant::now() < until {
            std::thread::yield_now();
        }
        assert!(is_gone(), "{}", status());
    }

    #[test]
    fn it_sees_nothing_of_our_environment_and_what_it_is_asked_about() {
        let seen = "test -z \"$HOME$CARGO$USER\" && test \"$MESHD_PORT\" = 8080 && test \"$PWD\" = /";
        assert_eq!(run(&of(seen), &[("MESHD_PORT", "8080".to_owned())]), Ok(()));
    }

    #[test]
    fn what_cannot_be_run_and_users_that_are_not_there_are_named() {
        let missing = Program { command: vec!["/no/such".to_owned()], ..of("") };
        assert!(run(&missing, &[]).unwrap_err().starts_with("`/no/such` cannot be run: "));
        let nobody = Program { user: Some("no-such-user".to_owned()), ..of("") };
        assert_eq!(run(&nobody, &[]).unwrap_err(), "there is no user `no-such-user` here");
        if geteuid().is_root() {
            let unnamed = Program { user: None, ..of("") };
            assert!(run(&unnamed, &[]).unwrap_err().contains("name a `user`"));
        }
    }
}
