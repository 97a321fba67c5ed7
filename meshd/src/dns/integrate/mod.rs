//! How programs of this host come to ask us: through systemd-resolved, by a resolv.conf of their own, or by the host's.
//! Port 53 is never redirected: nobody who does not ask us hears from us.

mod host;
mod resolved;
mod tools;
pub mod units;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use super::config::{DnsConfig, Integration};
use super::resolv_conf::{DNS_PORT, ResolvConf};
use super::upstream::HostFiles;
use host::HostFile;
use resolved::Resolved;
pub(crate) use resolved::resolved_runs;
use units::Units;

pub use tools::ToolError;

/// How often what we set is looked at; nothing is run unless it is gone.
const LOOK: Duration = Duration::from_secs(2);
/// After failures: that of a missing permission lasts.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
const NSSWITCH: &str = "/etc/nsswitch.conf";

#[derive(Debug, thiserror::Error)]
pub enum IntegrationError {
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error(
        "cannot {doing} {path}: {source}; meshd needs to run as root for [dns] integration, or be given leave (docs/dns.md)"
    )]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{0}; choose another [dns] integration")]
    Impossible(&'static str),
}

impl IntegrationError {
    fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IntegrationError {
        let path = path.to_owned();
        move |source| IntegrationError::File { doing, path, source }
    }
}

/// Everything kept in step with the host, for as long as the daemon runs.
pub struct Keeper {
    wanted: Integration,
    files: HostFiles,
    nsswitch: PathBuf,
    /// False where our port is one that resolv.conf cannot name.
    nameable: bool,
    /// Once it ran, it is only away for a moment.
    resolved_ran: bool,
    resolved: Resolved,
    units: Units,
    host: HostFile,
}

/// What is in force now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Resolved,
    Units,
    Host,
    Nothing,
}

impl Keeper {
    /// `state_dir` must survive reboots: units find their resolv.conf there before meshd runs.
    pub fn new(config: &DnsConfig, state_dir: &Path) -> Keeper {
        let files = HostFiles::default();
        let ours = config.local_address();
        Keeper {
            wanted: config.integration,
            nsswitch: NSSWITCH.into(),
            nameable: ours.port() == DNS_PORT,
            resolved_ran: false,
            resolved: Resolved::new(ours, config.zones().routed()),
            units: Units::new(state_dir, ours.ip(), files.resolv_conf.clone()),
            host: HostFile::new(ours.ip(), files.resolv_conf.clone()),
            files,
        }
    }

