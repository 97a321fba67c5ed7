//! Who opens a connection to a virtual IP or a captured raw address, told by the kernel as its first packet leaves: a client that writes and
//! closes at once is nobody's any more by the time its connection is accepted
//! (docs/adr/0007-iptables-tells-as-it-happens.md).

use super::super::wanted::{Caller, Facts, Present, Wanted};
use super::table::Chain;
use super::{GROUP, SYN, cgroup_match};

pub(super) const CHAIN: &str = "MESHD_OWNER";

const PREFIX: &str = "meshd:own:";
const USER: &str = "user";
const UNKNOWN: &str = "unknown";

/// Before any NAT, as the client knows its connection: for mangle's OUTPUT.
pub(super) fn rule(vip: &str) -> String {
    format!("-d {vip} -p tcp {SYN} -j {CHAIN}")
}

/// What rules say of who opened a connection, besides its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// An enrolled unit's.
    Cgroup(u64),
    /// The user alone decides: nobody is enrolled otherwise.
    User,
    /// None of those that rules know.
    Unknown,
}

/// A packet is told of once: with the cgroup of the enrolled unit that sent it, or without any.
pub(super) fn chain(wanted: &Wanted, facts: &Facts) -> Chain {
    let mut rules = Vec::new();
    for present in wanted.enrolled.iter().flat_map(|caller| facts.present(caller)) {
        if let Present::Cgroup(cgroup) = present {
            let from = cgroup_match(cgroup);
            rules.push(format!("{from} {}", tell(&format!("{:x}", cgroup.id))));
            rules.push(format!("{from} -j RETURN"));
        }
    }
    let by_user = wanted.enrolled.iter().all(|caller| matches!(caller, Caller::Uid(_)));
    rules.push(tell(if by_user { USER } else { UNKNOWN }));
    Chain { name: CHAIN, rules }
}

fn tell(what: &str) -> String {
    format!("-j NFLOG --nflog-group {GROUP} --nflog-threshold 1 --nflog-prefix {PREFIX}{what}")
}

/// None for a message of other rules.
pub(super) fn told(prefix: &str) -> Option<Told> {
    match prefix.strip_prefix(PREFIX)? {
        USER => Some(Told::User),
        UNKNOWN => Some(Told::Unknown),
        cgroup => u64::from_str_radix(cgroup, 16).ok().map(Told::Cgroup),
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::wanted::tests::wanted;
    use super::*;
    use crate::enrol::Cgroup;

    #[test]
    fn every_opening_is_told_once_with_the_cgroup_of_its_enrolled_unit() {
        let mut wanted = wanted();
        wanted.enrolled =
            [Caller::Unit("web.service".into()), Caller::Unit("off.service".into()), Caller::Uid(7)].into();
        let path = "system.slice/web.service".to_owned();
        let cgroup = Cgroup { nft_path: format!("unified/{path}"), path, level: 2, id: 0x2a };
        let facts = Facts { cgroups: [("web.service".to_owned(), cgroup)].into(), ..Facts::default() };
        let log = "-j NFLOG --nflog-group 7471 --nflog-threshold 1 --nflog-prefix meshd:own:";
        let unit = "-m cgroup --path \"system.slice/web.service\"";
        let expected = [format!("{unit} {log}2a"), format!("{unit} -j RETURN"), format!("{log}unknown")];
        assert_eq!(chain(&wanted, &facts).rules, expected);
        assert_eq!((told("meshd:own:2a"), told("meshd:own:unknown")), (Some(Told::Cgroup(0x2a)), Some(Told::Unknown)));
        assert_eq!((told("meshd:own:"), told("ulogd:2a")), (None, None));
    }

    #[test]
    fn where_all_are_enrolled_by_user_the_user_decides() {
        let mut wanted = wanted();
        wanted.enrolled = [Caller::Uid(7), Caller::Uid(8)].into();
        let [rule] = &chain(&wanted, &Facts::default()).rules[..] else { panic!("more than one rule") };
        assert_eq!(told(rule.rsplit(' ').next().unwrap()), Some(Told::User));
        wanted.enrolled.insert(Caller::Port(80));
        assert!(chain(&wanted, &Facts::default()).rules[0].ends_with(UNKNOWN));
    }
}
