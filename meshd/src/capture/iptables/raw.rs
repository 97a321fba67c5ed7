//! Raw service addresses: captured for enrolled callers only, and only while the daemon says that it is alive.
//!
//! NAT decides at a connection's first packet, so open connections are never touched. The rules outlive a daemon that
//! was killed, but match nothing then (`alive`).

use std::net::SocketAddr;

use super::super::wanted::{Facts, Wanted};
use super::table::Chain;
use super::variant::Family;
use super::{Abilities, SYN, alive, local_caller, own_sockets, owners};

pub(super) const CHAINS: [&str; 3] = ["MESHD_RAW", "MESHD_TAKE", "MESHD_TAKEN"];

/// For nat's OUTPUT. NAT decides per connection by itself; the SYN is asked for because conntrack also adopts
/// connections it meets in the middle.
pub(super) fn rule() -> String {
    format!("-p tcp {SYN} -j MESHD_RAW")
}

pub(super) fn chains(family: Family, wanted: &Wanted, facts: &Facts, can: Abilities) -> Vec<Chain> {
    let mut callers = vec![
        format!("{} -j RETURN", own_sockets(wanted)),
        "-m addrtype --dst-type LOCAL -j RETURN".to_owned(),
        "-m conntrack --ctstatus CONFIRMED -j RETURN".to_owned(),
    ];
    // A unit that does not run has no cgroup, and calls nobody.
    let present = wanted.raw_callers.iter().flat_map(|caller| facts.present(caller));
    callers.extend(present.map(|caller| format!("{} -g MESHD_TAKE", local_caller(caller))));
    let of_family = |address: &&SocketAddr| address.is_ipv4() == (family == Family::V4);
    let addresses = facts.raw_addresses.iter().filter(of_family).map(|address| {
        let (ip, port) = (address.ip(), address.port());
        format!("-d {ip} -p tcp --dport {port} -g MESHD_TAKEN")
    });
    let take = std::iter::once(format!("{} -j RETURN", alive::unless_alive(family))).chain(addresses);
    let redirect = format!("-p tcp -j REDIRECT --to-ports {}", wanted.capture_port);
    let taken = can.owners.then(|| format!("-j {}", owners::CHAIN)).into_iter().chain([redirect]);
    let rules = [callers, take.collect(), taken.collect()];
    let mut chains: Vec<Chain> = CHAINS.into_iter().zip(rules).map(|(name, rules)| Chain { name, rules }).collect();
    chains.extend(can.owners.then(|| owners::chain(wanted, facts)));
    chains
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::super::wanted::Caller;
    use super::super::super::wanted::tests::wanted;
    use super::*;
    use crate::enrol::Cgroup;

    #[test]
    fn only_first_syns_of_enrolled_callers_are_taken_and_only_while_the_daemon_lives() {
        let path = "system.slice/web.service".to_owned();
        let cgroup = Cgroup { nft_path: format!("unified/{path}"), path, level: 2, id: 7 };
        let facts = Facts {
            cgroups: [("web.service".to_owned(), cgroup)].into(),
            raw_addresses: Arc::new(["10.96.3.7:80", "[fd00::3]:80"].map(|address| address.parse().unwrap()).into()),
            ..Facts::default()
        };
        let callers = [Caller::Uid(1000), Caller::Unit("web.service".into()), Caller::Unit("off.service".into())];
        let wanted = Wanted { raw_callers: callers.into(), ..wanted() };
        let chains_of = |family| chains(family, &wanted, &facts, Abilities { owners: true, ..Abilities::default() });
        let [callers, take, taken, owners] = &chains_of(Family::V4)[..] else { panic!("other chains") };
        let expected = [
            "-m owner --uid-owner 998 -m mark --mark 0x4d0000/0xff0000 -j RETURN",
            "-m addrtype --dst-type LOCAL -j RETURN",
            "-m conntrack --ctstatus CONFIRMED -j RETURN",
            "-m owner --uid-owner 1000 -g MESHD_TAKE",
            "-m cgroup --path \"system.slice/web.service\" -g MESHD_TAKE",
        ];
        assert_eq!(callers.rules, expected);
        let expected = [
            "-m recent --name MESHD_ALIVE4 --mask 0.0.0.0 ! --rcheck --seconds 2 -j RETURN",
            "-d 10.96.3.7 -p tcp --dport 80 -g MESHD_TAKEN",
        ];
        assert_eq!(take.rules, expected);
        assert_eq!(taken.rules, ["-j MESHD_OWNER", "-p tcp -j REDIRECT --to-ports 15001"]);
        assert_eq!(owners.name, "MESHD_OWNER");
        let take = &chains_of(Family::V6)[1];
        assert!(take.rules[0].contains("MESHD_ALIVE6 --mask ::") && take.rules[1].contains("-d fd00::3 "), "{take:?}");
    }
}
