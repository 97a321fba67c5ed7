//! What rules have told, added up. Pure but for the question whose a socket is, which is passed in.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use meshd_sys::nflog::Logged;

use super::super::ledger::PlainCaller;
use super::super::owner::RecordedOwner;
use super::owners::{self, Told};
use super::plain::{self, Life};

/// Callers told apart between two looks at the counts; calls of further ones are counted without a name.
const MAX_CALLERS: usize = 8192;
/// An accept queue that takes longer is lost anyway.
const KEPT: Duration = Duration::from_secs(10);
const MAX_OPENINGS: usize = 65_535;

/// A connection as its client knows it: its own address, and what it dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Opening {
    pub client: SocketAddr,
    pub original: SocketAddr,
}

impl Opening {
    /// None for what is not TCP, or has options before it.
    fn of(packet: &[u8]) -> Option<Opening> {
        let v4 = |at: usize| Some(IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?)));
        let v6 = |at: usize| Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?)));
        let (protocol, source, destination, tcp) = match packet.first()? >> 4 {
            4 => (packet.get(9)?, v4(12)?, v4(16)?, usize::from(packet[0] & 15) * 4),
            6 => (packet.get(6)?, v6(8)?, v6(24)?, 40),
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
        let client = SocketAddr::new(source, port(tcp)?);
        (*protocol == 6).then_some(Opening { client, original: SocketAddr::new(destination, port(tcp + 2)?) })
    }
}

#[derive(Debug, Default)]
pub(super) struct Heard {
    calls: HashMap<(Life, u16, PlainCaller), u64>,
    owners: HashMap<Opening, (RecordedOwner, Instant)>,
    /// When each of `owners` was entered.
    entered: VecDeque<(Instant, Opening)>,
}

impl Heard {
    /// `look`: whose a socket is at this moment.
    pub(super) fn hear(
        &mut self,
        logged: Logged<'_>,
        now: Instant,
        look: impl FnOnce(Opening) -> Option<RecordedOwner>,
    ) {
        let Some(opening) = Opening::of(logged.packet) else { return };
        if let Some(call) = plain::told(logged.prefix) {
            let caller = match (call.local, logged.uid) {
                (true, Some(uid)) => PlainCaller::Uid(uid),
                // Its socket is gone: the count knows of it.
                (true, None) => return,
                (false, _) => PlainCaller::Address(opening.client.ip()),
            };
            self.count((call.life, opening.original.port(), caller));
        } else if let Some(told) = owners::told(logged.prefix) {
            // First: what cannot be said of this socket must not be answered by the one before.
            self.owners.remove(&opening);
            let owner = match (told, logged.uid) {
                (Told::Cgroup(cgroup), Some(uid)) => Some(RecordedOwner { uid, cgroup: Some(cgroup) }),
                (Told::User, Some(uid)) => Some(RecordedOwner { uid, cgroup: None }),
                (Told::Unknown, _) | (_, None) => look(opening),
            };
            if let Some(owner) = owner {
                self.own(opening, owner, now);
            }
        }
    }

    fn count(&mut self, call: (Life, u16, PlainCaller)) {
        if self.calls.len() < MAX_CALLERS || self.calls.contains_key(&call) {
            *self.calls.entry(call).or_default() += 1;
        }
    }

    fn own(&mut self, opening: Opening, owner: RecordedOwner, now: Instant) {
        while let Some((entered, oldest)) = self.entered.front().copied()
            && (now.duration_since(entered) > KEPT || self.entered.len() >= MAX_OPENINGS)
        {
            self.entered.pop_front();
            if self.owners.get(&oldest).is_some_and(|(_, at)| *at == entered) {
                self.owners.remove(&oldest);
            }
        }
        self.owners.insert(opening, (owner, now));
        self.entered.push_back((now, opening));
    }

    /// Messages were lost: one of them may have been about a connection whose addresses and ports are used again.
    pub(super) fn missed(&mut self) {
        self.owners.clear();
        self.entered.clear();
    }

    /// Whose a connection was when it was opened. Told once: a second connection of the same addresses and ports
    /// has an owner of its own.
    pub(super) fn owner(&mut self, opening: Opening, now: Instant) -> Option<RecordedOwner> {
        let (owner, at) = self.owners.remove(&opening)?;
        (now.duration_since(at) <= KEPT).then_some(owner)
    }

