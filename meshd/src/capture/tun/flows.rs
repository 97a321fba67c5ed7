//! What the pump and the workers share: the connections under way, and what was counted about them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::super::flow::Flow;
use super::super::owner::RecordedOwner;
use super::nat::{Seconds, Table, Tuple};
use super::openers::Openers;
use super::rewrite::{Address, Dropped, End, Parsed, Segment, parse};
use super::translate::{CAPACITY, Family, Refused, Verdict};

/// How often to repeat a warning, in seconds.
const LOG_PAUSE: Seconds = 60;

/// Every connection under way, of both families.
pub struct Flows {
    v4: Side<Ipv4Addr>,
    v6: Side<Ipv6Addr>,
    made: Instant,
    pub(super) counters: Counters,
    /// What was said in the log about packets nobody answers, and when.
    told: Mutex<(u64, Option<Seconds>)>,
}

struct Side<A> {
    family: Family<A>,
    table: Mutex<Table<A>>,
}

/// Monotonic, of one device.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) packets: AtomicU64,
    pub(super) bytes: AtomicU64,
    /// Connections reset because there were too many at a time.
    pub(super) full: AtomicU64,
    /// Packets reset that belong to no connection we know.
    pub(super) unknown: AtomicU64,
    pub(super) not_tcp: AtomicU64,
    pub(super) fragments: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) strays: AtomicU64,
    pub(super) forgotten: AtomicU64,
    /// Packets the kernel did not take back.
    pub(super) unwritten: AtomicU64,
}

impl fmt::Debug for Flows {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Flows").field("len", &self.len()).field("counters", &self.counters).finish()
    }
}

impl Flows {
    pub(super) fn new(v4: Family<Ipv4Addr>, v6: Family<Ipv6Addr>) -> Flows {
        let (v4, v6) = (Side::new(v4), Side::new(v6));
        Flows { v4, v6, made: Instant::now(), counters: Counters::default(), told: Mutex::default() }
    }

    /// Who is behind an accepted connection with this peer, and whom it called: as the application's socket sees it.
    pub(in super::super) fn recover(&self, peer: SocketAddr) -> Option<Flow> {
        match peer.ip() {
            IpAddr::V4(address) => self.v4.recover(End { address, port: peer.port() }),
            IpAddr::V6(address) => self.v6.recover(End { address, port: peer.port() }),
        }
    }

    /// Who opened this connection, as its first packet passed.
    pub(in super::super) fn owner(&self, client: SocketAddr, original: SocketAddr) -> Option<RecordedOwner> {
        let (from, to) = (client.port(), original.port());
        match (client.ip(), original.ip()) {
            (IpAddr::V4(client), IpAddr::V4(original)) => self.v4.owner((client, from), (original, to)),
            (IpAddr::V6(client), IpAddr::V6(original)) => self.v6.owner((client, from), (original, to)),
            _ => None,
        }
    }

    /// Connections in the tables, those that only wait for TIME_WAIT to end included.
    pub fn len(&self) -> usize {
        self.v4.table().len() + self.v6.table().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// First packets that had to be said again.
    pub(super) fn unanswered(&self) -> u64 {
        self.v4.table().repeated() + self.v6.table().repeated()
    }

    /// A firewall that drops what comes in from an unknown interface looks like a service that hangs.
    pub(super) fn tell_unanswered(&self, now: Seconds) {
        let unanswered = self.unanswered();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, at) = *told;
        if unanswered > count && at.is_none_or(|at| now - at >= LOG_PAUSE) {
            *told = (unanswered, Some(now));
            tracing::warn!(
                interface = super::device::NAME,
                "connections to virtual IPs are not answered: let this host's firewall accept what comes in from the \
                 interface, e.g. nft insert rule inet filter input iifname {} accept",
                super::device::NAME
            );
        }
    }

    pub(super) fn now(&self) -> Seconds {
        self.made.elapsed().as_secs() as Seconds
    }

    /// Rewrites the frame in place; returns how much of it to write back, or nothing to drop it.
    pub(super) fn pass(&self, frame: &mut [u8], openers: &mut Openers, now: Seconds) -> Option<usize> {
        count(&self.counters.packets, 1);
        count(&self.counters.bytes, frame.len() as u64);
        let verdict = match parse(frame) {
            Ok(Parsed::V4(segment)) => self.v4.pass(segment, openers, now),
            Ok(Parsed::V6(segment)) => self.v6.pass(segment, openers, now),
            Err(dropped) => Verdict::Drop(dropped),
        };
        match verdict {
            Verdict::Forward(length) => Some(length),
            Verdict::Refuse(refused, length) => {
                count(self.counters.of_refused(refused), 1);
                Some(length)
            }
            Verdict::Drop(dropped) => {
                count(self.counters.of_dropped(dropped), 1);
                None
            }
        }
    }

    /// Lets go of what has lived long enough; returns when to do so again.
    pub(super) fn expire(&self, now: Seconds) -> Option<Seconds> {
        let next = [self.v4.expire(now), self.v6.expire(now)];
        next.into_iter().flatten().min()
    }
}

impl<A: Address + Into<IpAddr>> Side<A> {
    fn new(family: Family<A>) -> Side<A> {
        Side { family, table: Mutex::new(Table::new(CAPACITY)) }
    }

    /// Held for one packet or one question: neither waits for the other noticeably.
    fn table(&self) -> MutexGuard<'_, Table<A>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self, segment: Segment<'_, A>, openers: &mut Openers, now: Seconds) -> Verdict {
        let Some(opened) = self.family.opened(&segment) else {
            return self.family.translate(segment, &mut self.table(), now);
        };
        let owner = openers.owner(opened.client.into(), opened.original.into(), now);
        let mut table = self.table();
        let verdict = self.family.translate(segment, &mut table, now);
        table.opened_by(&opened, owner);
        verdict
    }

    fn owner(&self, client: (A, u16), original: (A, u16)) -> Option<RecordedOwner> {
        let [client, original] = [client, original].map(|(address, port)| End { address, port });
        self.table().owner(&Tuple { client, original })
    }

    fn recover(&self, peer: End<A>) -> Option<Flow> {
        let Tuple { client, original } = self.family.tuple_of(peer, &self.table())?;
        Some(Flow { client: client.into(), original: original.into() })
    }

    fn expire(&self, now: Seconds) -> Option<Seconds> {
        let mut table = self.table();
        table.expire(now);
        table.next_expiry(now)
    }
}

impl Counters {
    fn of_refused(&self, refused: Refused) -> &AtomicU64 {
        match refused {
            Refused::Full => &self.full,
            Refused::Unknown => &self.unknown,
        }
    }

    fn of_dropped(&self, dropped: Dropped) -> &AtomicU64 {
        match dropped {
            Dropped::NotTcp => &self.not_tcp,
            Dropped::Fragment => &self.fragments,
            Dropped::Malformed => &self.malformed,
            Dropped::Stray => &self.strays,
            Dropped::Forgotten => &self.forgotten,
        }
    }
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
