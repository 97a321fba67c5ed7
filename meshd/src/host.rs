//! What kind of host this is.

use std::path::Path;

/// A host booted with ipv6.disable=1 has none.
pub(crate) fn has_ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

/// sd_booted(3).
pub(crate) fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Whether our network namespace is the one of process 1; None where /proc hides it.
pub(crate) fn in_namespace_of_process_1() -> Option<bool> {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    Some(namespace("self")? == namespace("1")?)
}

/// Of a /proc/PID/status.
pub(crate) fn effective_capabilities(status: &str) -> Option<u64> {
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(bits.trim(), 16).ok()
}
