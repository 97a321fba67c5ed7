//! cgroup-v2 directories that look like systemd's: `<lab>.slice/<host>.slice/<unit>.service`, and for a machine with a
//! systemd of its own `<lab>.slice/<host>.machine`, that one in every hierarchy.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::{AccessFlags, access};

use crate::wait;

/// Where cgroup2 is mounted; hybrid machines have it beside the v1 hierarchies.
pub(crate) fn mount_point() -> Option<PathBuf> {
    mount_in(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

fn mount_in(mountinfo: &str) -> Option<PathBuf> {
    mounts_in(mountinfo, &["cgroup2"]).into_iter().next()
}

/// Where cgroups are: the v1 hierarchies, if any, and cgroup2.
fn hierarchies() -> Vec<PathBuf> {
    mounts_in(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(), &["cgroup", "cgroup2"])
}

fn mounts_in(mountinfo: &str, kinds: &[&str]) -> Vec<PathBuf> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let is_wanted = kinds.contains(&filesystem.split(' ').next()?);
        is_wanted.then(|| PathBuf::from(mount.split(' ').nth(4).unwrap_or_default()))
    });
    mounts.collect()
}

/// The slice of one lab, or None where cgroup2 is absent or not ours to write.
pub(crate) fn create_slice(lab: &str) -> Option<PathBuf> {
    let slice = mount_point()?.join(slice_name(lab));
    fs::create_dir_all(&slice).ok()?;
    Some(slice)
}

pub(crate) fn is_writable() -> bool {
    mount_point().is_some_and(|mount| access(&mount, AccessFlags::W_OK).is_ok())
}

pub(crate) struct MachineCgroups {
    pub(crate) unified: PathBuf,
    pub(crate) all: Vec<PathBuf>,
}

/// A machine's own cgroup in each hierarchy: what its systemd does there is nobody else's business.
pub(crate) fn create_machine(lab: &str, machine: &str) -> Result<MachineCgroups> {
    let own = PathBuf::from(slice_name(lab)).join(format!("{machine}.machine"));
    let unified = mount_point().context("cgroup2 is not mounted")?.join(&own);
    let all: Vec<PathBuf> = hierarchies().into_iter().map(|mount| mount.join(&own)).collect();
    for cgroup in &all {
        fs::create_dir_all(cgroup).with_context(|| format!("cannot create {}", cgroup.display()))?;
        let slice = cgroup.parent().context("a cgroup has a parent")?;
        give_processors(slice)?;
        give_processors(cgroup)?;
    }
    Ok(MachineCgroups { unified, all })
}

/// A new v1 cpuset has no processors and takes no process until it is given some.
fn give_processors(cgroup: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let is_v1 = cgroup.join("cpuset.memory_pressure").exists();
        if let (true, Some(parent)) = (is_v1, cgroup.parent()) {
            fs::write(cgroup.join(file), fs::read(parent.join(file))?)?;
        }
    }
    Ok(())
}

/// Kills what is left in the lab's own slice (and nothing else), then removes its directories.
pub(crate) fn remove_slice(lab: &str) {
    let Some(slice) = mount_point().map(|mount| mount.join(slice_name(lab))) else { return };
    if !slice.exists() {
        return;
    }
    let _ = fs::write(slice.join("cgroup.kill"), "1");
    // The unified one, by which a sweep knows the lab, goes last.
    let mut slices: Vec<_> = hierarchies().into_iter().map(|mount| mount.join(slice_name(lab))).collect();
    slices.sort_by_key(|found| *found == slice);
    for slice in slices {
        let _ = wait::until(Duration::from_secs(5), "processes of the lab to end", || remove_tree(&slice));
    }
}

/// Names of labs that have a slice, for the sweep.
pub(crate) fn labs() -> Vec<String> {
    let Some(entries) = mount_point().and_then(|mount| fs::read_dir(mount).ok()) else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".slice").map(str::to_owned))
        .collect()
}

/// systemd reads `-` in a slice name as nesting, so the name has none.
fn slice_name(lab: &str) -> String {
    format!("{}.slice", lab.replace('-', ""))
}

fn remove_tree(directory: &Path) -> bool {
    if let Ok(entries) = fs::read_dir(directory) {
        for entry in entries.filter_map(Result::ok).filter(|entry| entry.path().is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(directory).is_ok() || !directory.exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_unified_hierarchy_beside_v1() {
        let mountinfo = "40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
                         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_in(mountinfo), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        let both = ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        assert_eq!(mounts_in(mountinfo, &["cgroup", "cgroup2"]), both);
        assert_eq!(mount_in("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }
}
