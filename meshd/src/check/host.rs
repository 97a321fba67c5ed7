//! What meshd may do on this host, and where it writes.

use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::finding::Finding;
use crate::config::Config;
use crate::host::effective_capabilities as effective;

/// linux/capability.h
const CAP_NET_ADMIN: u32 = 12;

pub(super) struct HostFacts {
    /// Effective capabilities of this process; None if the kernel does not say.
    capabilities: Option<u64>,
    /// Directories, what ours are for, and why they cannot be written.
    directories: Vec<(PathBuf, Result<(), String>)>,
}

impl HostFacts {
    pub(super) fn gather(config: &Config) -> HostFacts {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let directories = [&config.state_dir, &config.run_dir];
        HostFacts {
            capabilities: effective(&status),
            directories: directories.map(|directory| (directory.clone(), writable(directory))).into(),
        }
    }
}

/// What is not there yet is made in the nearest directory above it.
fn writable(directory: &Path) -> Result<(), String> {
    let existing = directory.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    access(existing, AccessFlags::W_OK | AccessFlags::X_OK)
        .map_err(|error| format!("{}: {}", existing.display(), error.desc()))
}

pub(super) fn judge(facts: &HostFacts) -> Vec<Finding> {
    vec![capabilities(facts.capabilities), directories(&facts.directories)]
}

fn capabilities(effective: Option<u64>) -> Finding {
    let check = "rules and routes may be changed";
    match effective {
        Some(bits) if bits & (1 << CAP_NET_ADMIN) != 0 => Finding::ok(check, "CAP_NET_ADMIN"),
        _ => Finding::failed(
            check,
            "CAP_NET_ADMIN is missing",
            "run this as root; in a container, add the capability NET_ADMIN",
        ),
    }
}

fn directories(directories: &[(PathBuf, Result<(), String>)]) -> Finding {
    let check = "state and run directories can be written";
    let broken: Vec<&str> =
        directories.iter().filter_map(|(_, writable)| writable.as_ref().err().map(String::as_str)).collect();
    match broken.is_empty() {
        true => {
            let names: Vec<String> = directories.iter().map(|(path, _)| path.display().to_string()).collect();
            Finding::ok(check, names.join(", "))
        }
        false => Finding::failed(
            check,
            broken.join("; "),
            "run this as root, remount read-write, or set state_dir and run_dir in meshd.toml",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn the_right_to_change_rules_is_read_from_the_kernel() {
        let of = |status: &str| capabilities(effective(status)).verdict;
        assert_eq!(of("CapEff:\t000001ffffffffff\n"), Verdict::Ok);
        assert_eq!(of("CapEff:\t0000000000001000\n"), Verdict::Ok);
        assert_eq!(of("CapEff:\t0000000000000400\n"), Verdict::Failed);
        assert_eq!(of(""), Verdict::Failed);
    }

    #[test]
    fn a_directory_to_be_made_is_judged_by_where_it_would_be() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(writable(&dir.path().join("not/there/yet")), Ok(()));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let below = writable(&file.join("state")).unwrap_err();
        assert!(below.starts_with(&file.display().to_string()), "{below}");
        assert_eq!(directories(&[("/x".into(), Err(below))]).verdict, Verdict::Failed);
    }
}
