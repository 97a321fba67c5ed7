//! Which processes hold a socket, and whether they are what a guard asks for.
//!
//! The kernel tells the unit and user of a socket, not its process. So the processes of that unit with that user are
//! looked at, and those that hold the socket must meet the guard, all of them. Who holds what takes CAP_SYS_PTRACE to
//! see; without it every one may, and so every one must meet the guard.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use meshd_identity::ProcessSelector;
use meshd_sys::peer::Process;
use meshd_sys::sock_diag::{Lookup, SocketDiag};

use super::{Attestor, user_of};
use crate::enrol::{Guard, Owner, ProcessFacts, find_cgroups, unit_of_process};

/// Processes of one unit, or user without units, that are looked at.
const MOST_PROCESSES: usize = 4096;
const MAX_DEPTH: usize = 24;
/// Before a connection is refused, and the time between them: starting a program takes less.
const LOOKS: u32 = 3;
const REST: Duration = Duration::from_millis(5);
/// The lines in question are the first ones (fs/proc/fd.c).
const FDINFO: u64 = 256;

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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Yes,
    No,
    /// It cannot be seen.
    Perhaps,
}

impl Attestor {
    /// Whether whoever holds the socket meets the guard. Looks on a thread of its own.
    pub async fn prove(self: &Arc<Attestor>, socket: Socket, guard: Arc<Guard>) -> Result<(), Unproven> {
        let no_answer = |error: &dyn std::fmt::Display| Unproven::NoAnswer(error.to_string());
        let _look = self.looks.acquire().await.map_err(|error| no_answer(&error))?;
        let mut looks = 1;
        loop {
            let (attestor, socket, guard) = (self.clone(), socket.clone(), guard.clone());
            let looked = tokio::task::spawn_blocking(move || attestor.look(&socket, &guard)).await;
            match looked.map_err(|error| no_answer(&error))? {
                // A helper that is being started has the sockets of who starts it until its descriptors are closed.
                Err(Unproven::Unmet(_)) if looks < LOOKS => tokio::time::sleep(REST).await,
                proved => return proved,
            }
            looks += 1;
        }
    }

    fn look(&self, socket: &Socket, guard: &Guard) -> Result<(), Unproven> {
        let no_answer = |error: io::Error| Unproven::NoAnswer(error.to_string());
        let candidates = processes_of(&socket.owner).map_err(no_answer)?;
        if candidates.len() > MOST_PROCESSES {
            return Err(Unproven::TooMany(candidates.len()));
        }
        let seen: Vec<(Holds, Option<ProcessSelector>)> =
            candidates.into_iter().filter_map(|pid| self.see(pid, socket, guard)).collect();
        judge(&seen)?;
        // What ended meanwhile was not seen: then the socket is nobody's now.
        match SocketDiag::open().and_then(|mut diag| diag.owner(socket.local, socket.remote)).map_err(no_answer)? {
            Lookup::Owned(owner) if owner.inode == socket.inode => Ok(()),
            _ => Err(Unproven::NoHolder),
        }
    }

    /// None for a process that has ended, is another user's or another unit's, or does not hold the socket.
    fn see(&self, pid: i32, socket: &Socket, guard: &Guard) -> Option<(Holds, Option<ProcessSelector>)> {
        let process = Process::open(pid).ok()?;
        let (uid, gid) = user_of(pid).ok()?;
        let (unit, has_cgroup) = unit_of_process(pid).ok()?;
        let owner = Owner { unit, has_cgroup, uid };
        if (owner.uid, &owner.unit) != (socket.owner.uid, &socket.owner.unit) {
            return None;
        }
        let holds = holds(pid, socket.inode);
        if holds == Holds::No {
            return None;
        }
        let program = guard.needs_program().then(|| self.program(pid)).flatten();
        let mut facts = ProcessFacts { owner, gid, program: program.as_ref().map(|program| self.facts(program)) };
        if let Some(program) = program.filter(|_| guard.needs_hash() && guard.unmet_but_hash(&facts).is_none()) {
            self.measure(&program);
            facts.program = Some(self.facts(&program));
        }
        process.lives().then(|| (holds, guard.unmet(&facts).cloned()))
    }
}

/// Those seen holding it, or all that may.
fn judge(seen: &[(Holds, Option<ProcessSelector>)]) -> Result<(), Unproven> {
    let certain = seen.iter().any(|(holds, _)| *holds == Holds::Yes);
    let holder = if certain { Holds::Yes } else { Holds::Perhaps };
    let mut holders = seen.iter().filter(|(holds, _)| *holds == holder).peekable();
    if holders.peek().is_none() {
        return Err(Unproven::NoHolder);
    }
    match holders.find_map(|(_, unmet)| unmet.clone()) {
        Some(unmet) => Err(Unproven::Unmet(unmet)),
        None => Ok(()),
    }
}

