//! Runs the tools that speak to the kernel: `nft`, `ip`, `iptables-restore`.

use std::io::ErrorKind;

use crate::tool;

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

/// A tool, and what to tell an operator who lacks it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tool {
    pub name: &'static str,
    pub package: &'static str,
    pub needs: &'static str,
}

pub(super) const NFT: Tool = Tool { name: "nft", package: "nftables", needs: "nf_tables" };
pub(super) const IP: Tool = Tool { name: "ip", package: "iproute2", needs: "policy routing" };

impl Tool {
    /// What it printed; an error carries what it complained about.
    pub(super) fn run(&self, arguments: &[impl AsRef<str>], input: &str) -> Result<String, CaptureError> {
        let missing = |source| CaptureError::Missing { tool: self.name.into(), package: self.package, source };
        let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        let failed = |stderr| {
            let command = format!("{} {}", self.name, arguments.join(" "));
            CaptureError::Failed { command, stderr, needs: self.needs }
        };
        let output = tool::output(self.name, &arguments, input).map_err(|error| match error.kind() {
            ErrorKind::TimedOut => failed(error.to_string()),
            _ => missing(error),
        })?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
