//! cgroup-v2 directories that look like systemd's: `<lab>.slice/<host>.slice/<unit>.service`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::wait;

/// Where cgroup2 is mounted; hybrid machines have it beside the v1 hierarchies.
pub(crate) fn mount_point() -> Option<PathBuf> {
    mount_in(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

fn mount_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        filesystem.starts_with("cgroup2 ").then(|| PathBuf::from(mount.split(' ').nth(4).unwrap_or_default()))
    })
}

/// The slice of one lab, or None where cgroup2 is absent or not ours to write.
pub(crate) fn create_slice(lab: &str) -> Option<PathBuf> {
    let slice = mount_point()?.join(slice_name(lab));
    fs::create_dir_all(&slice).ok()?;
    Some(slice)
}

/// Kills what is left in the lab's own slice (and nothing else), then removes its directories.
pub(crate) fn remove_slice(lab: &str) {
    let Some(slice) = mount_point().map(|mount| mount.join(slice_name(lab))) else { return };
    if !slice.exists() {
        return;
    }
    let _ = fs::write(slice.join("cgroup.kill"), "1");
    let _ = wait::until(Duration::from_secs(5), "processes of the lab to end", || remove_tree(&slice));
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
        assert_eq!(mount_in("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), None);
    }
}
