//! What /proc tells of a process by its number. The number must mean the same process before and after.

use std::io;

/// Effective user and group.
pub fn user_of(pid: i32) -> io::Result<(u32, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    user_in(&status).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// `Uid:` and `Gid:` list the real, effective, saved and file system's one.
fn user_in(status: &str) -> Option<(u32, u32)> {
    let effective = |name: &str| {
        let ids = status.lines().find_map(|line| line.strip_prefix(name))?;
        ids.split_whitespace().nth(1)?.parse().ok()
    };
    Some((effective("Uid:")?, effective("Gid:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_user_counts() {
        let status = "Name:\tUid:\nUid:\t1000\t0\t0\t0\nGid:\t1000\t7\t1000\t1000\n";
        assert_eq!(user_in(status), Some((0, 7)));
        assert_eq!(user_in("Name:\tx\n"), None);
    }
}
