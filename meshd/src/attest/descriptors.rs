//! Whether a process holds a socket, as its descriptors tell.

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::OnceLock;

use meshd_sys::peer::share_descriptors;

/// The lines in question are the first ones (fs/proc/fd.c).
const FDINFO: u64 = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    Yes,
    No,
    /// It cannot be seen.
    Perhaps,
}

/// Every thread may have a table of its own (CLONE_FILES), also after the first one has ended.
pub(super) fn holds(pid: i32, inode: u32) -> Holds {
    let first = table_has(&format!("/proc/{pid}/fdinfo"), inode);
    if first != Holds::No {
        return first;
    }
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Holds::Perhaps };
    for thread in threads {
        let number = thread.ok().and_then(|thread| thread.file_name().to_str()?.parse::<i32>().ok());
        let Some(thread) = number else { return Holds::Perhaps };
        if thread == pid || share_descriptors(pid, thread) == Some(true) {
            continue;
        }
        match table_has(&format!("/proc/{pid}/task/{thread}/fdinfo"), inode) {
            Holds::No => {}
            // It ended meanwhile, and its table with it.
            Holds::Perhaps if !Path::new(&format!("/proc/{pid}/task/{thread}")).exists() => {}
            found => return found,
        }
    }
    Holds::No
}

/// Of `fdinfo`, which tells mount and inode of each descriptor (`ino` since Linux 5.14), and is open to whoever may
/// look at the process.
fn table_has(directory: &str, inode: u32) -> Holds {
    let Some(sockets) = mount_of_sockets() else { return Holds::Perhaps };
    let Ok(descriptors) = fs::read_dir(directory) else { return Holds::Perhaps };
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
    use std::sync::mpsc;

    use meshd_sys::sock_diag::{Lookup, SocketDiag};
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn inode_of(socket: &TcpStream) -> u32 {
        let (local, remote) = (socket.local_addr().unwrap(), socket.peer_addr().unwrap());
        let Lookup::Owned(owner) = SocketDiag::open().unwrap().owner(local, remote).unwrap() else { panic!() };
        owner.inode
    }

    fn own() -> i32 {
        std::process::id().cast_signed()
    }

    #[test]
    fn a_socket_is_found_with_the_process_that_holds_it_and_with_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let inode = inode_of(&client);
        assert_eq!(holds(own(), inode), Holds::Yes);
        let mut other = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        // Until it has closed what it was started with.
        while holds(other.id().cast_signed(), inode) != Holds::No {
            std::thread::yield_now();
        }
        drop(other.stdin.take());
        other.wait().unwrap();
    }

    #[test]
    fn a_thread_with_descriptors_of_its_own_hides_no_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, told) = mpsc::channel();
        let (release, wait) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_FILES).unwrap();
            let client = TcpStream::connect(address).unwrap();
            tell.send(inode_of(&client)).unwrap();
            _ = wait.recv();
        });
        let inode = told.recv().unwrap();
        assert_eq!(table_has("/proc/self/fdinfo", inode), Holds::No, "the first thread does not have it");
        assert_eq!(holds(own(), inode), Holds::Yes);
        drop(release);
        thread.join().unwrap();
        assert_eq!(holds(own(), inode), Holds::No);
    }

    #[test]
    fn a_file_with_the_inode_of_a_socket_is_no_socket() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t9\nino:\t77\n";
        assert_eq!(told(text), Some((9, 77)));
        assert_eq!(told("pos:\t0\nflags:\t02\nmnt_id:\t9\n"), None, "before Linux 5.14");
    }
}
