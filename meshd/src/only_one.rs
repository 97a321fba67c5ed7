//! One daemon per host, that is per network namespace: two would share listeners, rules and routes, and each would
//! undo what the other does.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt};
use socket2::{Domain, SockAddr, Socket, Type};

/// Abstract names belong to a network namespace, as our rules and routes do.
const NAME: &[u8] = b"meshd";
/// CAP_NET_ADMIN (linux/capability.h): whoever lacks it cannot be a meshd.
const CAP_NET_ADMIN: u32 = 12;

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
         routes (a second one needs a network namespace of its own)", process(*.pid)
    )]
    SameNamespace { pid: Option<i32> },
    #[error("cannot make sure that no other meshd runs here: {0}")]
    Socket(io::Error),
}

fn process(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

impl OnlyOne {
    /// Within a runtime, which answers whoever asks who we are.
    pub fn here(run_dir: &Path) -> Result<OnlyOne, OnlyOneError> {
        let lock = lock_directory(run_dir)?;
        if let Some(listener) = lock_namespace()? {
            let listener = tokio::net::UnixListener::from_std(listener).map_err(OnlyOneError::Socket)?;
            // Accepting and closing keeps its queue empty: credentials are all that anybody wants of it.
            tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        }
        Ok(OnlyOne { _lock: lock })
    }
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

/// None if the name is taken by somebody who cannot be a meshd: a user must not keep it from starting.
fn lock_namespace() -> Result<Option<UnixListener>, OnlyOneError> {
    let address = SocketAddr::from_abstract_name(NAME).map_err(OnlyOneError::Socket)?;
    let bound = UnixListener::bind_addr(&address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    match bound {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match holder() {
            Some(Holder { pid, uid }) if !could_be_meshd(pid, uid) => {
                tracing::warn!(pid, uid, "the abstract socket `meshd` is taken by a process that is no meshd; ignored");
                Ok(None)
            }
            holder => Err(OnlyOneError::SameNamespace { pid: holder.map(|holder| holder.pid) }),
        },
        Err(error) => Err(OnlyOneError::Socket(error)),
    }
}

struct Holder {
    pid: i32,
    uid: u32,
}

/// Who listens at the name; None if it does not take our call.
fn holder() -> Option<Holder> {
    let name = [b"\0", NAME].concat();
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).ok()?;
    socket.connect(&SockAddr::unix(std::str::from_utf8(&name).ok()?).ok()?).ok()?;
    let credentials = getsockopt(&OwnedFd::from(socket), sockopt::PeerCredentials).ok()?;
    Some(Holder { pid: credentials.pid(), uid: credentials.uid() })
}

fn could_be_meshd(pid: i32, uid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    uid == 0 || uid == nix::unistd::getuid().as_raw() || status.is_ok_and(|status| may_change_networks(&status))
}

/// By a `/proc/PID/status`.
fn may_change_networks(status: &str) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_some_and(|bits| bits & (1 << CAP_NET_ADMIN) != 0)
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

    #[test]
    fn an_ordinary_users_process_is_no_meshd() {
        assert!(!may_change_networks("Name:\tsh\nCapEff:\t0000000000000000\n"));
        assert!(may_change_networks("Name:\tmeshd\nCapEff:\t0000000000001400\n"));
    }
}
