//! The text of `resolv.conf`, read and written. Pure.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// First line of every file of this kind that we write.
pub(super) const MARK: &str = "# Written by meshd:";
/// MAXNS of glibc; it ignores further ones.
pub(super) const MAX_SERVERS: usize = 3;
pub(super) const DNS_PORT: u16 = 53;
/// The local servers of systemd-resolved. What they are asked they may ask us.
const RESOLVED_STUBS: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];

/// What matters of a host's file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ResolvConf {
    /// As written, in order; link-local ones name their link: `fe80::1%eth0`.
    pub(crate) servers: Vec<String>,
    /// `search`, `domain`, `sortlist` and `options` lines.
    pub(crate) settings: Vec<String>,
}

impl ResolvConf {
    /// Lenient as glibc is: what it does not know it skips.
    pub(crate) fn parse(text: &str) -> ResolvConf {
        let mut found = ResolvConf::default();
        for line in text.lines().filter(|line| !line.starts_with(['#', ';'])) {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => found.servers.extend(words.next().map(str::to_owned)),
                Some("search" | "domain" | "sortlist" | "options") => found.settings.push(line.trim().to_owned()),
                _ => {}
            }
        }
        found
    }

    /// Whether lookups of this host go through systemd-resolved.
    pub(crate) fn asks_resolved(&self) -> bool {
        self.servers.iter().any(|server| server.parse().is_ok_and(is_resolved_stub))
    }

    /// The servers by address; `link_index` resolves the zones of link-local ones.
    pub(super) fn addresses(&self, link_index: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
        self.servers.iter().filter_map(|server| server_address(server, &link_index)).collect()
    }
}

fn server_address(server: &str, link_index: impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    let Some((address, zone)) = server.split_once('%') else {
        return Some((server.parse::<IpAddr>().ok()?, DNS_PORT).into());
    };
    let index = zone.parse().ok().or_else(|| link_index(zone))?;
    Some(SocketAddrV6::new(address.parse::<Ipv6Addr>().ok()?, DNS_PORT, 0, index).into())
}

pub(super) fn is_resolved_stub(address: IpAddr) -> bool {
    RESOLVED_STUBS.iter().any(|stub| address == IpAddr::V4(*stub))
}

/// The host's file with our server in front. The others stay behind it: glibc asks them when ours does not answer, so
/// that everything but the mesh resolves while meshd is away.
pub(super) fn with_ours_first(ours: IpAddr, host: &ResolvConf) -> String {
    let mut text = format!("{MARK} names of the mesh first, then this host's own servers.\n");
    let others = host.servers.iter().filter(|server| server.parse() != Ok(ours));
    for server in std::iter::once(&ours.to_string()).chain(others).take(MAX_SERVERS) {
        let _ = writeln!(text, "nameserver {server}");
    }
    for setting in host.settings.iter().filter_map(|setting| without_rotation(setting)) {
        let _ = writeln!(text, "{setting}");
    }
    text
}

/// `rotate` would ask the host's servers first now and then, and they deny the mesh's names.
fn without_rotation(setting: &str) -> Option<String> {
    let mut words = setting.split_whitespace();
    if words.next() != Some("options") {
        return Some(setting.to_owned());
    }
    let kept: Vec<&str> = words.filter(|option| *option != "rotate").collect();
    (!kept.is_empty()).then(|| format!("options {}", kept.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OURS: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn servers_and_settings_are_found_among_everything_else() {
        let text = "# by dhclient\n;nameserver 9.9.9.9\nnameserver 10.0.0.2\nnameserver\t10.0.0.3 # comment\n\
                    nameserver fe80::1%eth0\nnameserver fe80::2%7\nnameserver nonsense\nnameserver\nsearch a.example b.example\n\
                    options edns0 rotate\nlookup file bind\n";
        let parsed = ResolvConf::parse(text);
        assert_eq!(parsed.settings, ["search a.example b.example", "options edns0 rotate"]);
        let addresses: Vec<String> =
            parsed.addresses(|link| (link == "eth0").then_some(2)).iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.0.0.2:53", "10.0.0.3:53", "[fe80::1%2]:53", "[fe80::2%7]:53"]);
        assert!(parsed.addresses(|_| None).len() == 3, "a link that is not there has no server");
    }

    #[test]
    fn resolved_is_known_by_its_stub() {
        assert!(ResolvConf::parse("nameserver 127.0.0.53\n").asks_resolved());
        assert!(ResolvConf::parse("nameserver 10.0.0.2\nnameserver 127.0.0.54\n").asks_resolved());
        assert!(!ResolvConf::parse("nameserver 127.0.0.1\n").asks_resolved());
    }

    #[test]
    fn our_server_comes_first_and_glibc_sees_no_more_than_three() {
        let host = ResolvConf::parse(
            "nameserver 10.0.0.2\nnameserver 127.0.0.1\nnameserver 10.0.0.3\nnameserver 10.0.0.4\nsearch corp.example\n\
             options rotate timeout:1\noptions rotate\n",
        );
        let expected = "# Written by meshd: names of the mesh first, then this host's own servers.\n\
                        nameserver 127.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n\
                        search corp.example\noptions timeout:1\n";
        assert_eq!(with_ours_first(OURS, &host), expected);
    }

    proptest! {
        #[test]
        fn any_text_gives_a_file_that_asks_us_first(text in "(?s).{0,400}", known in prop::collection::vec("nameserver [0-9.:a-f%]{1,20}", 0..6)) {
            let host = ResolvConf::parse(&format!("{}\n{text}", known.join("\n")));
            let written = ResolvConf::parse(&with_ours_first(OURS, &host));
            prop_assert_eq!(written.servers.first(), Some(&OURS.to_string()));
            prop_assert!(written.servers.len() <= MAX_SERVERS);
            prop_assert!(!written.settings.iter().any(|line| line.starts_with("options") && line.contains(" rotate ")));
            // What we wrote, read as a host's file, gives the same again.
            prop_assert_eq!(with_ours_first(OURS, &written), with_ours_first(OURS, &host));
        }
    }
}
