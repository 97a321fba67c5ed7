//! Which processes hold a socket, and whether they are what a guard asks for.
//!
//! The kernel tells the unit and user of a socket, not its process. So the processes of that unit with that user are
//! looked at. Where all of them meet the guard, it does not matter which of them it is; else those that hold the socket
//! must meet it, all of them. Who holds what takes CAP_SYS_PTRACE to see; without it every one may, and so every one must
//! meet the guard.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use meshd_identity::{ProcessSelector, SpiffeId};
use meshd_sys::peer::Process;
use meshd_sys::sock_diag::{Lookup, SocketDiag};

use super::descriptors::{Holds, holds};
use super::{Attestor, TooSlow, user_of};
use crate::enrol::{Cgroup, Guard, Owner, find_cgroups, unit_of_process};

/// Processes of one unit, or user without units, that are looked at.
const MOST_PROCESSES: usize = 4096;
const MAX_DEPTH: usize = 24;
const UNITS_REMEMBERED: usize = 256;
/// Before a connection is refused, and the time between them: starting a program takes less.
const LOOKS: u32 = 3;
const REST: Duration = Duration::from_millis(5);

/// A connection, as the process that made it sees it.
#[derive(Clone, Debug)]
pub struct Socket {
    pub owner: Owner,
    pub inode: u32,
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unproven {
    #[error("the process is not {0}, which the PKI's entry asks for")]
    Unmet(ProcessSelector),
    #[error("no process holds the connection any more, and the PKI's entry asks what that process is")]
    NoHolder,
    #[error("{0} processes could hold the connection, too many to look at")]
    TooMany(usize),
    #[error("the kernel does not answer who holds the connection: {0}")]
    NoAnswer(String),
    #[error(transparent)]
    TooSlow(#[from] TooSlow),
}

/// A process that is alive, of the unit and user in question.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Meets(i32),
    /// What it does not meet, and whether it holds the socket.
    Lacks(ProcessSelector, Holds),
}

impl Attestor {
    /// Whether whoever holds the socket meets the guard of an identity. Looks on a thread of its own.
    pub async fn prove(
        self: &Arc<Attestor>,
        identity: &SpiffeId,
        socket: &Socket,
        guard: &Arc<Guard>,
    ) -> Result<(), Unproven> {
        let mut looks = 1;
        loop {
            let (socket, guard) = (socket.clone(), guard.clone());
            let looked = self.look(identity.as_str(), move |attestor| attestor.holders(&socket, &guard)).await?;
            match looked {
                // A helper that is being started has the sockets of who starts it until its descriptors are closed.
                Err(Unproven::Unmet(_)) if looks < LOOKS => tokio::time::sleep(REST).await,
                proved => return proved,
            }
            looks += 1;
        }
    }

    fn holders(&self, socket: &Socket, guard: &Guard) -> Result<(), Unproven> {
        let no_answer = |error: io::Error| Unproven::NoAnswer(error.to_string());
        let candidates = self.processes_of(&socket.owner).map_err(no_answer)?;
        if candidates.len() > MOST_PROCESSES {
            return Err(Unproven::TooMany(candidates.len()));
        }
        let of_user = |process: &Owner| process.uid == socket.owner.uid;
        let seen: Vec<Seen> = candidates.iter().filter_map(|pid| self.see(*pid, socket, guard, &of_user)).collect();
        let holds_it = |pid: i32| holds(pid, socket.inode) == Holds::Yes && self.meets(pid, socket, guard);
        match judge(&seen, holds_it) {
            // Its process may have been of another user when it opened it.
            Err(Unproven::NoHolder) => self.of_other_users(&candidates, socket, guard)?,
            judged => judged?,
        }
        // What ended meanwhile was not seen: then the socket is nobody's now.
        match SocketDiag::open().and_then(|mut diag| diag.owner(socket.local, socket.remote)).map_err(no_answer)? {
            Lookup::Owned(owner) if owner.inode == socket.inode => Ok(()),
            _ => Err(Unproven::NoHolder),
        }
    }

    /// Those of the unit that are certain to hold it, whoever they are by now.
    fn of_other_users(&self, candidates: &[i32], socket: &Socket, guard: &Guard) -> Result<(), Unproven> {
        if socket.owner.unit.is_none() {
            return Err(Unproven::NoHolder);
        }
        let holders = candidates.iter().filter(|pid| holds(**pid, socket.inode) == Holds::Yes);
        let seen: Vec<Seen> = holders.filter_map(|pid| self.see(*pid, socket, guard, &|_| true)).collect();
        judge(&seen, |_| true)
    }

