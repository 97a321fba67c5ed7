//! Who listens where on this host.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::finding::Finding;
use super::tools::look;
use crate::config::Config;

/// One listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listener {
    pub udp: bool,
    pub address: SocketAddr,
    /// Name and id of the process; None without the right to know.
    pub process: Option<(String, u32)>,
}

impl Listener {
    pub(super) fn is_of(&self, name: &str) -> bool {
        self.process.as_ref().is_some_and(|(process, _)| process == name)
    }
}

/// None: `ss` cannot be asked.
pub(super) fn gather() -> Option<Vec<Listener>> {
    look("ss", &["-H", "-l", "-n", "-p", "-t", "-u"]).map(|text| parse(&text))
}

/// `ss -Hlnptu`: protocol, state, queues, local address, peer address, processes.
pub(super) fn parse(text: &str) -> Vec<Listener> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Listener> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let address = parse_address(words.get(4)?)?;
    let process = words.get(6).and_then(|users| parse_process(users));
    Some(Listener { udp: *words.first()? == "udp", address, process })
}

/// `127.0.0.53%lo:53`, `[::]:22`, `*:80`.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.rsplit_once(':')?;
    let host = host.split('%').next()?.trim_matches(['[', ']']);
    let ip = if host == "*" { Ipv6Addr::UNSPECIFIED.into() } else { host.parse().ok()? };
    Some(SocketAddr::new(ip, port.parse().ok()?))
}

/// `users:(("sshd",pid=812,fd=3))`; the first will do.
fn parse_process(text: &str) -> Option<(String, u32)> {
    let name = text.split('"').nth(1)?;
    let pid = text.split_once("pid=")?.1.split(',').next()?.parse().ok()?;
    Some((name.to_owned(), pid))
}

/// A listener meshd wants to have.
#[derive(Clone, Debug)]
pub(super) struct Wish {
    what: &'static str,
    setting: &'static str,
    udp: bool,
    address: SocketAddr,
}

pub(super) fn wishes(config: &Config) -> Vec<Wish> {
    let tcp = |what, setting, address| Wish { what, setting, udp: false, address };
    let capture = SocketAddr::from(([127, 0, 0, 1], config.proxy.capture_port));
    let mesh = config.proxy.mesh_listen.iter();
    let mut all: Vec<Wish> =
        mesh.map(|address| tcp("the mesh port is free", "[proxy] mesh_listen", *address)).collect();
    all.push(tcp("the capture port is free", "[proxy] capture_port", capture));
    all.push(tcp("the metrics port is free", "[metrics] listen", config.metrics.listen));
    let dns = tcp("the DNS port is free", "[dns] listen", config.dns.listen);
    all.extend([Wish { udp: true, ..dns.clone() }, dns]);
    all
}

/// `listeners` None: nobody could be asked.
pub(super) fn judge(listeners: Option<&[Listener]>, wishes: &[Wish]) -> Vec<Finding> {
    let Some(listeners) = listeners else {
        let remedy = "install the package iproute2 (iproute on RHEL)";
        return vec![Finding::warning("the ports of meshd are free", "`ss` does not run: not looked at", remedy)];
    };
    let mut findings: Vec<Finding> = Vec::new();
    for wish in wishes {
        let finding = one_wish(listeners, wish);
        // DNS listens twice, on UDP and TCP; the worse tells.
        match findings.last_mut().filter(|last| last.check == finding.check) {
            Some(last) if last.verdict < finding.verdict => *last = finding,
            Some(_) => {}
            None => findings.push(finding),
        }
    }
    findings
}

fn one_wish(listeners: &[Listener], wish: &Wish) -> Finding {
    let protocol = if wish.udp { "UDP" } else { "TCP" };
    let address = wish.address;
    match listeners.iter().find(|listener| listener.udp == wish.udp && collide(listener.address, address)) {
        None => Finding::ok(wish.what, address.to_string()),
        Some(listener) if listener.is_of("meshd") => Finding::ok(wish.what, format!("{address}, the running meshd's")),
        Some(listener) => {
            let by = match &listener.process {
                Some((name, pid)) => format!("{name} (process {pid})"),
                None => "another process (root is told which)".to_owned(),
            };
            let detail = format!("{address} ({protocol}) is taken by {by}, which listens on {}", listener.address);
            Finding::failed(wish.what, detail, format!("stop it, or change {} in meshd.toml", wish.setting))
        }
    }
}

/// Whether two sockets cannot both listen there. An IPv6 wildcard usually takes IPv4, too.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let takes = |one: IpAddr, other: IpAddr| {
        one == other || one == IpAddr::from(Ipv6Addr::UNSPECIFIED) || one.is_unspecified() && other.is_ipv4()
    };
    one.port() == other.port()
        && (takes(one.ip(), other.ip()) || other.ip().is_unspecified() && takes(other.ip(), one.ip()))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    const SS: &str = "udp   UNCONN 0 0      127.0.0.53%lo:53     0.0.0.0:*    users:((\"systemd-resolve\",pid=9,fd=12))
tcp   LISTEN 0 128          0.0.0.0:22       0.0.0.0:*    users:((\"sshd\",pid=812,fd=3))
tcp   LISTEN 0 4096               *:9100           *:*    users:((\"node_exporter\",pid=7,fd=3))
tcp   LISTEN 0 128             [::]:22          [::]:*
";

    #[test]
    fn listeners_are_read_with_address_and_process() {
        let listeners = parse(SS);
        assert_eq!(listeners.len(), 4);
        assert_eq!((listeners[0].udp, listeners[0].address), (true, "127.0.0.53:53".parse().unwrap()));
        assert_eq!(listeners[1].process, Some(("sshd".to_owned(), 812)));
        assert_eq!(listeners[2].address, "[::]:9100".parse().unwrap());
        assert_eq!(listeners[3].process, None);
    }

    fn verdict(line: &str) -> (Verdict, String) {
        let findings = judge(Some(&parse(line)), &wishes(&Config::default()));
        let worst = findings.into_iter().max_by_key(|finding| finding.verdict).unwrap();
        (worst.verdict, worst.detail)
    }

    #[test]
    fn a_taken_port_is_reported_with_who_has_it() {
        let (verdict, detail) = verdict("tcp LISTEN 0 1 10.0.0.5:15008 0.0.0.0:* users:((\"envoy\",pid=77,fd=3))");
        assert_eq!(verdict, Verdict::Failed);
        assert!(detail.contains("taken by envoy (process 77)"), "{detail}");
    }

    #[test]
    fn only_listeners_in_the_way_count() {
        assert_eq!(verdict(SS).0, Verdict::Ok, "resolved's own loopback address is no conflict");
        assert_eq!(verdict("tcp LISTEN 0 1 *:15020 *:*").0, Verdict::Failed);
        assert_eq!(verdict("udp UNCONN 0 0 0.0.0.0:53 0.0.0.0:*").0, Verdict::Failed);
        assert_eq!(verdict("tcp LISTEN 0 1 10.0.0.5:15020 0.0.0.0:*").0, Verdict::Ok);
        assert_eq!(verdict("tcp LISTEN 0 1 0.0.0.0:15008 0.0.0.0:* users:((\"meshd\",pid=7,fd=3))").0, Verdict::Ok);
    }
}
