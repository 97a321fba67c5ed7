//! The Debian tree that all machines share, built once and kept outside the checkout.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache;
use crate::command;
use crate::daemon::UID;

const PACKAGES: &[&str] = &[
    "curl",
    "dbus",
    "iproute2",
    "iptables",
    "libpam-systemd",
    "nftables",
    "openssh-server",
    "polkitd",
    "systemd",
    "systemd-resolved",
    "systemd-sysv",
];

/// Nobody reads manuals here.
const LEFT_OUT: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

/// What a package of meshd would do, and what a machine without a clock, modules, a console or a resolver must not.
const FINISH: &str = r#"set -eu
root=$1
chroot "$root" groupadd --system --gid @UID@ meshd
chroot "$root" useradd --system --uid @UID@ --gid meshd --home-dir /var/lib/meshd --shell /usr/sbin/nologin meshd
systemctl --root="$root" --quiet mask systemd-resolved.service systemd-timesyncd.service getty.target \
    console-getty.service systemd-modules-load.service apt-daily.timer apt-daily-upgrade.timer
echo 'UseDNS no' >"$root/etc/ssh/sshd_config.d/tests.conf"
rm -f "$root/var/lib/dbus/machine-id" "$root/etc/resolv.conf"
: >"$root/etc/machine-id"
echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
install -d -m 700 "$root/root/.ssh"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
"#;

/// The tree's directory; builds it when it is not there, which takes half a minute and needs the package mirror.
pub(super) fn ensure() -> Result<PathBuf> {
    let release = release()?;
    cache::directory_of(&format!("{release}-{:016x}", recipe()), |tree| {
        println!("Building the tree that test machines boot from: {}", tree.display());
        build(&release, tree)
    })
}

fn recipe() -> u64 {
    let mut hasher = DefaultHasher::new();
    (PACKAGES, LEFT_OUT, FINISH).hash(&mut hasher);
    hasher.finish()
}

/// This machine's own release: what was built here runs there, and its mirror has it.
fn release() -> Result<String> {
    let about = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let name = about.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("test machines need a Debian or Ubuntu host, and /etc/os-release names no release")?.to_owned())
}

fn build(release: &str, target: &Path) -> Result<()> {
    let finish = target.with_extension("finish");
    fs::write(&finish, FINISH.replace("@UID@", &UID.to_string()))?;
    let excludes = LEFT_OUT.iter().map(|path| format!("--dpkgopt=path-exclude={path}"));
    let output = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args(excludes)
        .arg(format!("--customize-hook=sh {} \"$1\"", finish.display()))
        .arg(release)
        .arg(target)
        .arg(mirror(release)?)
        .output()
        .context("cannot run mmdebstrap")?;
    let _ = fs::remove_file(&finish);
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "mmdebstrap failed ({}):\n{said}", output.status);
    Ok(())
}

/// The mirror this machine installs its own packages from.
fn mirror(release: &str) -> Result<String> {
    let format = "$(RELEASE) $(COMPONENT) $(REPO_URI)";
    let listed = command::run("apt-get", &["indextargets", "--format", format, "Created-By: Packages"])?;
    let mirror = listed.lines().find_map(|line| line.strip_prefix(&format!("{release} main ")));
    Ok(mirror.with_context(|| format!("apt here has no source for {release} main:\n{listed}"))?.to_owned())
}