    /// None for a process that has ended, or is none of the unit's or of those `is_one_of_them` asks for.
    fn see(&self, pid: i32, socket: &Socket, guard: &Guard, is_one_of_them: &dyn Fn(&Owner) -> bool) -> Option<Seen> {
        let process = Process::open(pid).ok()?;
        let (uid, gid) = user_of(pid).ok()?;
        let (unit, has_cgroup) = unit_of_process(pid).ok()?;
        let owner = Owner { unit, has_cgroup, uid };
        if owner.unit != socket.owner.unit || !is_one_of_them(&owner) {
            return None;
        }
        let program = guard.needs_program().then(|| self.program(pid)).flatten();
        let facts = self.process_facts(owner, gid, program.as_ref(), guard);
        let seen = match guard.unmet(&facts) {
            None => Seen::Meets(pid),
            Some(unmet) => Seen::Lacks(unmet.clone(), holds(pid, socket.inode)),
        };
        process.lives().then_some(seen)
    }

    /// By number. Of a unit, whatever it has made below itself; of a user in no unit, all of that user.
    fn processes_of(&self, owner: &Owner) -> io::Result<Vec<i32>> {
        let mut found = Vec::new();
        if let Some(unit) = &owner.unit {
            if let Some(cgroup) = self.cgroup_of(unit) {
                below(&cgroup.directory(), MAX_DEPTH, &mut found)?;
            }
            return Ok(found);
        }
        let names = fs::read_dir("/proc")?.flatten().map(|entry| entry.file_name());
        found.extend(names.filter_map(|name| name.to_str()?.parse::<i32>().ok()).filter(|pid| is_of(*pid, owner.uid)));
        Ok(found)
    }

    /// Found by going through all units, once for as long as it is there.
    fn cgroup_of(&self, unit: &Arc<str>) -> Option<Cgroup> {
        let mut cgroups = self.cgroups.lock().unwrap_or_else(PoisonError::into_inner);
        if !cgroups.get(unit).is_some_and(Cgroup::exists) {
            if cgroups.len() >= UNITS_REMEMBERED {
                cgroups.clear();
            }
            cgroups.remove(unit);
            let found = find_cgroups(&BTreeSet::from([&**unit])).remove(&**unit)?;
            cgroups.insert(unit.clone(), found);
        }
        cgroups.get(unit).cloned()
    }