/// By number. Of a unit, whatever it has made below itself; of a user in no unit, all of the host.
fn processes_of(owner: &Owner) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    let Some(unit) = &owner.unit else {
        let names = fs::read_dir("/proc")?.flatten().map(|entry| entry.file_name());
        found.extend(names.filter_map(|name| name.to_str()?.parse::<i32>().ok()));
        return Ok(found);
    };
    if let Some(cgroup) = find_cgroups(&BTreeSet::from([&**unit])).get(&**unit) {
        below(&cgroup.directory(), MAX_DEPTH, &mut found)?;
    }
    Ok(found)
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

/// Of `fdinfo`, which tells mount and inode of each descriptor (`ino` since Linux 5.14), and is open to whoever may
/// look at the process.
fn holds(pid: i32, inode: u32) -> Holds {
    let Some(sockets) = mount_of_sockets() else { return Holds::Perhaps };
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return Holds::Perhaps };
    for descriptor in descriptors {
        let Ok(descriptor) = descriptor else { return Holds::Perhaps };
        match read_start(&descriptor.path()).map(|text| told(&text)) {
            Ok(Some(found)) if found == (sockets, inode.into()) => return Holds::Yes,
            Ok(Some(_)) => {}
            // Closed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(None) | Err(_) => return Holds::Perhaps,
        }
    }
    Holds::No
}

/// All sockets are of one mount that nothing else is of.
fn mount_of_sockets() -> Option<u64> {
    static MOUNT: OnceLock<Option<u64>> = OnceLock::new();
    *MOUNT.get_or_init(|| {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().ok()?;
        let text = read_start(Path::new(&format!("/proc/self/fdinfo/{}", socket.as_raw_fd()))).ok()?;
        told(&text).map(|(mount, _)| mount)
    })
}

fn read_start(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(FDINFO).read_to_string(&mut text)?;
    Ok(text)
}

/// Mount and inode.
fn told(fdinfo: &str) -> Option<(u64, u64)> {
    let number = |name: &str| fdinfo.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    Some((number("mnt_id:")?, number("ino:")?))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::process::{Command, Stdio};

    use super::super::{Program, Sight};
    use super::*;
    use crate::enrol::Selector;

    fn unmet() -> Option<ProcessSelector> {
        Some(ProcessSelector::Gid(7))
    }

    #[test]
    fn whoever_holds_it_must_meet_the_guard_and_where_nobody_can_tell_whoever_may() {
        assert_eq!(judge(&[]), Err(Unproven::NoHolder));
        assert_eq!(judge(&[(Holds::Yes, None), (Holds::Perhaps, unmet())]), Ok(()));
        for seen in [[(Holds::Yes, None), (Holds::Yes, unmet())], [(Holds::Perhaps, unmet()), (Holds::Perhaps, None)]] {
            assert_eq!(judge(&seen), Err(Unproven::Unmet(ProcessSelector::Gid(7))));
        }
        assert_eq!(judge(&[(Holds::Perhaps, None)]), Ok(()));
    }

    #[test]
    fn a_socket_is_found_with_the_process_that_holds_it_and_with_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, remote) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let Lookup::Owned(owner) = SocketDiag::open().unwrap().owner(local, remote).unwrap() else { panic!() };
        let own = std::process::id().cast_signed();
        assert_eq!(holds(own, owner.inode), Holds::Yes);
        let mut other = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        // Until it has closed what it was started with.
        while holds(other.id().cast_signed(), owner.inode) != Holds::No {
            std::thread::yield_now();
        }
        drop(other.stdin.take());
        other.wait().unwrap();
    }

    #[test]
    fn a_file_with_the_inode_of_a_socket_is_no_socket() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t9\nino:\t77\n";
        assert_eq!(told(text), Some((9, 77)));
        assert_eq!(told("pos:\t0\nflags:\t02\nmnt_id:\t9\n"), None, "before Linux 5.14");
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
        attestor.measure(&own);
        let facts = attestor.facts(&own);
        let guard = |selectors: &[String]| {
            let selectors = ProcessSelector::parse_all(selectors).unwrap();
            Arc::new(Guard::of(&Selector::Uid(found.uid), selectors))
        };
        let path = format!("unix:path:{}", facts.path.unwrap());
        let hash = ProcessSelector::Sha256(facts.sha256.unwrap()).to_string();
        let right = guard(&[path.clone(), hash, format!("unix:gid:{gid}")]);
        assert_eq!(attestor.prove(socket.clone(), right).await, Ok(()));
        for wrong in ["unix:path:/bin/cat".to_owned(), format!("unix:gid:{}", gid + 1)] {
            let selector = wrong.parse().unwrap();
            assert_eq!(attestor.prove(socket.clone(), guard(&[wrong])).await, Err(Unproven::Unmet(selector)));
        }
        drop(client);
        // Of other users' processes it may not be seen that they do not hold it.
        let gone = attestor.prove(socket, guard(&[path])).await;
        assert!(matches!(gone, Err(Unproven::NoHolder | Unproven::Unmet(_))), "{gone:?}");
    }
}
