//! The way back in: nothing meshd does may touch it.

use std::collections::BTreeSet;

use super::finding::Finding;
use super::ports::Listener;
use super::tools::look;

/// Where sshd listens unless somebody changed it.
const DEFAULT: u16 = 22;
const SERVERS: [&str; 3] = ["sshd", "sshd-session", "dropbear"];

pub(super) struct SshFacts {
    /// Ports of sshd's own listeners.
    listening: BTreeSet<u16>,
    /// Ports systemd listens on for it.
    sockets: BTreeSet<u16>,
    /// The port this session came in by.
    session: Option<u16>,
}

impl SshFacts {
    pub(super) fn gather(listeners: &[Listener]) -> SshFacts {
        let shown = look("systemctl", &["show", "--property=Listen", "ssh.socket", "sshd.socket"]);
        SshFacts {
            listening: of_servers(listeners),
            sockets: of_sockets(&shown.unwrap_or_default()),
            session: session_port(),
        }
    }

    /// Every port that is a way in.
    pub(super) fn ports(&self) -> BTreeSet<u16> {
        let found: BTreeSet<u16> = self.listening.iter().chain(&self.sockets).chain(&self.session).copied().collect();
        if found.is_empty() { [DEFAULT].into() } else { found }
    }
}

fn of_servers(listeners: &[Listener]) -> BTreeSet<u16> {
    let ssh = listeners.iter().filter(|listener| SERVERS.iter().any(|name| listener.is_of(name)));
    ssh.map(|listener| listener.address.port()).collect()
}

/// `Listen=[::]:22 (Stream)`, several in a line or one.
fn of_sockets(shown: &str) -> BTreeSet<u16> {
    let addresses = shown.lines().filter_map(|line| line.strip_prefix("Listen=")).flat_map(str::split_whitespace);
    addresses.filter_map(|word| word.rsplit_once(':').map_or(word, |(_, port)| port).parse().ok()).collect()
}

/// Of this process or the nearest one above it: sudo forgets the variable, the shell it was called from has it.
fn session_port() -> Option<u16> {
    let own = std::env::var("SSH_CONNECTION").ok().and_then(|value| server_port(&value));
    own.or_else(|| {
        ancestors().find_map(|pid| port_in_environment(&std::fs::read(format!("/proc/{pid}/environ")).ok()?))
    })
}

fn ancestors() -> impl Iterator<Item = u32> {
    let parent = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        (parent > 1).then_some(parent)
    };
    std::iter::successors(parent(std::process::id()), move |pid| parent(*pid))
}

fn port_in_environment(environment: &[u8]) -> Option<u16> {
    let mut variables = environment.split(|byte| *byte == 0);
    let value = variables.find_map(|variable| variable.strip_prefix(b"SSH_CONNECTION="))?;
    server_port(std::str::from_utf8(value).ok()?)
}

/// `client port server port` (ssh(1)).
fn server_port(connection: &str) -> Option<u16> {
    connection.split_whitespace().nth(3)?.parse().ok()
}

/// `strict` are the ports whose plaintext callers the kernel would refuse.
pub(super) fn judge(facts: &SshFacts, strict: &BTreeSet<u16>) -> Finding {
    let check = "SSH is left alone";
    let ports = facts.ports();
    let named = |ports: &mut dyn Iterator<Item = &u16>| ports.map(u16::to_string).collect::<Vec<_>>().join(", ");
    let closed = named(&mut ports.intersection(strict));
    if !closed.is_empty() {
        let detail = format!("a strict port is sshd's: {closed}; nobody could log in any more");
        return Finding::failed(check, detail, "make it permissive in enrol.d, or deliver to another port");
    }
    let found = !facts.listening.is_empty() || !facts.sockets.is_empty() || facts.session.is_some();
    let how = if found { "" } else { ", where sshd usually listens; none was found" };
    Finding::ok(check, format!("port {}{how}", named(&mut ports.iter())))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::ports::parse;
    use super::*;

    fn facts(ss: &str, sockets: &str, session: Option<u16>) -> SshFacts {
        SshFacts { listening: of_servers(&parse(ss)), sockets: of_sockets(sockets), session }
    }

    #[test]
    fn ways_in_are_found_wherever_they_are() {
        let ss = "tcp LISTEN 0 1 0.0.0.0:2222 0.0.0.0:* users:((\"sshd\",pid=8,fd=3))\n\
                  tcp LISTEN 0 1 0.0.0.0:80 0.0.0.0:* users:((\"nginx\",pid=9,fd=3))\n";
        let sockets = "Listen=[::]:2022 (Stream)\nListen=\n";
        assert_eq!(facts(ss, sockets, Some(2200)).ports(), [2022, 2200, 2222].into());
        assert_eq!(facts("", "Listen=22 (Stream) 0.0.0.0:24 (Stream)\n", None).ports(), [22, 24].into());
    }

    #[test]
    fn port_22_is_kept_when_no_sshd_is_found() {
        assert_eq!(facts("", "", None).ports(), [22].into());
    }

    #[test]
    fn the_session_is_read_from_the_environment_of_a_shell() {
        assert_eq!(port_in_environment(b"A=1\0SSH_CONNECTION=10.0.0.9 5000 10.0.0.1 2222\0B=2\0"), Some(2222));
        assert_eq!(port_in_environment(b"A=1\0"), None);
    }

    #[test]
    fn a_strict_ssh_port_is_a_failure() {
        assert_eq!(judge(&facts("", "", None), &[8080].into()).verdict, Verdict::Ok);
        let locked = judge(&facts("", "", Some(2222)), &[8080, 2222].into());
        assert_eq!(locked.verdict, Verdict::Failed);
        assert!(locked.detail.contains("sshd's: 2222"), "{}", locked.detail);
    }
}
