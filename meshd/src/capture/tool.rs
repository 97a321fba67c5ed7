//! Runs the tools that speak to the kernel: `nft`, `ip`, `iptables-restore`.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Far beyond what any of them takes, the lock of iptables (5 s) included.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("cannot run `{tool}`: {source}; install the package `{package}`")]
    Missing { tool: String, package: &'static str, source: std::io::Error },
    #[error("`{command}` failed: {stderr}; meshd needs CAP_NET_ADMIN and a kernel with {needs}")]
    Failed { command: String, stderr: String, needs: &'static str },
    #[error("backend {backend} cannot do {what}; {remedy}")]
    Cannot { backend: &'static str, what: String, remedy: &'static str },
    #[error("this would lock you out: {0}")]
    Lockout(String),
    #[error("nothing to confirm: {0}")]
    NotConfirmable(String),
    #[error("{what}: {source}")]
    State { what: String, source: std::io::Error },
}

/// Debian keeps them in /usr/sbin, which an unprivileged user's PATH may lack.
pub(super) const TOOL_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// A tool, and what to tell an operator who lacks it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tool {
    pub name: &'static str,
    pub package: &'static str,
    pub needs: &'static str,
}

pub(super) const NFT: Tool = Tool { name: "nft", package: "nftables", needs: "nf_tables" };
pub(super) const IP: Tool = Tool { name: "ip", package: "iproute2", needs: "policy routing" };

/// Ends a tool that hangs: whoever waits for it holds the lock that a revert needs.
struct Watched(#[expect(dead_code, reason = "dropping it tells the watcher that the tool has ended")] Sender<()>);

impl Watched {
    fn over(child: &Child) -> Watched {
        let (running, ended) = channel::<()>();
        let pid = Pid::from_raw(child.id() as i32);
        std::thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                // It has not been waited for yet, so the number is still its own.
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        Watched(running)
    }
}

impl Tool {
    /// What it printed; an error carries what it complained about.
    pub(super) fn run(&self, arguments: &[impl AsRef<str>], input: &str) -> Result<String, CaptureError> {
        let missing = |source| CaptureError::Missing { tool: self.name.into(), package: self.package, source };
        let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        let mut child = Command::new(self.name)
            .args(&arguments)
            .env("PATH", TOOL_PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(missing)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A tool that ends early reports why on stderr; the broken pipe itself says nothing.
            let _ = stdin.write_all(input.as_bytes());
        }
        let watched = Watched::over(&child);
        let output = child.wait_with_output().map_err(missing)?;
        drop(watched);
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let command = format!("{} {}", self.name, arguments.join(" "));
        Err(CaptureError::Failed { command, stderr, needs: self.needs })
    }
}
