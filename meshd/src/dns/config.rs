//! `[dns]` of meshd.toml.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer};

use super::resolv_conf::DNS_PORT;
use super::upstream::is_local;
use super::zone::{Zone, Zones};

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DnsConfig {
    pub listen: SocketAddr,
    /// The mesh domain: `payments.shop.mesh`.
    pub domain: Zone,
    /// `cluster.local` answers `payments.shop.svc.cluster.local`; an empty text switches it off.
    #[serde(deserialize_with = "zone_or_empty")]
    pub kubernetes_domain: Option<Zone>,
    /// Who is asked for other names; the host's own servers if left out, nobody if empty.
    #[serde(deserialize_with = "servers")]
    pub upstream: Option<Vec<SocketAddr>>,
    /// Networks whose questions are forwarded. This host's own always are.
    pub forward_for: Vec<IpNet>,
    pub integration: Integration,
}

/// How programs of this host come to ask us.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Integration {
    /// `resolved` where lookups go through systemd-resolved, else `units`.
    #[default]
    Auto,
    /// systemd-resolved asks us for our domains, and nothing else.
    Resolved,
    /// Enrolled units see a resolv.conf of their own.
    Units,
    /// The host's /etc/resolv.conf names us first.
    Host,
    Off,
}

impl Default for DnsConfig {
    fn default() -> DnsConfig {
        let constant = |domain| Zone::new(domain).expect("a constant label is a domain");
        DnsConfig {
            listen: (Ipv4Addr::LOCALHOST, DNS_PORT).into(),
            domain: constant("mesh"),
            kubernetes_domain: Some(constant("cluster.local")),
            upstream: None,
            forward_for: Vec::new(),
            integration: Integration::Auto,
        }
    }
}

impl DnsConfig {
    /// What contradicts itself: the field, and what to do.
    pub fn problem(&self) -> Option<(&'static str, &'static str)> {
        if self.kubernetes_domain.as_ref() == Some(&self.domain) {
            return Some((
                "dns.kubernetes_domain",
                "is the same as dns.domain; give each its own, or switch it off with \"\"",
            ));
        }
        if self.listen.port() != DNS_PORT && matches!(self.integration, Integration::Units | Integration::Host) {
            return Some(("dns.integration", "resolv.conf cannot name a port, so dns.listen must have port 53 for it"));
        }
        None
    }

    pub(super) fn zones(&self) -> Zones {
        Zones { mesh: self.domain.clone(), kubernetes: self.kubernetes_domain.clone() }
    }

    /// Where programs of this host reach us.
    pub(super) fn local_address(&self) -> SocketAddr {
        let ip = match self.listen.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, self.listen.port())
    }

    /// Forwarding for whoever asks would make an open resolver, a weapon against others.
    pub(super) fn may_forward_for(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        client.is_loopback()
            || self.forward_for.iter().any(|network| network.contains(&client))
            || client == self.listen.ip()
            || self.listen.ip().is_unspecified() && is_local(client)
    }
}

fn zone_or_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Zone>, D::Error> {
    let domain = String::deserialize(deserializer)?;
    if domain.is_empty() {
        return Ok(None);
    }
    Zone::new(&domain).map(Some).map_err(serde::de::Error::custom)
}

fn servers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<SocketAddr>>, D::Error> {
    let server = |text: &String| {
        let without_port = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DNS_PORT));
        text.parse().or(without_port).map_err(|_| {
            serde::de::Error::custom(format!("`{text}` is not a server; give an address, with a port if it is not 53"))
        })
    };
    Vec::<String>::deserialize(deserializer)?.iter().map(server).collect::<Result<_, _>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DnsConfig, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn the_configuration_has_defaults_and_refuses_what_it_does_not_know() {
        assert_eq!(parse("").unwrap(), DnsConfig::default());
        assert_eq!(parse("domain = \"mesh.corp\"").unwrap().domain, Zone::new("mesh.corp").unwrap());
        assert!(parse("domian = \"x\"").unwrap_err().contains("unknown field `domian`"));
        assert!(parse("domain = \"a b\"").unwrap_err().contains("is not a domain"));
        assert!(parse("integration = \"network-manager\"").unwrap_err().contains("`resolved`"));
    }

    #[test]
    fn an_empty_kubernetes_domain_switches_it_off() {
        assert_eq!(parse("kubernetes_domain = \"\"").unwrap().kubernetes_domain, None);
        assert!(parse("kubernetes_domain = \"a b\"").unwrap_err().contains("is not a domain"));
    }

    #[test]
    fn servers_may_leave_out_the_port() {
        let config =
            parse("upstream = [\"10.0.0.2\", \"10.0.0.3:5353\", \"2001:db8::1\", \"[2001:db8::2]:54\"]").unwrap();
        let expected = ["10.0.0.2:53", "10.0.0.3:5353", "[2001:db8::1]:53", "[2001:db8::2]:54"];
        assert_eq!(config.upstream.unwrap(), expected.map(|server| server.parse().unwrap()));
        assert!(parse("upstream = [\"dns.example\"]").unwrap_err().contains("`dns.example` is not a server"));
    }

    #[test]
    fn contradictions_name_their_field() {
        let problem = |text: &str| parse(text).unwrap().problem().map(|(field, _)| field);
        assert_eq!(problem("domain = \"cluster.local\""), Some("dns.kubernetes_domain"));
        assert_eq!(problem("listen = \"127.0.0.1:5353\"\nintegration = \"units\""), Some("dns.integration"));
        assert_eq!(problem("listen = \"127.0.0.1:5353\"\nintegration = \"resolved\""), None);
        assert_eq!(problem(""), None);
    }

    #[test]
    fn only_this_host_and_networks_that_were_named_are_forwarded_for() {
        let config = parse("listen = \"10.0.0.5:53\"\nforward_for = [\"10.1.0.0/16\"]").unwrap();
        let may = |client: &str| config.may_forward_for(client.parse().unwrap());
        assert!(may("127.0.0.1") && may("::1") && may("10.0.0.5") && may("10.1.2.3") && may("::ffff:10.1.2.3"));
        assert!(!may("10.0.0.6") && !may("192.0.2.1") && !may("2001:db8::1"));
        assert!(!DnsConfig::default().may_forward_for("10.0.0.6".parse().unwrap()));
    }
}
