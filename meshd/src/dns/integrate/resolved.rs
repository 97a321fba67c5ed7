//! systemd-resolved asks us for our domains, and nothing else: a link of our own carries our server and routing-only
//! domains. resolved keeps that across its own restarts and forgets it with the link; we look and say it again.

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::net::if_::if_nametoindex;

use super::super::resolv_conf::DNS_PORT;
use super::super::upstream::Stamp;
use super::{IntegrationError, tools};
use crate::host;

const LINK: &str = "meshd-dns";
/// resolved uses only links with an address of wider scope than the link. Virtual IPs never end in .0, and this
/// one is on no network but the link.
const ADDRESS: &str = "240.240.0.0/32";
const RUNTIME: &str = "/run/systemd/resolve";
/// Of its varlink interface; made anew by every start of resolved.
const SOCKET: &str = "io.systemd.Resolve";

pub(super) struct Resolved {
    server: String,
    domains: Vec<String>,
    /// Made anew by every start of resolved.
    pub(super) socket: PathBuf,
    /// A file per link with what resolved was told about it; readable for root only.
    links: PathBuf,
    told: Option<Told>,
}

/// By this we know that nothing has changed since we told resolved.
#[derive(PartialEq)]
struct Told {
    link: u32,
    start: Option<Stamp>,
    links: Option<Stamp>,
}

/// Whether it answers on this host; a socket may outlive it.
pub(crate) fn resolved_runs() -> bool {
    UnixStream::connect(Path::new(RUNTIME).join(SOCKET)).is_ok()
}

impl Resolved {
    pub(super) fn new(server: SocketAddr, domains: Vec<String>) -> Resolved {
        // As resolved writes it itself: the port only where it is not the usual one.
        let server = if server.port() == DNS_PORT { server.ip().to_string() } else { server.to_string() };
        let domains = domains.into_iter().map(|domain| format!("~{domain}")).collect();
        let runtime = Path::new(RUNTIME);
        Resolved { server, domains, socket: runtime.join(SOCKET), links: runtime.join("netif"), told: None }
    }

    pub(super) fn is_running(&self) -> bool {
        UnixStream::connect(&self.socket).is_ok()
    }

    pub(super) fn keep(&mut self) -> Result<(), IntegrationError> {
        if let (Some(link), Some(told)) = (link_index(), &self.told)
            && (*told == self.look(link) || self.still_knows(link, told))
        {
            return Ok(());
        }
        if !in_namespace_of_host() {
            return Err(IntegrationError::Impossible(
                "meshd runs in a network namespace of its own, resolved does not",
            ));
        }
        self.told = None;
        if !self.is_running() {
            return Err(IntegrationError::Impossible("systemd-resolved does not run: start it"));
        }
        let link = make_link()?;
        self.tell()?;
        self.told = Some(self.look(link));
        tracing::info!(link = LINK, domains = self.domains.join(" "), "systemd-resolved asks meshd");
        Ok(())
    }

    fn look(&self, link: u32) -> Told {
        Told { link, start: Stamp::of(&self.socket), links: Stamp::of(&self.links) }
    }

    /// Another link's settings have changed, or resolved was restarted and has read its notes.
    fn still_knows(&self, link: u32, told: &Told) -> bool {
        let notes = std::fs::read_to_string(self.links.join(link.to_string()));
        told.link == link && notes.is_ok_and(|notes| knows(&notes, &self.server, &self.domains))
    }

    fn tell(&self) -> Result<(), IntegrationError> {
        let domains: Vec<&str> = self.domains.iter().map(String::as_str).collect();
        resolvectl("dns", &[&self.server])?;
        resolvectl("domain", &domains)?;
        for setting in ["default-route", "llmnr", "mdns", "dnssec", "dnsovertls"] {
            resolvectl(setting, &["no"])?;
        }
        Ok(())
    }
}

/// The notes are private to resolved: anything unexpected in them only means that we say it again.
fn knows(notes: &str, server: &str, domains: &[String]) -> bool {
    let value = |key: &str| notes.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    value("SERVERS") == Some(server)
        && value("DEFAULT_ROUTE") == Some("no")
        && value("DOMAINS").is_some_and(|known| known.split(' ').eq(domains.iter().map(String::as_str)))
}

fn resolvectl(verb: &str, values: &[&str]) -> Result<(), IntegrationError> {
    Ok(tools::run("resolvectl", &[&[verb, LINK], values].concat())?)
}

fn link_index() -> Option<u32> {
    if_nametoindex(LINK).ok()
}

fn make_link() -> Result<u32, IntegrationError> {
    if link_index().is_none() {
        // An empty bridge serves as well where the kernel has no dummy.
        tools::run("ip", &["link", "add", LINK, "type", "dummy"])
            .or_else(|_| tools::run("ip", &["link", "add", LINK, "type", "bridge"]))?;
    }
    tools::run("ip", &["link", "set", LINK, "addrgenmode", "none"])?;
    tools::run("ip", &["address", "replace", ADDRESS, "dev", LINK])?;
    tools::run("ip", &["link", "set", LINK, "up"])?;
    link_index().ok_or(IntegrationError::Impossible("the link meshd-dns vanishes as soon as it is made"))
}

/// What we said about a link would reach the host's link of the same number. Unknown, where /proc hides it, is yes.
fn in_namespace_of_host() -> bool {
    host::in_namespace_of_process_1().unwrap_or(true)
}

/// With the link, resolved forgets what it was told about it.
pub(super) fn remove() -> Result<(), IntegrationError> {
    match link_index() {
        Some(_) => Ok(tools::run("ip", &["link", "delete", LINK])?),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As systemd 252 writes them.
    const NOTES: &str = "# This is private data. Do not parse.\nLLMNR=no\nMDNS=no\nDNSSEC=no\nDNSOVERTLS=no\n\
                         DEFAULT_ROUTE=no\nSERVERS=127.0.0.1\nDOMAINS=~mesh ~svc.cluster.local\n";

    fn resolved(server: &str) -> Resolved {
        Resolved::new(server.parse().unwrap(), vec!["mesh".into(), "svc.cluster.local".into()])
    }

    #[test]
    fn what_resolved_knows_is_recognised_and_everything_else_is_not() {
        let ours = resolved("127.0.0.1:53");
        assert!(knows(NOTES, &ours.server, &ours.domains));
        for (from, to) in [("127.0.0.1", "127.0.0.2"), ("~mesh ", ""), ("ROUTE=no", "ROUTE=yes"), ("SERVERS", "SERVER")]
        {
            assert!(!knows(&NOTES.replace(from, to), &ours.server, &ours.domains), "{from} -> {to}");
        }
        assert!(!knows("", &ours.server, &ours.domains));
        assert_eq!(resolved("127.0.0.1:5353").server, "127.0.0.1:5353");
        assert_eq!(resolved("[::1]:53").server, "::1");
    }

    #[test]
    fn it_runs_when_somebody_listens_not_when_a_socket_is_left_over() {
        let directory = tempfile::tempdir().unwrap();
        let mut resolved = resolved("127.0.0.1:53");
        resolved.socket = directory.path().join("socket");
        assert!(!resolved.is_running());
        let listener = std::os::unix::net::UnixListener::bind(&resolved.socket).unwrap();
        assert!(resolved.is_running());
        drop(listener);
        assert!(!resolved.is_running());
    }
}
