//! Which port of ours stands for which connection of an application. Pure: `now` is passed in.
//!
//! A mapping is found by the application's tuple and by its number; numbers stand for a (phantom address,
//! port) pair, see `translate`. Every mapping is in one of four queues whose members share a lifetime, so the
//! front of a queue is what expires first, and no packet ever pays for more than a few list operations.

use std::collections::HashMap;

use super::super::owner::RecordedOwner;
use super::rewrite::{Address, End};

/// Seconds since the table was made.
pub(super) type Seconds = u32;

/// Nothing but the first packet: as long as Linux keeps an unanswered one (nf_conntrack_tcp_timeout_syn_recv, 60 s).
const OPENING: Seconds = 60;
/// Silence on an open connection, half-closed ones included: 5 days (nf_conntrack_tcp_timeout_established).
const OPEN: Seconds = 5 * 24 * 3600;
/// After both ends were closed, or a reset: TIME_WAIT lasts 60 s (TCP_TIMEWAIT_LEN), and the kernel's timer wheel
/// may be an eighth late. Until then an end may still remember, and would refuse a new connection on its number.
const CLOSED: Seconds = 70;
/// When every number is taken, closed ones rest only so long. Long after a worker has taken a connection from
/// its listener and asked whose it is: the answer must not be another connection's.
const CLOSED_UNDER_PRESSURE: Seconds = 10;

const NONE: u32 = u32::MAX;

/// What a mapping stands for: the application's socket as the application sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tuple<A> {
    pub(super) client: End<A>,
    pub(super) original: End<A>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Opening,
    Open,
    Closed,
    Free,
}

const STAGES: usize = 4;

/// Who sends the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// What a packet means to the life of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The first packet; only clients send it.
    Opens,
    Data,
    EndsStream,
    Resets,
}

#[derive(Clone, Copy)]
struct Mapping<A> {
    tuple: Tuple<A>,
    /// Whose socket it was when its first packet passed.
    owner: Option<RecordedOwner>,
    touched: Seconds,
    previous: u32,
    next: u32,
    stage: Stage,
    /// Which sides have said that nothing more will come.
    ended: [bool; 2],
}

/// Members in the order in which they were touched last.
#[derive(Clone, Copy)]
struct Queue {
    first: u32,
    last: u32,
}

pub(super) struct Table<A> {
    mappings: Vec<Mapping<A>>,
    numbers: HashMap<Tuple<A>, u32>,
    queues: [Queue; STAGES],
    capacity: u32,
    /// First packets that had to be said again.
    repeated: u64,
}

impl<A: Address> Table<A> {
    /// At most `capacity` mappings at a time; memory is taken as they are needed.
    pub(super) fn new(capacity: u32) -> Table<A> {
        let empty = Queue { first: NONE, last: NONE };
        Table { mappings: Vec::new(), numbers: HashMap::default(), queues: [empty; STAGES], capacity, repeated: 0 }
    }

    /// The number for a packet of the application; a first packet gets one, another only if it is known.
    pub(super) fn outward(&mut self, tuple: Tuple<A>, event: Event, now: Seconds) -> Option<u32> {
        let known = self.numbers.get(&tuple).copied();
        if known.is_some_and(|known| self.is_repeated(known, event)) {
            self.repeated += 1;
        }
        let number = match (known, event) {
            (Some(number), _) => number,
            (None, Event::Opens) => self.open(tuple, now)?,
            (None, _) => return None,
        };
        self.follow(number, Side::Client, event, now);
        Some(number)
    }

    /// The connection an answer with this number belongs to.
    pub(super) fn inward(&mut self, number: u32, event: Event, now: Seconds) -> Option<Tuple<A>> {
        let tuple = self.tuple(number)?;
        self.follow(number, Side::Server, event, now);
        Some(tuple)
    }

    /// The connection with this number.
    pub(super) fn tuple(&self, number: u32) -> Option<Tuple<A>> {
        let mapping = self.mappings.get(number as usize)?;
        (mapping.stage != Stage::Free).then_some(mapping.tuple)
    }

    /// Remembers whose first packet just passed, or that nobody knows. Always said of it: a tuple that is used again
    /// is not the one's who had it before.
    pub(super) fn opened_by(&mut self, tuple: &Tuple<A>, owner: Option<RecordedOwner>) {
        if let Some(number) = self.numbers.get(tuple) {
            self.mappings[*number as usize].owner = owner;
        }
    }

    /// Who opened the connection.
    pub(super) fn owner(&self, tuple: &Tuple<A>) -> Option<RecordedOwner> {
        self.mappings.get(*self.numbers.get(tuple)? as usize)?.owner
    }

    /// Mappings in use, those that only wait for TIME_WAIT to end included.
    pub(super) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// How often a first packet had to be said again, for it was not answered.
    pub(super) fn repeated(&self) -> u64 {
        self.repeated
    }