    fn meets(&self, pid: i32, socket: &Socket, guard: &Guard) -> bool {
        matches!(self.see(pid, socket, guard, &|_| true), Some(Seen::Meets(_)))
    }
}

/// `holds_it`: whether a process that meets the guard is certain to hold it.
fn judge(seen: &[Seen], holds_it: impl Fn(i32) -> bool) -> Result<(), Unproven> {
    let lacking = |which| {
        seen.iter().find_map(|one| match one {
            Seen::Lacks(unmet, holds) if *holds == which => Some(unmet.clone()),
            _ => None,
        })
    };
    let mut meeting = seen.iter().filter_map(|one| match one {
        Seen::Meets(pid) => Some(*pid),
        Seen::Lacks(..) => None,
    });
    match (lacking(Holds::Yes), lacking(Holds::Perhaps)) {
        (Some(unmet), _) => Err(Unproven::Unmet(unmet)),
        // Another one is seen holding it, and so this one is not the one.
        (None, Some(unmet)) => meeting.any(holds_it).then_some(()).ok_or(Unproven::Unmet(unmet)),
        // Also one that is in nobody's table, on its way to somebody, may be the connection of one that does not meet it.
        (None, None) if lacking(Holds::No).is_some() => meeting.any(holds_it).then_some(()).ok_or(Unproven::NoHolder),
        (None, None) if meeting.next().is_none() => Err(Unproven::NoHolder),
        (None, None) => Ok(()),
    }
}

/// Also where its directory is root's, as of a process that may not be traced (proc(5)).
fn is_of(pid: i32, uid: u32) -> bool {
    let Ok(directory) = fs::metadata(format!("/proc/{pid}")) else { return false };
    match directory.uid() {
        0 => user_of(pid).is_ok_and(|(user, _)| user == uid),
        owner => owner == uid,
    }
}

fn below(directory: &Path, depth: usize, found: &mut Vec<i32>) -> io::Result<()> {
    if found.len() > MOST_PROCESSES {
        return Ok(());
    }
    // Of a threaded cgroup the kernel lists none here; its processes are listed above it.
    let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    found.extend(listed.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
    if depth == 0 {
        return Ok(());
    }
    for entry in fs::read_dir(directory)?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        // One that is gone by now has no processes.
        _ = below(&entry.path(), depth - 1, found);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::super::Program;
    use super::*;
    use crate::enrol::{Selector, Sight};

    #[test]
    fn whoever_holds_it_must_meet_the_guard_and_where_nobody_can_tell_whoever_may() {
        let lacks = |holds| Seen::Lacks(ProcessSelector::Gid(7), holds);
        let unmet = Err(Unproven::Unmet(ProcessSelector::Gid(7)));
        let (meets, nobody, somebody) = (|| Seen::Meets(1), |_| false, |pid| pid == 1);
        assert_eq!(judge(&[], somebody), Err(Unproven::NoHolder));
        assert_eq!(judge(&[lacks(Holds::No)], somebody), Err(Unproven::NoHolder));
        assert_eq!(judge(&[meets()], nobody), Ok(()), "whichever of them it is");
        assert_eq!(judge(&[meets(), lacks(Holds::No)], nobody), Err(Unproven::NoHolder), "it is hidden");
        assert_eq!(judge(&[meets(), lacks(Holds::No)], somebody), Ok(()));
        assert_eq!(judge(&[meets(), lacks(Holds::Yes)], somebody), unmet);
        assert_eq!(judge(&[meets(), lacks(Holds::Perhaps)], nobody), unmet);
        assert_eq!(judge(&[meets(), lacks(Holds::Perhaps)], somebody), Ok(()), "it is seen elsewhere");
        assert_eq!(judge(&[lacks(Holds::Perhaps)], somebody), unmet);
    }

    #[test]
    fn processes_of_a_user_are_listed_and_those_of_others_are_not() {
        let own = std::process::id().cast_signed();
        let (uid, _) = user_of(own).unwrap();
        assert!(is_of(own, uid) && !is_of(own, uid + 1));
        let attestor = Attestor::default();
        let all = attestor.processes_of(&Owner { unit: None, has_cgroup: false, uid }).unwrap();
        assert!(all.contains(&own));
        assert!(attestor.processes_of(&Owner { unit: None, has_cgroup: false, uid: 4_000_000 }).unwrap().is_empty());
    }

    #[tokio::test]
    async fn the_program_that_holds_a_connection_is_told_from_another() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let Lookup::Owned(found) = SocketDiag::open().unwrap().owner(local, remote).unwrap() else { panic!() };
        let (_, gid) = user_of(std::process::id().cast_signed()).unwrap();
        // Without a unit: all processes of the user are looked at.
        let (unit, has_cgroup) = unit_of_process(std::process::id().cast_signed()).unwrap();
        let socket = Socket { owner: Owner { unit, has_cgroup, uid: found.uid }, inode: found.inode, local, remote };
        let attestor = Arc::new(Attestor::new(Sight::On));
        let own = Program::of(std::process::id().cast_signed()).unwrap();
        let (hash, facts) = (attestor.measure(&own).unwrap(), attestor.facts(&own));
        let guard = |selectors: &[String]| {
            let selectors = ProcessSelector::parse_all(selectors).unwrap();
            Arc::new(Guard::of(&Selector::Uid(found.uid), selectors))
        };
        let id = "spiffe://mesh.example/ns/shop/sa/web".parse().unwrap();
        let path = format!("unix:path:{}", facts.path.unwrap());
        let hash = ProcessSelector::Sha256(hash).to_string();
        let right = guard(&[path.clone(), hash, format!("unix:gid:{gid}")]);
        assert_eq!(attestor.prove(&id, &socket, &right).await, Ok(()));
        for wrong in ["unix:path:/bin/cat".to_owned(), format!("unix:gid:{}", gid + 1)] {
            let selector = wrong.parse().unwrap();
            assert_eq!(attestor.prove(&id, &socket, &guard(&[wrong])).await, Err(Unproven::Unmet(selector)));
        }
        drop(client);
        // Of other users' processes it may not be seen that they do not hold it.
        let gone = attestor.prove(&id, &socket, &guard(&[path])).await;
        assert!(matches!(gone, Err(Unproven::NoHolder | Unproven::Unmet(_))), "{gone:?}");
    }
}
