//! The rule set as text: one nft transaction, and the routes that keep virtual IPs on this host. Pure.

use std::fmt::Write;

use super::CaptureConfig;

/// A port whose plaintext callers the kernel refuses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct StrictPort {
    pub port: u16,
    /// Uids that may still call it on this host: its owner's and the operator's `local_ok`.
    pub local_uids: Vec<u32>,
}

/// The `nft -f -` input that replaces our table in one transaction.
pub fn render(config: &CaptureConfig, capture_port: u16, daemon_uid: u32, strict: &[StrictPort]) -> String {
    let mut text = String::with_capacity(2048);
    let (vip4, vip6) = (config.vip4, config.vip6);
    let _ = write!(
        text,
        "table inet meshd\n\
         delete table inet meshd\n\
         table inet meshd {{\n\
         \x20 chain prerouting {{\n\
         \x20   type filter hook prerouting priority mangle; policy accept;\n\
         \x20   iif lo ip daddr {vip4} meta l4proto tcp tproxy ip to 127.0.0.1:{capture_port} accept\n\
         \x20   iif lo ip6 daddr {vip6} meta l4proto tcp tproxy ip6 to [::1]:{capture_port} accept\n\
         \x20   iif lo ip daddr {vip4} meta l4proto tcp reject with tcp reset\n\
         \x20   iif lo ip6 daddr {vip6} meta l4proto tcp reject with tcp reset\n\
         \x20   ip daddr {vip4} reject\n\
         \x20   ip6 daddr {vip6} reject\n\
         \x20 }}\n"
    );
    render_strict(&mut text, config, daemon_uid, strict);
    text.push_str("}\n");
    text
}

/// Only SYNs are judged: making a port strict never cuts a connection that is already open.
fn render_strict(text: &mut String, config: &CaptureConfig, daemon_uid: u32, strict: &[StrictPort]) {
    if strict.is_empty() {
        return;
    }
    let ports: Vec<String> = strict.iter().map(|strict| strict.port.to_string()).collect();
    let ports = ports.join(", ");
    let (mark, mask) = (config.mark, config.mark_mask);
    let _ = write!(
        text,
        "  chain strict_local {{\n\
         \x20   type filter hook output priority filter; policy accept;\n\
         \x20   oif lo tcp dport {{ {ports} }} tcp flags syn / fin,syn,rst,ack jump strict_caller\n\
         \x20 }}\n\
         \x20 chain strict_caller {{\n\
         \x20   meta skuid {daemon_uid} meta mark & {mask:#010x} == {mark:#010x} accept\n"
    );
    for port in strict.iter().filter(|strict| !strict.local_uids.is_empty()) {
        let uids: Vec<String> = port.local_uids.iter().map(u32::to_string).collect();
        let _ = writeln!(text, "    tcp dport {} meta skuid {{ {} }} accept", port.port, uids.join(", "));
    }
    let _ = write!(
        text,
        "    counter reject with tcp reset\n\
         \x20 }}\n\
         \x20 chain strict_remote {{\n\
         \x20   type filter hook input priority filter; policy accept;\n\
         \x20   iif != lo tcp dport {{ {ports} }} tcp flags syn / fin,syn,rst,ack counter reject with tcp reset\n\
         \x20 }}\n"
    );
}

/// The `ip` commands (per family) that give virtual IPs a local route in a table of their own: they
/// never leave the host, and stay out of the `local` table that Docker's `--dst-type LOCAL` rules look at.
pub(super) fn routes(config: &CaptureConfig) -> Vec<RouteSetup> {
    let table = config.table.to_string();
    [("-4", config.vip4.to_string(), "127.0.0.1"), ("-6", config.vip6.to_string(), "::1")]
        .into_iter()
        .map(|(family, net, source)| RouteSetup {
            family,
            // `protocol kernel` keeps systemd-networkd from deleting them as foreign (systemd#19106).
            route: words(&format!("route replace local {net} dev lo src {source} table {table} protocol kernel")),
            rule: words(&format!("rule add to {net} lookup {table} pref 100 protocol kernel")),
            delete_route: words(&format!("route del local {net} dev lo table {table}")),
            delete_rule: words(&format!("rule del to {net} lookup {table} pref 100")),
        })
        .collect()
}

pub(super) struct RouteSetup {
    pub family: &'static str,
    pub route: Vec<String>,
    pub rule: Vec<String>,
    pub delete_route: Vec<String>,
    pub delete_rule: Vec<String>,
}

fn words(command: &str) -> Vec<String> {
    command.split(' ').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_strict_ports_only_virtual_ips_are_touched() {
        let text = render(&CaptureConfig::default(), 15001, 998, &[]);
        let expected = "table inet meshd
delete table inet meshd
table inet meshd {
  chain prerouting {
    type filter hook prerouting priority mangle; policy accept;
    iif lo ip daddr 240.240.0.0/16 meta l4proto tcp tproxy ip to 127.0.0.1:15001 accept
    iif lo ip6 daddr fd6d:6573:6864::/64 meta l4proto tcp tproxy ip6 to [::1]:15001 accept
    iif lo ip daddr 240.240.0.0/16 meta l4proto tcp reject with tcp reset
    iif lo ip6 daddr fd6d:6573:6864::/64 meta l4proto tcp reject with tcp reset
    ip daddr 240.240.0.0/16 reject
    ip6 daddr fd6d:6573:6864::/64 reject
  }
}
";
        assert_eq!(text, expected);
    }

    #[test]
    fn strict_ports_let_in_only_the_daemon_and_named_uids() {
        let strict =
            [StrictPort { port: 5432, local_uids: vec![] }, StrictPort { port: 8080, local_uids: vec![997, 1001] }];
        let text = render(&CaptureConfig::default(), 15001, 998, &strict);
        for line in [
            "oif lo tcp dport { 5432, 8080 } tcp flags syn / fin,syn,rst,ack jump strict_caller",
            "meta skuid 998 meta mark & 0x00ff0000 == 0x004d0000 accept",
            "tcp dport 8080 meta skuid { 997, 1001 } accept",
            "iif != lo tcp dport { 5432, 8080 } tcp flags syn / fin,syn,rst,ack counter reject with tcp reset",
        ] {
            assert!(text.contains(line), "missing `{line}` in\n{text}");
        }
    }
}
