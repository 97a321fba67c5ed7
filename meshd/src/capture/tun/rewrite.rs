//! A TCP packet in a buffer, and what we change in it: addresses, ports, checksums. Pure.
//!
//! Packets come from the kernel, but what an application puts into them is its own business: every
//! length is checked before it is believed.

use std::fmt::Debug;
use std::hash::Hash;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use meshd_sys::tun::VNET_HEADER;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM: the TCP checksum field holds the sum of the pseudo-header only.
const NEEDS_CSUM: u8 = 1;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
/// Offsets within the TCP header.
const SEQUENCE: usize = 4;
const ACKNOWLEDGEMENT: usize = 8;
const DATA_OFFSET: usize = 12;
const FLAGS: usize = 13;
const CHECKSUM: usize = 16;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Why a packet goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dropped {
    /// Not TCP: what else is sent to a virtual IP is refused before it gets here.
    NotTcp,
    /// A fragment; the kernel segments TCP instead.
    Fragment,
    /// Lengths that contradict each other.
    Malformed,
    /// Neither to a virtual IP nor an answer of our own listener.
    Stray,
    /// An answer to a connection that nobody remembers, or a reset of one.
    Forgotten,
}

/// An IP address as it lies in a packet.
pub(super) trait Address: Copy + Ord + Hash + Debug + Send {
    /// Where source and destination lie in the IP header.
    const SOURCE: usize;
    const DESTINATION: usize;
    const LENGTH: usize;

    fn read(bytes: &[u8]) -> Self;
    fn write(self, bytes: &mut [u8]);
    /// The address `count` further on.
    fn plus(self, count: u32) -> Self;
    /// How far this address is beyond `first`, if it is.
    fn minus(self, first: Self) -> Option<u32>;
    /// Length of the IP header, having checked that it leads to a whole TCP segment.
    fn transport(packet: &[u8]) -> Result<usize, Dropped>;
    /// Makes the header say `length` bytes of packet, in total, after its addresses changed.
    fn finish(header: &mut [u8], length: usize);
}

impl Address for Ipv4Addr {
    const SOURCE: usize = 12;
    const DESTINATION: usize = 16;
    const LENGTH: usize = 4;

    fn read(bytes: &[u8]) -> Ipv4Addr {
        Ipv4Addr::from_octets(std::array::from_fn(|at| bytes[at]))
    }

