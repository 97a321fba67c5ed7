//! The programs that systemd and iproute2 bring along.

use std::io;
use std::process::{Command, Stdio};

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("cannot run `{tool}`: {source}; install the package it belongs to, or choose another [dns] integration")]
    Missing { tool: String, source: io::Error },
    #[error(
        "`{command}` failed: {stderr}; meshd needs to run as root for [dns] integration, or be given leave (docs/dns.md)"
    )]
    Failed { command: String, stderr: String },
}

pub(super) fn run(tool: &str, arguments: &[&str]) -> Result<(), ToolError> {
    let output = Command::new(tool)
        .args(arguments)
        // Debian keeps `ip` in /usr/sbin, which an unprivileged user's PATH may lack.
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ToolError::Missing { tool: tool.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(ToolError::Failed { command: format!("{tool} {}", arguments.join(" ")), stderr })
}
