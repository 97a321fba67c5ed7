//! The addresses of the device, and what `ip` is told: pure text, run through the tool.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::super::routes::{PREFERENCE, ensure_rule, ip, present};
use super::super::tool::{CaptureError, IP};
use super::super::wanted::Wanted;
use super::flows::Flows;
use super::rewrite::End;
use super::translate;

pub(super) const NAME: &str = "meshd-vip";
pub(super) const PROBE_NAME: &str = "meshd-probe%d";

/// Of the range for benchmarks (RFC 2544), which no network routes. The phantoms are the addresses after it.
const HOST4: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const PREFIX4: u8 = 29;
/// Of the network after the virtual IPs' own.
const HOST6: Ipv6Addr = Ipv6Addr::new(0xfd6d, 0x6573, 0x6864, 1, 0, 0, 0, 1);
const PREFIX6: u8 = 125;

/// Numbers, for not every host has /etc/protocols.
const ICMP: u8 = 1;
const UDP: u8 = 17;
const ICMP6: u8 = 58;

/// Both ends are this host: packets as large as TCP makes them.
const MTU: u32 = 65535;
/// Packets that wait for the pump. Enough that a thousand connections starting at once lose none.
const QUEUE: u32 = 4096;

pub(super) fn listeners(wanted: &Wanted) -> [SocketAddr; 2] {
    let at = |address| SocketAddr::new(address, wanted.capture_port);
    [at(HOST4.into()), at(HOST6.into())]
}

pub(super) fn flows(wanted: &Wanted) -> Flows {
    let port = wanted.capture_port;
    let (vip4, vip6) = (wanted.vip4, wanted.vip6);
    Flows::new(
        translate::Family { listener: End { address: HOST4, port }, virtual_ips: (vip4.network(), vip4.broadcast()) },
        translate::Family { listener: End { address: HOST6, port }, virtual_ips: (vip6.network(), vip6.broadcast()) },
    )
}

/// What is said to `ip` about one address family.
struct Family {
    option: &'static str,
    net: String,
    host: IpAddr,
    address: String,
    route: String,
    delete_route: String,
    /// This host's own packets go to the device, but for datagrams and pings, which nobody would answer there. What
    /// others send to a virtual IP, and everything when the device is gone, is refused before it can leave the host.
    rules: [(u32, String); 4],
}

fn families(wanted: &Wanted) -> [Family; 2] {
    let table = wanted.table;
    let family = |option, net: String, host: IpAddr, address: String, icmp: u8| Family {
        option,
        host,
        address: format!("address replace {address}"),
        // `protocol kernel` keeps systemd-networkd from deleting them as foreign (systemd#19106).
        route: format!("route replace {net} dev {NAME} src {host} table {table} protocol kernel"),
        delete_route: format!("route del {net} dev {NAME} table {table}"),
        // Not `ipproto tcp`: reverse path filters ask without a protocol whether a source is where it should be.
        rules: [
            (PREFERENCE, format!("to {net} iif lo ipproto {UDP} unreachable")),
            (PREFERENCE, format!("to {net} iif lo ipproto {icmp} unreachable")),
            (PREFERENCE + 1, format!("to {net} iif lo lookup {table}")),
            (PREFERENCE + 2, format!("to {net} unreachable")),
        ],
        net,
    };
    [
        family("-4", wanted.vip4.to_string(), HOST4.into(), format!("{HOST4}/{PREFIX4} dev {NAME}"), ICMP),
        // Nobody else is on that link; without duplicate address detection listeners can be bound right away.
        family("-6", wanted.vip6.to_string(), HOST6.into(), format!("{HOST6}/{PREFIX6} dev {NAME} nodad"), ICMP6),
    ]
}

impl Family {
    fn add_rules(&self) -> impl Iterator<Item = String> {
        self.rules.iter().map(|(preference, rule)| format!("rule add {rule} pref {preference} protocol kernel"))
    }

    /// By their preferences, for the way `ip` writes the rest differs.
    fn rules_shown(&self, shown: &str) -> bool {
        let net = format!(" to {} ", self.net);
        let ours = shown.lines().filter(|line| line.contains(&net));
        let preferences = ours.filter_map(|line| line.split(':').next()?.parse::<u32>().ok());
        preferences.eq(self.rules.iter().map(|(preference, _)| *preference))
    }

    /// IPv6 may be switched off for new devices: then its virtual IPs are only refused.
    fn usable(&self) -> bool {
        let disabled = || std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6"));
        self.option == "-4" || disabled().is_ok_and(|disabled| disabled.trim() == "0")
    }
}

fn link() -> String {
    format!("link set dev {NAME} mtu {MTU} txqueuelen {QUEUE} up")
}

/// Puts addresses on the device and takes it up. Safe to repeat.
pub(super) fn configure(wanted: &Wanted) -> Result<(), CaptureError> {
    // No link-local address: the kernel would look for routers there.
    let _ = ip("-6", &format!("link set dev {NAME} addrgenmode none"));
    ip("-4", &link())?;
    for family in families(wanted).iter().filter(|family| family.usable()) {
        ip(family.option, &family.address)?;
    }
    Ok(())
}

