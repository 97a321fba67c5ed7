//! Where a packet that came out of the device goes. Pure: packet and table in, packet out.
//!
//! ```text
//! application                     device                      kernel's own TCP
//! S:sp -> VIP:port    ---->  [rewritten] phantom:n -> host:15001  ---->  our listener
//! S:sp <- VIP:port    <----  [rewritten] phantom:n <- host:15001  <----
//! ```

use super::nat::{Event, Seconds, Table, Tuple};
use super::rewrite::{Address, Dropped, End, Segment};

/// Peers that exist only as addresses. Each has its own ports, so that connections in TIME_WAIT leave room:
/// four are good for 3,600 new connections a second that our side closes first; beyond that rests get shorter.
pub(super) const PHANTOMS: u32 = 4;
/// Ports below are left alone: some hosts filter them.
const FIRST_PORT: u16 = 1024;
const PORTS: u32 = 65536 - FIRST_PORT as u32;
/// Connections at a time, per family.
pub(super) const CAPACITY: u32 = PHANTOMS * PORTS;

/// The addresses of one family.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family<A> {
    /// This host's address on the device, with the port of our listener. The phantoms follow it.
    pub(super) listener: End<A>,
    /// First and last virtual IP.
    pub(super) virtual_ips: (A, A),
}

/// What to do with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// So much of the frame is now the packet to write back.
    Forward(usize),
    /// So much of the frame is now the reset that answers it.
    Refuse(Refused, usize),
    Drop(Dropped),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too many connections at a time.
    Full,
    /// Of a connection opened before this daemon started, or forgotten since.
    Unknown,
}

impl<A: Address> Family<A> {
    /// Rewrites the packet if it is one of ours.
    pub(super) fn translate(&self, segment: Segment<'_, A>, table: &mut Table<A>, now: Seconds) -> Verdict {
        let (source, destination) = (segment.source(), segment.destination());
        if self.is_virtual(destination.address) {
            self.outward(segment, Tuple { client: source, original: destination }, table, now)
        } else if source == self.listener {
            self.inward(segment, destination, table, now)
        } else {
            Verdict::Drop(Dropped::Stray)
        }
    }

    /// The connection this packet opens, if it does.
    pub(super) fn opened(&self, segment: &Segment<'_, A>) -> Option<Tuple<A>> {
        let tuple = Tuple { client: segment.source(), original: segment.destination() };
        (self.is_virtual(tuple.original.address) && event(segment) == Event::Opens).then_some(tuple)
    }

    /// The connection an accepted socket's peer stands for.
    pub(super) fn tuple_of(&self, peer: End<A>, table: &Table<A>) -> Option<Tuple<A>> {
        table.tuple(self.number(peer)?)
    }

    fn outward(&self, segment: Segment<'_, A>, tuple: Tuple<A>, table: &mut Table<A>, now: Seconds) -> Verdict {
        let event = event(&segment);
        match table.outward(tuple, event, now) {
            Some(number) => Verdict::Forward(segment.redirect(self.phantom(number), self.listener)),
            None if event == Event::Opens => Verdict::Refuse(Refused::Full, segment.refuse()),
            None if event == Event::Resets => Verdict::Drop(Dropped::Forgotten),
            None => Verdict::Refuse(Refused::Unknown, segment.refuse()),
        }
    }

    fn inward(&self, segment: Segment<'_, A>, phantom: End<A>, table: &mut Table<A>, now: Seconds) -> Verdict {
        let Some(number) = self.number(phantom) else { return Verdict::Drop(Dropped::Stray) };
        let event = event(&segment);
        match table.inward(number, event, now) {
            Some(Tuple { client, original }) => Verdict::Forward(segment.redirect(original, client)),
            None if event == Event::Resets => Verdict::Drop(Dropped::Forgotten),
            None => Verdict::Refuse(Refused::Unknown, segment.refuse()),
        }
    }

    fn is_virtual(&self, address: A) -> bool {
        let (first, last) = self.virtual_ips;
        (first..=last).contains(&address)
    }

    fn phantom(&self, number: u32) -> End<A> {
        let address = self.listener.address.plus(1 + number / PORTS);
        End { address, port: FIRST_PORT + (number % PORTS) as u16 }
    }

    fn number(&self, phantom: End<A>) -> Option<u32> {
        let which = phantom.address.minus(self.listener.address)?.checked_sub(1).filter(|which| *which < PHANTOMS)?;
        Some(which * PORTS + u32::from(phantom.port.checked_sub(FIRST_PORT)?))
    }
}

fn event<A: Address>(segment: &Segment<'_, A>) -> Event {
    if segment.resets() {
        Event::Resets
    } else if segment.opens() {
        Event::Opens
    } else if segment.ends_stream() {
        Event::EndsStream
    } else {
        Event::Data
    }
}

#[cfg(test)]
#[path = "translate_tests.rs"]
mod tests;
