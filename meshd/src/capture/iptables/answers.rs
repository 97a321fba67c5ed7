//! Deliveries at an address of this host that seem to come from the peer's: the flows we opened are told from others by
//! a mark on their connection, and what answers them gets a mark that routes lead back to us (`capture/transparent.rs`).

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::super::wanted::Wanted;
use super::own_sockets;
use super::variant::Family;

/// For mangle's OUTPUT, where a changed mark is routed anew.
pub(super) fn rules(family: Family, wanted: &Wanted) -> Vec<String> {
    let of_family = |address: &&SocketAddr| address.is_ipv4() == (family == Family::V4);
    let deliveries = wanted.transparent.iter().filter(of_family).filter(|address| !address.ip().is_loopback());
    let ports: BTreeSet<u16> = deliveries.map(SocketAddr::port).collect();
    let (own, answer, mask) = (own_sockets(wanted), wanted.answer_mark(), wanted.mark_mask);
    let rules = ports.into_iter().flat_map(|port| {
        [
            format!("-o lo -p tcp --dport {port} {own} -j CONNMARK --set-xmark {answer:#x}/{mask:#x}"),
            format!(
                "-p tcp --sport {port} -m conntrack --ctdir REPLY -m connmark --mark {answer:#x}/{mask:#x} -j MARK \
                 --set-xmark {answer:#x}/{mask:#x}"
            ),
        ]
    });
    rules.collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::tests::wanted;
    use super::*;

    #[test]
    fn only_deliveries_to_an_address_of_the_host_are_told_by_a_mark() {
        let transparent = ["127.0.0.1:8080", "10.0.0.5:8081", "[fd00::5]:8082"].map(|address| address.parse().unwrap());
        let wanted = Wanted { transparent: transparent.into(), ..wanted() };
        let expected = [
            "-o lo -p tcp --dport 8081 -m owner --uid-owner 998 -m mark --mark 0x4d0000/0xff0000 -j CONNMARK --set-xmark 0x4c0000/0xff0000",
            "-p tcp --sport 8081 -m conntrack --ctdir REPLY -m connmark --mark 0x4c0000/0xff0000 -j MARK --set-xmark 0x4c0000/0xff0000",
        ];
        assert_eq!(rules(Family::V4, &wanted), expected);
        assert!(rules(Family::V6, &wanted)[0].contains("--dport 8082"));
    }
}