/// Leads virtual IPs to the device. Safe to repeat.
pub(super) fn install_routes(wanted: &Wanted) -> Result<(), CaptureError> {
    for family in families(wanted).iter().filter(|family| present(family.option)) {
        if family.usable() {
            ip(family.option, &family.route)?;
        }
        family.add_rules().try_for_each(|rule| ensure_rule(family.option, &rule))?;
    }
    Ok(())
}

/// Whether device, addresses, routes and rules are all there.
pub(super) fn intact(wanted: &Wanted) -> Result<bool, CaptureError> {
    let table = wanted.table.to_string();
    for family in families(wanted).iter().filter(|family| present(family.option)) {
        let rules = IP.run(&[family.option, "rule", "show"], "")?;
        if !family.rules_shown(&rules) {
            return Ok(false);
        }
        // Both fail when the device or the table is gone.
        let addresses = IP.run(&[family.option, "address", "show", "dev", NAME, "up"], "").unwrap_or_default();
        let routes = IP.run(&[family.option, "route", "show", "table", &table, "dev", NAME], "").unwrap_or_default();
        let here = addresses.contains(&format!(" {}/", family.host)) && routes.contains("proto kernel");
        if family.usable() && !here {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes routes and rules; fine when there is nothing left. The device goes with the daemon that made it.
pub(super) fn remove_routes(wanted: &Wanted) {
    for family in families(wanted).iter().filter(|family| present(family.option)) {
        for (preference, rule) in &family.rules {
            while ip(family.option, &format!("rule del {rule} pref {preference}")).is_ok() {}
        }
        let _ = ip(family.option, &family.delete_route);
    }
}

/// As an operator would type them, after making the device.
pub(super) fn render(wanted: &Wanted) -> String {
    let mut text = format!("# device {NAME}, made and served by meshd\nip {}\n", link());
    for family in families(wanted) {
        let commands = [family.address.clone(), family.route.clone()].into_iter().chain(family.add_rules());
        text.extend(commands.map(|command| format!("ip {} {command}\n", family.option)));
    }
    text
}

#[cfg(test)]
mod tests {
    use ipnet::{Ipv4Net, Ipv6Net};

    use super::super::super::wanted::tests::wanted;
    use super::super::rewrite::Address;
    use super::super::translate::PHANTOMS;
    use super::*;

    #[test]
    fn own_connections_to_virtual_ips_go_to_the_device_and_the_rest_nowhere() {
        let expected = "# device meshd-vip, made and served by meshd
ip link set dev meshd-vip mtu 65535 txqueuelen 4096 up
ip -4 address replace 198.18.0.1/29 dev meshd-vip
ip -4 route replace 240.240.0.0/16 dev meshd-vip src 198.18.0.1 table 7471 protocol kernel
ip -4 rule add to 240.240.0.0/16 iif lo ipproto 17 unreachable pref 100 protocol kernel
ip -4 rule add to 240.240.0.0/16 iif lo ipproto 1 unreachable pref 100 protocol kernel
ip -4 rule add to 240.240.0.0/16 iif lo lookup 7471 pref 101 protocol kernel
ip -4 rule add to 240.240.0.0/16 unreachable pref 102 protocol kernel
ip -6 address replace fd6d:6573:6864:1::1/125 dev meshd-vip nodad
ip -6 route replace fd6d:6573:6864::/64 dev meshd-vip src fd6d:6573:6864:1::1 table 7471 protocol kernel
ip -6 rule add to fd6d:6573:6864::/64 iif lo ipproto 17 unreachable pref 100 protocol kernel
ip -6 rule add to fd6d:6573:6864::/64 iif lo ipproto 58 unreachable pref 100 protocol kernel
ip -6 rule add to fd6d:6573:6864::/64 iif lo lookup 7471 pref 101 protocol kernel
ip -6 rule add to fd6d:6573:6864::/64 unreachable pref 102 protocol kernel
";
        assert_eq!(render(&wanted()), expected);
    }

    #[test]
    fn a_rule_that_is_missing_or_out_of_place_is_noticed() {
        let shown = "0:\tfrom all lookup local
100:\tfrom all to 240.240.0.0/16 iif lo ipproto udp unreachable
100:\tfrom all to 240.240.0.0/16 iif lo ipproto icmp unreachable
101:\tfrom all to 240.240.0.0/16 iif lo lookup 7471
102:\tfrom all to 240.240.0.0/16 unreachable
32766:\tfrom all lookup main
";
        let [family, _] = families(&wanted());
        assert!(family.rules_shown(shown));
        for missing in shown.lines().filter(|line| line.contains("240.240")) {
            assert!(!family.rules_shown(&shown.replacen(missing, "", 1)), "{missing}");
        }
        assert!(!family.rules_shown(&shown.replace("101:", "90:")));
    }

    #[test]
    fn the_device_has_room_for_every_phantom() {
        let host4 = Ipv4Net::new(HOST4, PREFIX4).unwrap();
        let host6 = Ipv6Net::new(HOST6, PREFIX6).unwrap();
        assert!(host4.contains(&HOST4.plus(PHANTOMS)) && HOST4.plus(PHANTOMS) != host4.broadcast());
        assert!(host6.contains(&HOST6.plus(PHANTOMS)));
        assert!(!wanted().vip6.contains(&HOST6), "replies to us must not be captured");
    }
}
