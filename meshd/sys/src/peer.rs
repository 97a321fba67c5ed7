//! Processes held by a descriptor, as the one at the other end of a Unix socket: while it is held, whether the process still
//! lives can be told, so that its number is never taken for that of another one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

/// Who connected, as the kernel wrote it down at that moment.
#[derive(Debug)]
pub struct Peer {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
    process: Process,
}

/// A process held.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Whoever has the number now; an error if nobody has.
    pub fn open(pid: i32) -> io::Result<Process> {
        pidfd_open(pid).map(Process)
    }

    /// False from the moment it ends, also while nobody has waited for it.
    pub fn lives(&self) -> bool {
        let mut ended = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut ended, PollTimeout::ZERO).is_ok_and(|ready| ready == 0)
    }
}

/// Whether two threads have one table of descriptors; None where the kernel does not say.
pub fn share_descriptors(one: i32, other: i32) -> Option<bool> {
    /// linux/kcmp.h
    const KCMP_FILES: i32 = 2;
    // SAFETY: takes five numbers and no pointer.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) } {
        0 => Some(true),
        1..=3 => Some(false),
        _ => None,
    }
}

impl Peer {
    /// An error if the process has ended, or is none of this pid namespace.
    pub fn of(socket: &impl AsFd) -> io::Result<Peer> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        let (pid, uid, gid) = (credentials.pid(), credentials.uid(), credentials.gid());
        if pid <= 0 {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the caller is not in a pid namespace below meshd's"));
        }
        let process = match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(process) => process,
            // Before Linux 6.5. By number: whoever uses it compares its user with the one that connected.
            Err(Errno::ENOPROTOOPT) => pidfd_open(pid)?,
            Err(error) => return Err(error.into()),
        };
        Ok(Peer { pid, uid, gid, process: Process(process) })
    }

    /// False from the moment it ends, also while nobody has waited for it.
    pub fn lives(&self) -> bool {
        self.process.lives()
    }
}

fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers and no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let Ok(fd @ 0..) = i32::try_from(fd) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has just made it, close-on-exec, and nobody else knows it.
    let process = unsafe { OwnedFd::from_raw_fd(fd) };
    debug_assert_eq!(process.as_raw_fd(), fd);
    Ok(process)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    #[test]
    fn threads_share_their_descriptors_and_processes_do_not() {
        let own = std::process::id().cast_signed();
        let thread = std::thread::spawn(|| nix::unistd::gettid().as_raw());
        let other = std::thread::spawn(move || {
            let thread = nix::unistd::gettid().as_raw();
            // A kernel built without CONFIG_KCMP answers nothing.
            share_descriptors(own, thread) != Some(false)
        });
        assert!(other.join().unwrap());
        let gone = thread.join().unwrap();
        assert!(!matches!(share_descriptors(own, gone), Some(true)));
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        assert_ne!(share_descriptors(own, child.id().cast_signed()), Some(true));
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn whoever_made_the_connection_is_named_and_lives() {
        let (here, _there) = UnixStream::pair().unwrap();
        let peer = Peer::of(&here).unwrap();
        assert_eq!((peer.pid, peer.uid), (std::process::id().cast_signed(), nix::unistd::getuid().as_raw()));
        assert!(peer.lives());
    }

    #[test]
    fn a_process_that_ended_does_not_live_also_before_anybody_waits_for_it() {
        let mut child = Command::new("true").spawn().unwrap();
        let process = Process::open(child.id().cast_signed()).unwrap();
        let peer = Peer { pid: child.id().cast_signed(), uid: 0, gid: 0, process };
        while peer.lives() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!peer.lives());
        assert!(Process::open(i32::MAX).is_err());
    }
}