    /// Keeps names working until dropped. `enrolled` gives the units that are enrolled now, or None while everything
    /// is reverted: then nothing is put back.
    pub async fn run(mut self, enrolled: impl Fn() -> Option<Vec<Arc<str>>>) {
        let mut last = None;
        let mut said = String::new();
        let mut pause = LOOK;
        loop {
            let Some(units) = enrolled() else {
                last = None;
                self.units.forget();
                tokio::time::sleep(LOOK).await;
                continue;
            };
            // Programs are run and waited for: not on the thread that answers questions.
            let looked = tokio::task::spawn_blocking(move || {
                let result = self.keep(&units);
                (self, result)
            });
            let Ok((keeper, result)) = looked.await else {
                return tracing::error!("keeping up DNS integration has failed");
            };
            self = keeper;
            match result {
                Ok(way) => {
                    if last.replace(way) != Some(way) || !said.is_empty() {
                        tracing::info!(?way, "names reach programs of this host");
                    }
                    said.clear();
                    pause = LOOK;
                }
                Err(error) => {
                    // Once, however often it is tried.
                    let message = error.to_string();
                    if said != message {
                        tracing::error!(error = message, "names of the mesh may not resolve on this host");
                        said = message;
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn keep(&mut self, enrolled: &[Arc<str>]) -> Result<Way, IntegrationError> {
        let way = self.way();
        match way {
            Way::Resolved => self.resolved.keep()?,
            Way::Units => self.units.keep(enrolled)?,
            Way::Host => self.host.keep()?,
            Way::Nothing => {}
        }
        if matches!(way, Way::Resolved | Way::Host) {
            self.units.withdraw()?;
        }
        Ok(way)
    }

    fn way(&mut self) -> Way {
        match self.wanted {
            Integration::Off => Way::Nothing,
            Integration::Resolved => Way::Resolved,
            Integration::Units => Way::Units,
            Integration::Host => Way::Host,
            Integration::Auto => self.best_way(),
        }
    }

    fn best_way(&mut self) -> Way {
        if self.lookups_use_resolved() {
            Way::Resolved
        } else if self.nameable && crate::host::systemd_runs() {
            Way::Units
        } else {
            Way::Nothing
        }
    }

    /// resolved may run without anybody asking it, and libnss-resolve be there without resolved.
    fn lookups_use_resolved(&mut self) -> bool {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        if ResolvConf::parse(&read(&self.files.resolv_conf)).asks_resolved() {
            return true;
        }
        self.resolved_ran |= self.resolved.is_running();
        self.resolved_ran && nsswitch_asks_resolved(&read(&self.nsswitch))
    }
}

fn nsswitch_asks_resolved(text: &str) -> bool {
    let hosts = text.lines().find_map(|line| line.trim().strip_prefix("hosts:"));
    hosts.is_some_and(|hosts| {
        hosts.split('#').next().unwrap_or_default().split_whitespace().any(|word| word == "resolve")
    })
}

/// When the daemon stops: /etc/resolv.conf is the host's again. The link and the units' files stay: without us, names
/// of the mesh fail at once, and everything else is asked as before.
pub fn release(config: &DnsConfig) -> Result<(), IntegrationError> {
    match config.integration {
        Integration::Host => host_file().restore(),
        _ => Ok(()),
    }
}

/// Takes away all that any integration left on this host; works without a daemon, and again. With `off` somebody else
/// may integrate another meshd here: only what is surely ours goes.
pub fn remove(config: &DnsConfig, state_dir: &Path) -> Result<(), IntegrationError> {
    let off = config.integration == Integration::Off;
    let host = host_file();
    let bound = state_dir.join(units::RESOLV_CONF);
    // Whichever fails, the others are tried.
    let removed = [
        resolved::remove(),
        if off && !host.is_ours() { Ok(()) } else { host.restore() },
        units::remove_all(Path::new(units::DIRECTORY), off.then_some(&bound)),
    ];
    removed.into_iter().collect()
}

fn host_file() -> HostFile {
    HostFile::new(std::net::Ipv4Addr::LOCALHOST.into(), HostFiles::default().resolv_conf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nsswitch_says_whether_lookups_go_to_resolved() {
        assert!(nsswitch_asks_resolved("passwd: files\nhosts:  files resolve [!UNAVAIL=return] dns\n"));
        assert!(!nsswitch_asks_resolved("hosts: files dns # resolve\n"));
        assert!(!nsswitch_asks_resolved("networks: resolve\n"));
        assert!(!nsswitch_asks_resolved(""));
    }

    /// A keeper of a host whose files are in `directory`.
    fn keeper(directory: &Path, integration: Integration, port: u16) -> Keeper {
        let config = DnsConfig { integration, listen: ([127, 0, 0, 1], port).into(), ..DnsConfig::default() };
        let mut keeper = Keeper::new(&config, directory);
        keeper.files.resolv_conf = directory.join("resolv.conf");
        keeper.nsswitch = directory.join("nsswitch.conf");
        keeper.resolved.socket = directory.join("socket");
        keeper
    }

    #[test]
    fn what_was_asked_for_is_done() {
        let directory = tempfile::tempdir().unwrap();
        for (integration, expected) in [
            (Integration::Off, Way::Nothing),
            (Integration::Resolved, Way::Resolved),
            (Integration::Units, Way::Units),
            (Integration::Host, Way::Host),
        ] {
            assert_eq!(keeper(directory.path(), integration, 53).way(), expected);
        }
    }

    #[test]
    fn auto_is_resolved_exactly_where_lookups_go_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        let auto = |port| keeper(directory.path(), Integration::Auto, port);
        write("resolv.conf", "nameserver 127.0.0.53\n");
        assert_eq!(auto(5353).way(), Way::Resolved, "it will run: the host counts on it");
        write("resolv.conf", "nameserver 10.0.0.2\n");
        write("nsswitch.conf", "hosts: files resolve dns\n");
        assert_eq!(auto(5353).way(), Way::Nothing, "it does not run, and resolv.conf cannot name a port");
        assert_ne!(auto(53).way(), Way::Resolved);
        let running = std::os::unix::net::UnixListener::bind(directory.path().join("socket")).unwrap();
        let mut keeper = auto(53);
        assert_eq!(keeper.way(), Way::Resolved);
        drop(running);
        assert_eq!(keeper.way(), Way::Resolved, "it is being restarted");
        write("nsswitch.conf", "hosts: files dns\n");
        assert_ne!(keeper.way(), Way::Resolved, "nobody asks it any more");
    }
}
