//! One daemon per host, that is per network namespace: two would share listeners, rules and routes, and each would
//! undo what the other does.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{Domain, SockAddr, Socket, Type};

/// Abstract names belong to a network namespace, as our rules and routes do.
const NAME: &[u8] = b"meshd";

/// Held for life.
#[derive(Debug)]
pub struct OnlyOne {
    _lock: File,
}

#[derive(Debug, thiserror::Error)]
pub enum OnlyOneError {
    #[error("run_dir: {path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("another meshd{} uses {path}; stop it first (systemctl stop meshd)", process(*.pid))]
    SameDirectory { path: PathBuf, pid: Option<i32> },
    #[error(
        "another meshd{} runs on this host, with another run_dir; stop it first: both would change the same rules and \
         routes (a second one needs a network namespace of its own)", process(Some(*.pid))
    )]
    SameNamespace { pid: i32 },
    #[error("cannot make sure that no other meshd runs here: {0}")]
    Socket(io::Error),
}

fn process(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

impl OnlyOne {
    /// Within a runtime, which answers whoever asks who we are. Whoever owns `state_dir` is meshd's user, also when
    /// root starts another one.
    pub fn here(run_dir: &Path, state_dir: &Path) -> Result<OnlyOne, OnlyOneError> {
        let lock = lock_directory(run_dir)?;
        if let Some(listener) = lock_namespace(NAME, owner_of(state_dir))? {
            let listener = tokio::net::UnixListener::from_std(listener).map_err(OnlyOneError::Socket)?;
            // Accepting and closing keeps its queue empty: credentials are all that anybody wants of it.
            tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        }
        Ok(OnlyOne { _lock: lock })
    }
}

/// The process of the meshd of this host, also when it hangs. Whoever owns `state_dir` is meshd's user.
pub fn running(state_dir: &Path) -> Option<i32> {
    let service = owner_of(state_dir);
    holder(NAME).filter(|holder| holder.is_meshd(service)).map(|holder| holder.pid)
}

fn owner_of(state_dir: &Path) -> u32 {
    std::fs::metadata(state_dir).map_or(0, |found| found.uid())
}

fn lock_directory(run_dir: &Path) -> Result<File, OnlyOneError> {
    let path = run_dir.join("meshd.lock");
    let failed = |source| OnlyOneError::File { path: path.clone(), source };
    std::fs::create_dir_all(run_dir).map_err(failed)?;
    let mut lock =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only for the message.
            let _ = lock.read_to_string(&mut holder);
            return Err(OnlyOneError::SameDirectory { path, pid: holder.trim().parse().ok() });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(failed)?;
    Ok(lock)
}

/// None if the name is taken, but not provably by a meshd: a user must not keep it from starting.
fn lock_namespace(name: &[u8], service: u32) -> Result<Option<UnixListener>, OnlyOneError> {
    let address = SocketAddr::from_abstract_name(name).map_err(OnlyOneError::Socket)?;
    let bound = UnixListener::bind_addr(&address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    match bound {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => judge(holder(name), service),
        Err(error) => Err(OnlyOneError::Socket(error)),
    }
}

struct Holder {
    pid: i32,
    uid: u32,
}

impl Holder {
    /// Only root, our own user and that of the service run a meshd.
    fn is_meshd(&self, service: u32) -> bool {
        [0, service, nix::unistd::getuid().as_raw()].contains(&self.uid)
    }
}

/// Each meshd answers. Anybody may bind the name, and not listen, or let the queue fill up.
fn judge(holder: Option<Holder>, service: u32) -> Result<Option<UnixListener>, OnlyOneError> {
    match holder {
        Some(holder) if holder.is_meshd(service) => Err(OnlyOneError::SameNamespace { pid: holder.pid }),
        Some(Holder { pid, uid }) => {
            tracing::warn!(pid, uid, "the abstract socket `meshd` is taken by a process that is no meshd; ignored");
            Ok(None)
        }
        None => {
            tracing::warn!("the abstract socket `meshd` is taken by a process that does not answer; ignored");
            Ok(None)
        }
    }
}

/// Who listens at the name; None if it does not take our call.
fn holder(name: &[u8]) -> Option<Holder> {
    let name = [b"\0", name].concat();
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).ok()?;
    socket.connect(&SockAddr::unix(std::str::from_utf8(&name).ok()?).ok()?).ok()?;
    let credentials = getsockopt(&OwnedFd::from(socket), sockopt::PeerCredentials).ok()?;
    Some(Holder { pid: credentials.pid(), uid: credentials.uid() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_in_a_directory_is_told_who_is_first() {
        let dir = tempfile::tempdir().unwrap();
        let _first = lock_directory(dir.path()).unwrap();
        let second = lock_directory(dir.path()).unwrap_err().to_string();
        assert!(second.contains(&format!("(process {})", std::process::id())), "{second}");
    }

    #[test]
    fn the_next_one_may_have_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        drop(lock_directory(dir.path()).unwrap());
        lock_directory(dir.path()).unwrap();
    }

    /// A name of this test process alone.
    fn name(what: &str) -> Vec<u8> {
        format!("meshd-test-{what}-{}", std::process::id()).into_bytes()
    }

    #[test]
    fn the_second_in_a_namespace_is_refused() {
        let name = name("second");
        let _first = lock_namespace(&name, 0).unwrap().unwrap();
        let second = lock_namespace(&name, 0).unwrap_err().to_string();
        assert!(second.contains(&format!("(process {})", std::process::id())), "{second}");
    }

    #[test]
    fn whoever_takes_the_name_and_does_not_answer_keeps_no_meshd_from_starting() {
        let name = name("silent");
        let squatter = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        let address = [b"\0", &*name].concat();
        squatter.bind(&SockAddr::unix(std::str::from_utf8(&address).unwrap()).unwrap()).unwrap();
        assert!(lock_namespace(&name, 0).unwrap().is_none());
    }

    #[test]
    fn other_users_processes_are_no_meshd() {
        let stranger = nix::unistd::getuid().as_raw() + 1;
        assert!(judge(Some(Holder { pid: 7, uid: stranger }), 0).unwrap().is_none());
        assert!(judge(Some(Holder { pid: 7, uid: 0 }), stranger).is_err());
        assert!(judge(Some(Holder { pid: 7, uid: stranger }), stranger).is_err());
    }
}
