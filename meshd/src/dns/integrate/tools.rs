//! The programs that systemd and iproute2 bring along.

use std::io::{self, ErrorKind};

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
    let failed = |stderr| ToolError::Failed { command: format!("{tool} {}", arguments.join(" ")), stderr };
    let output = crate::tool::output(tool, arguments, "").map_err(|error| match error.kind() {
        ErrorKind::TimedOut => failed(error.to_string()),
        _ => ToolError::Missing { tool: tool.to_owned(), source: error },
    })?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