    /// Lets go of what has lived long enough.
    pub(super) fn expire(&mut self, now: Seconds) {
        for (stage, lifetime) in LIFETIMES {
            while let Some(number) = self.oldest(stage, lifetime, now) {
                self.release(number, now);
            }
        }
    }

    /// Seconds until something expires; none when there is nothing.
    pub(super) fn next_expiry(&self, now: Seconds) -> Option<Seconds> {
        let due = LIFETIMES.iter().filter_map(|(stage, lifetime)| {
            let mapping = self.mappings.get(self.queues[*stage as usize].first as usize)?;
            Some((mapping.touched + lifetime).saturating_sub(now))
        });
        due.min()
    }

    fn is_repeated(&self, number: u32, event: Event) -> bool {
        event == Event::Opens && self.mappings[number as usize].stage == Stage::Opening
    }

    fn open(&mut self, tuple: Tuple<A>, now: Seconds) -> Option<u32> {
        self.expire(now);
        let number = self.free_number(now)?;
        self.numbers.insert(tuple, number);
        let mapping = &mut self.mappings[number as usize];
        (mapping.tuple, mapping.owner) = (tuple, None);
        self.enter(number, Stage::Opening, now);
        Some(number)
    }

    /// The number that has been free the longest, or one never used, or one closed long enough.
    fn free_number(&mut self, now: Seconds) -> Option<u32> {
        let free = self.queues[Stage::Free as usize].first;
        if free != NONE {
            return Some(free);
        }
        let fresh = self.mappings.len() as u32;
        if fresh < self.capacity {
            return Some(self.add_number());
        }
        let closed = self.oldest(Stage::Closed, CLOSED_UNDER_PRESSURE, now)?;
        self.release(closed, now);
        Some(closed)
    }

    fn add_number(&mut self) -> u32 {
        let number = self.mappings.len() as u32;
        let nowhere = End { address: A::read(&[0; 16]), port: 0 };
        let tuple = Tuple { client: nowhere, original: nowhere };
        self.mappings.push(Mapping {
            tuple,
            owner: None,
            touched: 0,
            previous: NONE,
            next: NONE,
            stage: Stage::Free,
            ended: [false; 2],
        });
        self.link(number);
        number
    }

    /// What the packet does to its connection. Any packet proves that somebody still cares for it.
    fn follow(&mut self, number: u32, side: Side, event: Event, now: Seconds) {
        let mapping = &mut self.mappings[number as usize];
        let stage = match event {
            // The same application port again: what was is over.
            Event::Opens if mapping.stage == Stage::Closed && side == Side::Client => {
                mapping.ended = [false; 2];
                Stage::Opening
            }
            Event::Resets => Stage::Closed,
            Event::EndsStream => {
                mapping.ended[side as usize] = true;
                if mapping.ended == [true; 2] { Stage::Closed } else { Stage::Open }
            }
            // The server's first answer proves nothing about the client; what the client says to it does.
            Event::Data if mapping.stage == Stage::Opening && side == Side::Client => Stage::Open,
            Event::Opens | Event::Data => mapping.stage,
        };
        self.enter(number, stage, now);
    }

    fn release(&mut self, number: u32, now: Seconds) {
        let tuple = self.mappings[number as usize].tuple;
        self.numbers.remove(&tuple);
        self.enter(number, Stage::Free, now);
    }

    fn oldest(&self, stage: Stage, lifetime: Seconds, now: Seconds) -> Option<u32> {
        let first = self.queues[stage as usize].first;
        let mapping = self.mappings.get(first as usize)?;
        (now.saturating_sub(mapping.touched) >= lifetime).then_some(first)
    }

    /// To the end of a queue: the one touched last expires last.
    fn enter(&mut self, number: u32, stage: Stage, now: Seconds) {
        self.unlink(number);
        let mapping = &mut self.mappings[number as usize];
        if stage == Stage::Free {
            mapping.ended = [false; 2];
        }
        mapping.stage = stage;
        mapping.touched = now;
        self.link(number);
    }

    fn link(&mut self, number: u32) {
        let stage = self.mappings[number as usize].stage as usize;
        let last = self.queues[stage].last;
        let mapping = &mut self.mappings[number as usize];
        (mapping.previous, mapping.next) = (last, NONE);
        match self.mappings.get_mut(last as usize) {
            Some(last) => last.next = number,
            None => self.queues[stage].first = number,
        }
        self.queues[stage].last = number;
    }

    fn unlink(&mut self, number: u32) {
        let Mapping { previous, next, stage, .. } = self.mappings[number as usize];
        match self.mappings.get_mut(previous as usize) {
            Some(previous) => previous.next = next,
            None => self.queues[stage as usize].first = next,
        }
        match self.mappings.get_mut(next as usize) {
            Some(next) => next.previous = previous,
            None => self.queues[stage as usize].last = previous,
        }
    }
}

const LIFETIMES: [(Stage, Seconds); 3] = [(Stage::Opening, OPENING), (Stage::Open, OPEN), (Stage::Closed, CLOSED)];

#[cfg(test)]
#[path = "nat_tests.rs"]
mod tests;
