//! Hands the rules to the kernel through `nft` and `ip`, and takes them away again.

use std::io::Write;
use std::process::{Command, Stdio};

use super::CaptureConfig;
use super::rules::{RouteSetup, routes};

#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("cannot run `{tool}`: {source}; install the package `{package}`")]
    Missing { tool: &'static str, package: &'static str, source: std::io::Error },
    #[error("`{command}` failed: {stderr}; meshd needs CAP_NET_ADMIN and a kernel with nft_tproxy")]
    Failed { command: String, stderr: String },
}

/// Puts `rules` and the routes in force. Safe to repeat; a failure leaves what was in force before.
pub fn apply(config: &CaptureConfig, rules: &str) -> Result<(), CaptureError> {
    // Routes first: once the rules capture, a virtual IP must already lead to this host.
    for setup in routes(config).iter().filter(|setup| family_present(setup.family)) {
        ip(setup.family, &setup.route)?;
        ensure_rule(setup)?;
    }
    nft(rules)
}

/// Removes only what is ours; works without a daemon and after a partial apply.
pub fn revert(config: &CaptureConfig) -> Result<(), CaptureError> {
    // Adding before deleting makes it succeed whether or not the table is there.
    nft("table inet meshd\ndelete table inet meshd\n")?;
    for setup in routes(config).iter().filter(|setup| family_present(setup.family)) {
        while ip(setup.family, &setup.delete_rule).is_ok() {}
        // Fails when it is not there: then there is nothing to remove.
        let _ = ip(setup.family, &setup.delete_route);
    }
    Ok(())
}

fn ensure_rule(setup: &RouteSetup) -> Result<(), CaptureError> {
    match ip(setup.family, &setup.rule) {
        Err(CaptureError::Failed { stderr, .. }) if stderr.contains("File exists") => Ok(()),
        other => other,
    }
}

/// A host booted with ipv6.disable=1 has no IPv6 routing to set up.
fn family_present(family: &str) -> bool {
    family == "-4" || std::path::Path::new("/proc/net/if_inet6").exists()
}

fn nft(input: &str) -> Result<(), CaptureError> {
    run("nft", "nftables", &["-f".into(), "-".into()], input)
}

fn ip(family: &str, arguments: &[String]) -> Result<(), CaptureError> {
    let mut all = vec![family.to_owned()];
    all.extend_from_slice(arguments);
    run("ip", "iproute2", &all, "")
}

fn run(tool: &'static str, package: &'static str, arguments: &[String], input: &str) -> Result<(), CaptureError> {
    let missing = |source| CaptureError::Missing { tool, package, source };
    let mut child = Command::new(tool)
        .args(arguments)
        // Debian keeps both in /usr/sbin, which an unprivileged user's PATH may lack.
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(missing)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ends early reports why on stderr; the broken pipe itself says nothing.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(missing)?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(CaptureError::Failed { command: format!("{tool} {}", arguments.join(" ")), stderr })
}
