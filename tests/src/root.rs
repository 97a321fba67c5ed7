//! Network namespaces need root: get it, and give back what it made.

use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::packages::find;

/// Variables that sudo would take away and a Rust toolchain needs.
const KEPT: [&str; 5] = ["PATH", "CARGO_HOME", "RUSTUP_HOME", "CARGO_TARGET_DIR", "CI"];

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Returns as root, or does not return: the program runs again under sudo with the same arguments and `marks` set.
pub fn become_root(why: &str, marks: &[(&str, &str)]) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    if find("sudo").is_none() {
        bail!("{why} needs root (network namespaces) and there is no sudo here; run as root: {command}");
    }
    println!("{why} needs root (network namespaces); running again with sudo.");
    let kept = KEPT.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
    let marks = marks.iter().map(|(name, value)| (*name, OsString::from(value)));
    let assignments = kept.chain(marks).map(|(name, value)| {
        let mut word = OsString::from(name);
        word.push("=");
        word.push(value);
        word
    });
    let program = std::env::current_exe()?;
    let failed = Command::new("sudo")
        .arg("-E")
        .arg("env")
        .args(assignments)
        .arg(program)
        .args(std::env::args_os().skip(1))
        .exec();
    bail!("cannot run sudo: {failed}; run as root: {command}")
}

/// Under sudo, gives files that root made below `directory` to the calling user. Links are not followed.
pub fn give_back(directory: &Path) {
    let caller = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    let (Some(uid), Some(gid)) = (caller("SUDO_UID"), caller("SUDO_GID")) else { return };
    if is_root() && uid != 0 {
        give(directory, uid, gid);
    }
}

fn give(path: &Path, uid: u32, gid: u32) {
    let Ok(about) = path.symlink_metadata() else { return };
    if about.uid() == 0 {
        let _ = lchown(path, Some(uid), Some(gid));
    }
    if about.is_dir() {
        for entry in std::fs::read_dir(path).into_iter().flatten().filter_map(Result::ok) {
            give(&entry.path(), uid, gid);
        }
    }
}