    fn write(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.octets());
    }

    fn plus(self, count: u32) -> Ipv4Addr {
        (u32::from(self).wrapping_add(count)).into()
    }

    fn minus(self, first: Ipv4Addr) -> Option<u32> {
        u32::from(self).checked_sub(first.into())
    }

    fn transport(packet: &[u8]) -> Result<usize, Dropped> {
        if packet.len() < 20 {
            return Err(Dropped::Malformed);
        }
        let header = usize::from(packet[0] & 0x0f) * 4;
        if header < 20 || usize::from(word(packet, 2)) != packet.len() {
            return Err(Dropped::Malformed);
        }
        // More fragments to come, or not the first one.
        if word(packet, 6) & 0x3fff != 0 {
            return Err(Dropped::Fragment);
        }
        if packet[9] != TCP { Err(Dropped::NotTcp) } else { Ok(header) }
    }

    fn finish(header: &mut [u8], length: usize) {
        header[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        header[10..12].fill(0);
        let sum = !fold(sum(header));
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

impl Address for Ipv6Addr {
    const SOURCE: usize = 8;
    const DESTINATION: usize = 24;
    const LENGTH: usize = 16;

    fn read(bytes: &[u8]) -> Ipv6Addr {
        Ipv6Addr::from_octets(std::array::from_fn(|at| bytes[at]))
    }

    fn write(self, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.octets());
    }

    fn plus(self, count: u32) -> Ipv6Addr {
        u128::from(self).wrapping_add(count.into()).into()
    }

    fn minus(self, first: Ipv6Addr) -> Option<u32> {
        u128::from(self).checked_sub(first.into())?.try_into().ok()
    }

    fn transport(packet: &[u8]) -> Result<usize, Dropped> {
        if packet.len() < 40 || usize::from(word(packet, 4)) + 40 != packet.len() {
            return Err(Dropped::Malformed);
        }
        // The kernel puts no extension header before TCP unless an application asks for one; none needs it here.
        if packet[6] != TCP { Err(Dropped::NotTcp) } else { Ok(40) }
    }

    fn finish(header: &mut [u8], length: usize) {
        header[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct End<A> {
    pub(super) address: A,
    pub(super) port: u16,
}

impl<A: Into<IpAddr>> From<End<A>> for SocketAddr {
    fn from(end: End<A>) -> SocketAddr {
        SocketAddr::new(end.address.into(), end.port)
    }
}

/// A frame known to hold one whole TCP segment of an unfragmented packet.
pub(super) struct Segment<'f, A> {
    frame: &'f mut [u8],
    /// Where the TCP header begins in the frame.
    tcp: usize,
    family: PhantomData<A>,
}

/// What the first bits of a packet say it is.
pub(super) enum Parsed<'f> {
    V4(Segment<'f, Ipv4Addr>),
    V6(Segment<'f, Ipv6Addr>),
}

/// Reads a frame: virtio header, IP header, TCP header.
pub(super) fn parse(frame: &mut [u8]) -> Result<Parsed<'_>, Dropped> {
    match frame.get(VNET_HEADER).map(|byte| byte >> 4) {
        Some(4) => Segment::new(frame).map(Parsed::V4),
        Some(6) => Segment::new(frame).map(Parsed::V6),
        Some(_) => Err(Dropped::NotTcp),
        None => Err(Dropped::Malformed),
    }
}

impl<'f, A: Address> Segment<'f, A> {
    fn new(frame: &'f mut [u8]) -> Result<Segment<'f, A>, Dropped> {
        let tcp = VNET_HEADER + A::transport(&frame[VNET_HEADER..])?;
        let header = frame.get(tcp + DATA_OFFSET).map_or(0, |offset| usize::from(offset >> 4) * 4);
        if header < TCP_HEADER || frame.len() < tcp + header {
            return Err(Dropped::Malformed);
        }
        Ok(Segment { frame, tcp, family: PhantomData })
    }

    pub(super) fn source(&self) -> End<A> {
        End { address: self.address(A::SOURCE), port: word(self.frame, self.tcp) }
    }

    pub(super) fn destination(&self) -> End<A> {
        End { address: self.address(A::DESTINATION), port: word(self.frame, self.tcp + 2) }
    }

    /// The first packet of a connection.
    pub(super) fn opens(&self) -> bool {
        self.flags() & (SYN | ACK | RST) == SYN
    }

    pub(super) fn ends_stream(&self) -> bool {
        self.flags() & FIN != 0
    }

    pub(super) fn resets(&self) -> bool {
        self.flags() & RST != 0
    }

    /// Sends the packet from `source` to `destination` instead, keeping what was valid valid; returns the frame's length.
    pub(super) fn redirect(mut self, source: End<A>, destination: End<A>) -> usize {
        let before = self.sum_of_addresses();
        let ports_before = sum(&self.frame[self.tcp..self.tcp + 4]);
        self.set_ends(source, destination);
        let after = self.sum_of_addresses();
        let ports_after = sum(&self.frame[self.tcp..self.tcp + 4]);
        let field = self.tcp + CHECKSUM;
        let checksum = word(self.frame, field);
        let updated = if self.frame[0] & NEEDS_CSUM != 0 {
            // The sum of the pseudo-header, not complemented; ports are not in it.
            updated(checksum, before, after)
        } else {
            !updated(!checksum, before + ports_before, after + ports_after)
        };
        self.frame[field..field + 2].copy_from_slice(&updated.to_be_bytes());
        let length = self.frame.len() - VNET_HEADER;
        A::finish(&mut self.frame[VNET_HEADER..self.tcp], length);
        self.frame.len()
    }

    /// Turns the packet into the reset its sender gets for it (RFC 9293 section 3.5.2); returns the frame's length.
    pub(super) fn refuse(self) -> usize {
        let (source, destination) = (self.source(), self.destination());
        let (sequence, acknowledgement, flags) = self.reset_numbers();
        let (tcp, frame) = (self.tcp, self.frame);
        let length = tcp + TCP_HEADER;
        let mut segment = Segment::<A> { frame: &mut frame[..length], tcp, family: PhantomData };
        segment.frame[..VNET_HEADER].fill(0);
        segment.frame[tcp..].fill(0);
        segment.frame[tcp + SEQUENCE..tcp + ACKNOWLEDGEMENT].copy_from_slice(&sequence.to_be_bytes());
        segment.frame[tcp + ACKNOWLEDGEMENT..tcp + DATA_OFFSET].copy_from_slice(&acknowledgement.to_be_bytes());
        segment.frame[tcp + DATA_OFFSET] = (TCP_HEADER as u8 / 4) << 4;
        segment.frame[tcp + FLAGS] = flags;
        segment.set_ends(destination, source);
        A::finish(&mut segment.frame[VNET_HEADER..tcp], length - VNET_HEADER);
        let pseudo = segment.sum_of_addresses() + u32::from(TCP) + TCP_HEADER as u32;
        let checksum = !fold(pseudo + sum(&segment.frame[tcp..]));
        segment.frame[tcp + CHECKSUM..tcp + CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());
        length
    }

    fn reset_numbers(&self) -> (u32, u32, u8) {
        if self.flags() & ACK != 0 {
            return (long(self.frame, self.tcp + ACKNOWLEDGEMENT), 0, RST);
        }
        let header = usize::from(self.frame[self.tcp + DATA_OFFSET] >> 4) * 4;
        let payload = (self.frame.len() - self.tcp - header) as u32;
        let taken = payload + u32::from(self.flags() & SYN != 0) + u32::from(self.ends_stream());
        (0, long(self.frame, self.tcp + SEQUENCE).wrapping_add(taken), RST | ACK)
    }

    fn set_ends(&mut self, source: End<A>, destination: End<A>) {
        self.set_address(A::SOURCE, source.address);
        self.set_address(A::DESTINATION, destination.address);
        self.frame[self.tcp..self.tcp + 2].copy_from_slice(&source.port.to_be_bytes());
        self.frame[self.tcp + 2..self.tcp + 4].copy_from_slice(&destination.port.to_be_bytes());
    }

    fn flags(&self) -> u8 {
        self.frame[self.tcp + FLAGS]
    }

    fn address(&self, offset: usize) -> A {
        A::read(&self.frame[VNET_HEADER + offset..][..A::LENGTH])
    }

    fn set_address(&mut self, offset: usize, address: A) {
        address.write(&mut self.frame[VNET_HEADER + offset..][..A::LENGTH]);
    }

    /// Source and destination lie next to each other in both families.
    fn sum_of_addresses(&self) -> u32 {
        sum(&self.frame[VNET_HEADER + A::SOURCE..][..2 * A::LENGTH])
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The words added up, an odd last byte as if a zero followed. At most a header, so it cannot overflow.
fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// RFC 1624: a ones' complement sum in which words adding up to `before` were replaced by others.
fn updated(sum: u16, before: u32, after: u32) -> u16 {
    fold(u32::from(sum) + u32::from(!fold(before)) + u32::from(fold(after)))
}

#[cfg(test)]
#[path = "rewrite_tests.rs"]
mod tests;
