//! The one list of system packages that demo, test and bench need, and the program each is needed for.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

pub struct Package {
    pub name: &'static str,
    pub program: &'static str,
}

const fn package(name: &'static str, program: &'static str) -> Package {
    Package { name, program }
}

/// Debian and Ubuntu names.
pub const FOR_LABS: &[Package] = &[
    package("iproute2", "ip"),
    package("nftables", "nft"),
    package("iptables", "iptables-nft"),
    package("util-linux", "nsenter"),
    package("util-linux", "setpriv"),
    package("util-linux", "unshare"),
    package("mount", "mount"),
    package("libc-bin", "getent"),
    package("curl", "curl"),
    package("tcpdump", "tcpdump"),
    package("faketime", "faketime"),
    package("haproxy", "haproxy"),
    package("openssl", "openssl"),
];

/// What it takes to boot machines with a systemd of their own, beside what labs need.
pub const FOR_MACHINES: &[Package] = &[
    package("systemd-container", "systemd-nspawn"),
    package("mmdebstrap", "mmdebstrap"),
    package("openssh-client", "ssh"),
    package("openssh-client", "ssh-keygen"),
];

/// For clients of the Workload API that others wrote, which come from PyPI.
pub const FOR_CLIENTS: &[Package] =
    &[package("openssl", "openssl"), package("python3", "python3"), package("python3-venv", "python3")];

/// What unit and integration tests run besides our own programs, and what Kubernetes' API server stands on.
pub const FOR_TESTS: &[Package] = &[
    package("openssl", "openssl"),
    package("prometheus", "promtool"),
    package("etcd-server", "etcd"),
    package("etcd-client", "etcdctl"),
];

pub const FOR_BENCH: &[Package] = &[package("openssl", "openssl"), package("haproxy", "haproxy")];

/// Installs what is missing, or says in one line what to install.
pub fn ensure(wanted: &[&[Package]]) -> Result<()> {
    let missing = missing(wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !may_install() {
        bail!("missing system packages: {names}; install them (Debian, Ubuntu: apt-get install {names})");
    }
    println!("Installing system packages: {names}");
    apt_get(&["update", "-q"])?;
    apt_get(&[&["install", "-q", "-y", "--no-install-recommends"], &missing[..]].concat())?;
    keep_services_off(&missing);
    match self::missing(wanted)[..] {
        [] => Ok(()),
        ref still => bail!("still missing after apt-get: {}; install them by hand", still.join(" ")),
    }
}

fn may_install() -> bool {
    find("apt-get").is_some() && (crate::root::is_root() || find("sudo").is_some())
}

pub fn missing(wanted: &[&[Package]]) -> Vec<&'static str> {
    let mut names: Vec<_> = wanted.iter().copied().flatten().filter(|need| find(need.program).is_none()).collect();
    names.dedup_by_key(|need| need.name);
    names.into_iter().map(|need| need.name).collect()
}

/// A program on PATH, or where administrators' programs are.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    let mut directories = std::env::split_paths(&path).chain(administrators);
    directories.find_map(|directory| Some(directory.join(program)).filter(|path| path.is_file()))
}

fn apt_get(args: &[&str]) -> Result<()> {
    let mut command = if crate::root::is_root() { Command::new("env") } else { Command::new("sudo") };
    command.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get"]);
    let status = command.args(args).stdin(Stdio::null()).status()?;
    anyhow::ensure!(status.success(), "`apt-get {}` failed ({status}); install the packages by hand", args.join(" "));
    Ok(())
}

/// Debian starts what it installs (without systemd not in run level 1); the benchmark wants the program, not a service on the contributor's machine.
fn keep_services_off(installed: &[&str]) {
    if !Path::new("/run/systemd/system").exists() {
        return;
    }
    let services = [("haproxy", "haproxy"), ("prometheus", "prometheus"), ("etcd-server", "etcd")];
    for (_, service) in services.into_iter().filter(|(package, _)| installed.contains(package)) {
        crate::command::try_run("systemctl", &["disable", "--now", &format!("{service}.service")]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_once() {
        let wanted = [package("sh", "sh"), package("odd", "no-such-program"), package("odd", "nor-this")];
        assert_eq!(missing(&[&wanted]), ["odd"]);
    }
}
