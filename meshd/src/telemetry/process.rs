//! `process_*` metrics, read from /proc when somebody scrapes (Prometheus client conventions).

use super::Exposition;

pub(super) fn metrics() -> Vec<Exposition> {
    let single = |value: f64| vec![(Vec::new(), value)];
    let mut metrics = Vec::new();
    if let Some((cpu_seconds, resident_bytes)) = stat() {
        metrics.push(Exposition::counter("process_cpu_seconds", "User and system CPU time", single(cpu_seconds)));
        metrics.push(Exposition::gauge("process_resident_memory_bytes", "Resident memory", single(resident_bytes)));
    }
    if let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") {
        metrics.push(Exposition::gauge("process_open_fds", "Open descriptors", single(descriptors.count() as f64)));
    }
    metrics
}

/// utime + stime and rss of /proc/self/stat (fields 14, 15, 24 of proc_pid_stat(5)).
fn stat() -> Option<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The command name may hold anything; fields count from after its closing parenthesis.
    let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
    // USER_HZ is 100 on every architecture Linux runs Rust on; pages are 4 KiB on those we ship.
    Some(((field(14)? + field(15)?) / 100.0, field(24)? * 4096.0))
}
