//! Where questions that are not ours go: the servers of `[dns] upstream`, or those this host asks anyway.

use std::fs::Metadata;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::resolv_conf::{ResolvConf, is_resolved_stub};

/// The files are looked at this often at most, and only when somebody asks.
const LOOK: Duration = Duration::from_secs(1);

/// The host's own configuration.
#[derive(Debug, Clone)]
pub(super) struct HostFiles {
    pub(super) resolv_conf: PathBuf,
    /// The servers systemd-resolved asks, when `resolv_conf` only names its stub.
    pub(super) resolved_uplinks: PathBuf,
}

impl Default for HostFiles {
    fn default() -> HostFiles {
        HostFiles {
            resolv_conf: "/etc/resolv.conf".into(),
            resolved_uplinks: "/run/systemd/resolve/resolv.conf".into(),
        }
    }
}

pub(super) struct Upstreams {
    /// Our listen address: asking it would be asking ourselves.
    own: SocketAddr,
    files: Option<HostFiles>,
    state: Mutex<State>,
}

struct State {
    looked: Option<Instant>,
    seen: [Option<Stamp>; 2],
    servers: Arc<[SocketAddr]>,
}

impl Upstreams {
    pub(super) fn configured(own: SocketAddr, servers: &[SocketAddr]) -> Upstreams {
        let servers = servers.iter().copied().filter(|server| !is_ourselves(own, *server)).collect();
        Upstreams { own, files: None, state: Mutex::new(State { looked: None, seen: [None; 2], servers }) }
    }

    pub(super) fn of_host(own: SocketAddr, files: HostFiles) -> Upstreams {
        let state = State { looked: None, seen: [None; 2], servers: Arc::new([]) };
        Upstreams { own, files: Some(files), state: Mutex::new(state) }
    }

    pub(super) fn current(&self, now: Instant) -> Arc<[SocketAddr]> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(files) = &self.files
            && state.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= LOOK)
        {
            state.looked = Some(now);
            let seen = [Stamp::of(&files.resolv_conf), Stamp::of(&files.resolved_uplinks)];
            if seen != state.seen {
                state.seen = seen;
                // A file that is gone for a moment, being replaced, changes nothing.
                if let Some(servers) = self.read(files) {
                    tracing::debug!(?servers, "questions outside the mesh go to");
                    state.servers = servers.into();
                }
            }
        }
        state.servers.clone()
    }

    fn read(&self, files: &HostFiles) -> Option<Vec<SocketAddr>> {
        let host = read(&files.resolv_conf)?;
        let real = if host.asks_resolved() { read(&files.resolved_uplinks)? } else { host };
        let servers = real.addresses(|link| nix::net::if_::if_nametoindex(link).ok());
        Some(servers.into_iter().filter(|server| !is_ourselves(self.own, *server)).collect())
    }
}

fn read(path: &Path) -> Option<ResolvConf> {
    std::fs::read_to_string(path).ok().map(|text| ResolvConf::parse(&text))
}

fn is_ourselves(own: SocketAddr, server: SocketAddr) -> bool {
    if is_resolved_stub(server.ip()) {
        return true;
    }
    server.port() == own.port() && (server.ip() == own.ip() || own.ip().is_unspecified() && is_local(server.ip()))
}

/// An address can be bound exactly where it is local.
pub(super) fn is_local(address: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(address, 0)).is_ok()
}

/// A file that was replaced, or written anew, has another one. Links are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    modified: (i64, i64),
    size: u64,
}

impl Stamp {
    pub(super) fn of(path: &Path) -> Option<Stamp> {
        std::fs::metadata(path).ok().map(|found| Stamp::from(&found))
    }
}

impl From<&Metadata> for Stamp {
    fn from(found: &Metadata) -> Stamp {
        Stamp {
            device: found.dev(),
            inode: found.ino(),
            modified: (found.mtime(), found.mtime_nsec()),
            size: found.size(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "127.0.0.1:53";

    struct Etc {
        directory: tempfile::TempDir,
        upstreams: Upstreams,
        start: Instant,
    }

    impl Etc {
        fn new(own: &str) -> Etc {
            let directory = tempfile::tempdir().unwrap();
            let files = HostFiles {
                resolv_conf: directory.path().join("resolv.conf"),
                resolved_uplinks: directory.path().join("uplinks"),
            };
            Etc { directory, upstreams: Upstreams::of_host(own.parse().unwrap(), files), start: Instant::now() }
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.directory.path().join(name), text).unwrap();
        }

        fn servers_after(&self, millis: u64) -> Vec<String> {
            let servers = self.upstreams.current(self.start + Duration::from_millis(millis));
            servers.iter().map(ToString::to_string).collect()
        }
    }

    #[test]
    fn the_hosts_servers_are_asked_but_never_ourselves() {
        let etc = Etc::new(OWN);
        etc.write("resolv.conf", "nameserver 127.0.0.1\nnameserver 10.0.0.2\nnameserver 127.0.0.2\n");
        assert_eq!(etc.servers_after(0), ["10.0.0.2:53", "127.0.0.2:53"]);
        let everywhere = Etc::new("0.0.0.0:53");
        everywhere.write("resolv.conf", "nameserver 127.0.0.2\nnameserver 192.0.2.1\n");
        assert_eq!(everywhere.servers_after(0), ["192.0.2.1:53"], "listening everywhere, every local address is ours");
    }

    #[test]
    fn behind_resolved_its_own_servers_are_asked_never_its_stub() {
        let etc = Etc::new(OWN);
        etc.write("resolv.conf", "nameserver 127.0.0.53\n");
        assert!(etc.servers_after(0).is_empty());
        etc.write("uplinks", "nameserver 10.0.0.2\nnameserver 127.0.0.1\n");
        assert_eq!(etc.servers_after(1000), ["10.0.0.2:53"]);
    }

    #[test]
    fn a_changed_file_counts_after_a_second_and_a_missing_one_changes_nothing() {
        let etc = Etc::new(OWN);
        etc.write("resolv.conf", "nameserver 10.0.0.2\n");
        assert_eq!(etc.servers_after(0), ["10.0.0.2:53"]);
        etc.write("resolv.conf", "nameserver 10.0.0.33\n");
        assert_eq!(etc.servers_after(999), ["10.0.0.2:53"]);
        assert_eq!(etc.servers_after(1000), ["10.0.0.33:53"]);
        std::fs::remove_file(etc.directory.path().join("resolv.conf")).unwrap();
        assert_eq!(etc.servers_after(5000), ["10.0.0.33:53"]);
        etc.write("resolv.conf", "search corp.example\n");
        assert!(etc.servers_after(9000).is_empty());
    }

    #[test]
    fn configured_servers_are_taken_as_they_are_but_for_ourselves() {
        let given: Vec<SocketAddr> =
            ["127.0.0.1:53", "127.0.0.53:53", "127.0.0.1:5353"].map(|a| a.parse().unwrap()).into();
        let upstreams = Upstreams::configured(OWN.parse().unwrap(), &given);
        assert_eq!(upstreams.current(Instant::now())[..], [given[2]]);
    }
}