    /// Who called since the last time, in this life of the rules.
    pub(super) fn take_calls(&mut self, life: Life) -> BTreeMap<u16, BTreeMap<PlainCaller, u64>> {
        let mut ports: BTreeMap<u16, BTreeMap<PlainCaller, u64>> = BTreeMap::new();
        for ((_, port, caller), calls) in self.calls.drain().filter(|((of, ..), _)| *of == life) {
            ports.entry(port).or_default().insert(caller, calls);
        }
        ports
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECKOUT: RecordedOwner = RecordedOwner { uid: 1001, cgroup: Some(0x2a) };

    fn syn(client: &str, original: &str) -> Vec<u8> {
        let (client, original): (SocketAddr, SocketAddr) = (client.parse().unwrap(), original.parse().unwrap());
        let mut packet = match (client.ip(), original.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                // With options: the TCP header is where the length of this one says.
                let mut header = vec![0x46, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0];
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend([1; 4]);
                header
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut header = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
                header.extend(source.octets());
                header.extend(destination.octets());
                header
            }
            _ => panic!("two families"),
        };
        packet.extend(client.port().to_be_bytes());
        packet.extend(original.port().to_be_bytes());
        packet
    }

    fn opening(client: &str, original: &str) -> Opening {
        Opening { client: client.parse().unwrap(), original: original.parse().unwrap() }
    }

    fn hear(heard: &mut Heard, prefix: &str, uid: Option<u32>, packet: &[u8], look: Option<RecordedOwner>) {
        heard.hear(Logged { prefix, uid, packet }, Instant::now(), |_| look);
    }

    #[test]
    fn addresses_and_ports_are_read_in_both_families_and_never_beyond_the_packet() {
        for (client, original) in [("127.0.0.1:50001", "240.240.0.9:80"), ("[::1]:50001", "[fd00::9]:80")] {
            let packet = syn(client, original);
            assert_eq!(Opening::of(&packet), Some(opening(client, original)));
            assert!((0..packet.len()).all(|length| Opening::of(&packet[..length]).is_none()));
        }
    }

    #[test]
    fn callers_are_counted_by_address_or_user_once_per_look() {
        let mut heard = Heard::default();
        let (remote, local) = (syn("10.9.0.1:5", "10.9.0.2:25"), syn("127.0.0.1:5", "127.0.0.1:25"));
        hear(&mut heard, "meshd:remote:00000007", None, &remote, None);
        hear(&mut heard, "meshd:remote:00000007", None, &remote, None);
        hear(&mut heard, "meshd:remote:00000006", None, &remote, None);
        hear(&mut heard, "meshd:local:00000007", Some(33), &local, None);
        hear(&mut heard, "meshd:local:00000007", None, &local, None);
        let stranger = PlainCaller::Address("10.9.0.1".parse().unwrap());
        let expected = BTreeMap::from([(25, BTreeMap::from([(stranger, 2), (PlainCaller::Uid(33), 1)]))]);
        assert_eq!((heard.take_calls(7), heard.take_calls(7)), (expected, BTreeMap::new()));
    }

    #[test]
    fn an_owner_is_told_once_and_never_the_one_before() {
        let (client, original) = ("127.0.0.1:50001", "240.240.0.9:80");
        let (packet, at, now) = (syn(client, original), opening(client, original), Instant::now());
        let mut heard = Heard::default();
        let opened_by_checkout = |heard: &mut Heard| hear(heard, "meshd:own:2a", Some(1001), &packet, None);
        opened_by_checkout(&mut heard);
        assert_eq!((heard.owner(at, now), heard.owner(at, now)), (Some(CHECKOUT), None));
        opened_by_checkout(&mut heard);
        hear(&mut heard, "meshd:own:unknown", Some(5), &packet, None);
        assert_eq!(heard.owner(at, now), None, "the next one's is unknown");
        opened_by_checkout(&mut heard);
        assert_eq!(heard.owner(at, Instant::now() + KEPT + Duration::from_secs(1)), None, "too old");
        opened_by_checkout(&mut heard);
        heard.missed();
        assert_eq!(heard.owner(at, now), None, "a later one may have been missed");
    }

    #[test]
    fn an_opening_by_no_known_unit_is_whose_the_socket_is() {
        let (client, original) = ("127.0.0.1:50001", "240.240.0.9:80");
        let mut heard = Heard::default();
        hear(&mut heard, "meshd:own:unknown", Some(1001), &syn(client, original), Some(CHECKOUT));
        assert_eq!(heard.owner(opening(client, original), Instant::now()), Some(CHECKOUT));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut heard = Heard::default();
        for number in 0..MAX_OPENINGS as u32 + 10 {
            let source = Ipv4Addr::from(0x0a00_0000 + number);
            let packet = syn(&format!("{source}:5"), "240.240.0.9:80");
            hear(&mut heard, "meshd:own:2a", Some(1), &packet, None);
            hear(&mut heard, "meshd:remote:00000007", None, &packet, None);
        }
        assert_eq!(
            (heard.owners.len(), heard.entered.len(), heard.calls.len()),
            (MAX_OPENINGS, MAX_OPENINGS, MAX_CALLERS)
        );
    }
}
