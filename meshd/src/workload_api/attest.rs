//! WHO calls: the process that made the connection, mapped to an enrolled workload by the same rules as a captured
//! connection (`proxy/identify.rs`).
//!
//! The kernel holds on to the process for us, so its number means nobody else while it lives; that it does is asked
//! last, after all that was read by number.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use meshd_sys::peer::Peer;

use crate::enrol::{self, Enrolment, PortWatch, Workload};

/// The caller of one connection. What it may have is asked anew for every answer.
#[derive(Debug)]
pub(super) struct Caller {
    peer: Peer,
}

/// What is known of a caller at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) unit: Option<Arc<str>>,
    /// Whether the kernel told its cgroup, of a unit or not.
    pub(super) has_cgroup: bool,
    pub(super) uid: u32,
}

/// Why a caller is nobody.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unattested {
    /// It has ended, whoever holds its connection now.
    Gone,
    /// It is not who it was when it connected.
    Changed,
    Unenrolled(Facts),
}

impl Caller {
    pub(super) fn of(peer: Peer) -> Caller {
        Caller { peer }
    }

    pub(super) fn workload(
        &self,
        enrolment: &Enrolment,
        ports: &PortWatch,
        now: Instant,
    ) -> Result<Arc<Workload>, Unattested> {
        let facts = self.facts()?;
        let found = enrolment.workload_of(facts.unit.as_ref(), facts.uid).or_else(|| {
            ports.workload_of(enrolment, facts.unit.as_ref(), (!facts.has_cgroup).then_some(facts.uid), now)
        });
        found.cloned().ok_or(Unattested::Unenrolled(facts))
    }

    pub(super) fn facts(&self) -> Result<Facts, Unattested> {
        // Both fail once the process is gone.
        let (unit, has_cgroup) = enrol::unit_of_process(self.peer.pid).map_err(|_| Unattested::Gone)?;
        let user = user_of(self.peer.pid).map_err(|_| Unattested::Gone)?;
        if !self.peer.lives() {
            return Err(Unattested::Gone);
        }
        // Also whoever took the number over before kernels gave us a handle of the process (before 6.5).
        if user != (self.peer.uid, self.peer.gid) {
            return Err(Unattested::Changed);
        }
        Ok(Facts { unit, has_cgroup, uid: self.peer.uid })
    }
}

impl Facts {
    /// As `meshd enrol` takes it.
    pub(super) fn selector(&self) -> String {
        self.unit.as_ref().map_or_else(|| format!("--uid {}", self.uid), ToString::to_string)
    }
}

/// Effective user and group.
fn user_of(pid: i32) -> io::Result<(u32, u32)> {
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
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::enrol::Reserved;

    fn enrolled(text: &str) -> Enrolment {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.toml"), text).unwrap();
        let reserved = Reserved { listeners: Vec::new(), virtual_ips: Vec::new() };
        enrol::load(dir.path(), &"mesh.example".parse().unwrap(), &reserved).unwrap()
    }

    fn this_process() -> Caller {
        let (here, _there) = UnixStream::pair().unwrap();
        Caller::of(Peer::of(&here).unwrap())
    }

    #[test]
    fn the_caller_is_the_workload_its_unit_or_user_is_enrolled_as() {
        let caller = this_process();
        let facts = caller.facts().unwrap();
        assert_eq!((facts.uid, &facts.unit), (nix::unistd::getuid().as_raw(), &enrol::own_unit()));
        let by_user = format!("[[workload]]\nuid = {}\nnamespace = \"shop\"\nname = \"web\"\n", facts.uid);
        let found = caller.workload(&enrolled(&by_user), &PortWatch::default(), Instant::now()).unwrap();
        assert_eq!(found.identity.short(), "ns/shop/sa/web");
        let nobody = caller.workload(&Enrolment::default(), &PortWatch::default(), Instant::now());
        assert_eq!(nobody.unwrap_err(), Unattested::Unenrolled(facts));
    }

    #[test]
    fn whoever_changed_its_user_since_it_connected_is_nobody() {
        let mut caller = this_process();
        caller.peer.gid += 1;
        assert_eq!(caller.facts(), Err(Unattested::Changed));
    }

    #[test]
    fn the_effective_user_counts() {
        let status = "Name:\tUid:\nUid:\t1000\t0\t0\t0\nGid:\t1000\t7\t1000\t1000\n";
        assert_eq!(user_in(status), Some((0, 7)));
        assert_eq!(user_in("Name:\tx\n"), None);
    }
}
