//! Packets for tests, made and checked from scratch.

use std::net::{Ipv4Addr, Ipv6Addr};

use meshd_sys::tun::VNET_HEADER;
use proptest::prelude::*;

use super::rewrite::{Address, End};

pub(super) const FIN: u8 = 0x01;
pub(super) const SYN: u8 = 0x02;
pub(super) const RST: u8 = 0x04;
pub(super) const ACK: u8 = 0x10;
const VIRTIO_NEEDS_CSUM: u8 = 1;

/// What a test may want to say about a packet.
#[derive(Clone, Debug)]
pub(super) struct Written<A> {
    pub source: End<A>,
    pub destination: End<A>,
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    /// Whole words, each of four bytes.
    pub ip_options: usize,
    pub tcp_options: usize,
    pub payload: Vec<u8>,
    /// As the kernel hands over its own: only the pseudo-header is summed.
    pub partial: bool,
}

impl<A: Sample> Written<A> {
    pub(super) fn new(source: End<A>, destination: End<A>, flags: u8) -> Written<A> {
        let payload = Vec::new();
        let (sequence, acknowledgement) = (1000, 2000);
        let (ip_options, tcp_options, partial) = (0, 0, false);
        Written { source, destination, flags, sequence, acknowledgement, ip_options, tcp_options, payload, partial }
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        let tcp = self.tcp();
        let mut frame = vec![0; VNET_HEADER];
        if self.partial {
            frame[0] = VIRTIO_NEEDS_CSUM;
        }
        frame.extend(A::header(self, tcp.len()));
        frame.extend(tcp);
        frame
    }

    fn tcp(&self) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(self.source.port.to_be_bytes());
        tcp.extend(self.destination.port.to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledgement.to_be_bytes());
        tcp.extend([((5 + self.tcp_options) as u8) << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(vec![1; 4 * self.tcp_options]);
        tcp.extend(&self.payload);
        let pseudo = pseudo(self.source.address, self.destination.address, tcp.len());
        let checksum =
            if self.partial { ones_complement(&pseudo) } else { !ones_complement(&[pseudo, tcp.clone()].concat()) };
        tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
        tcp
    }
}

/// Addresses a test can make packets of.
pub(super) trait Sample: Address + Arbitrary {
    fn octets(self) -> Vec<u8>;
    fn header(written: &Written<Self>, tcp: usize) -> Vec<u8>;
    /// The IP header says what it should about a packet of this length.
    fn check_header(packet: &[u8]);
    fn header_length(packet: &[u8]) -> usize;
}

impl Sample for Ipv4Addr {
    fn octets(self) -> Vec<u8> {
        Ipv4Addr::octets(&self).to_vec()
    }

    fn header(written: &Written<Self>, tcp: usize) -> Vec<u8> {
        let words = 5 + written.ip_options;
        let mut header = vec![0x40 | words as u8, 0];
        header.extend(((words * 4 + tcp) as u16).to_be_bytes());
        header.extend([0xab, 0xcd, 0x40, 0, 64, 6, 0, 0]);
        header.extend(written.source.address.octets());
        header.extend(written.destination.address.octets());
        header.extend(vec![1; 4 * written.ip_options]);
        let checksum = !ones_complement(&header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }

    fn check_header(packet: &[u8]) {
        assert_eq!(usize::from(u16::from_be_bytes([packet[2], packet[3]])), packet.len());
        assert_eq!(ones_complement(&packet[..Self::header_length(packet)]), 0xffff, "IP header checksum");
    }

    fn header_length(packet: &[u8]) -> usize {
        usize::from(packet[0] & 15) * 4
    }
}

impl Sample for Ipv6Addr {
    fn octets(self) -> Vec<u8> {
        Ipv6Addr::octets(&self).to_vec()
    }

    fn header(written: &Written<Self>, tcp: usize) -> Vec<u8> {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend((tcp as u16).to_be_bytes());
        header.extend([6, 64]);
        header.extend(written.source.address.octets());
        header.extend(written.destination.address.octets());
        header
    }

    fn check_header(packet: &[u8]) {
        assert_eq!(usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40, packet.len());
    }

    fn header_length(_packet: &[u8]) -> usize {
        40
    }
}

/// Both headers are consistent and the TCP checksum is what its kind asks for.
pub(super) fn check<A: Sample>(frame: &[u8], source: End<A>, destination: End<A>) {
    let packet = &frame[VNET_HEADER..];
    A::check_header(packet);
    let tcp = &packet[A::header_length(packet)..];
    let pseudo = pseudo(source.address, destination.address, tcp.len());
    if frame[0] & VIRTIO_NEEDS_CSUM != 0 {
        let field = u16::from_be_bytes([tcp[16], tcp[17]]);
        // All zeroes and all ones are the same number.
        assert_eq!(field % 0xffff, ones_complement(&pseudo) % 0xffff, "pseudo-header sum");
    } else {
        assert_eq!(ones_complement(&[&pseudo, tcp].concat()), 0xffff, "TCP checksum");
    }
}

fn pseudo<A: Sample>(source: A, destination: A, length: usize) -> Vec<u8> {
    let mut bytes = [source.octets(), destination.octets()].concat();
    bytes.extend([0, 6]);
    bytes.extend((length as u16).to_be_bytes());
    bytes
}

/// Plainly: carry by carry, word by word.
fn ones_complement(bytes: &[u8]) -> u16 {
    let mut total: u16 = 0;
    for pair in bytes.chunks(2) {
        let value = u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]);
        let (sum, carried) = total.overflowing_add(value);
        total = sum + u16::from(carried);
    }
    total
}

pub(super) fn end<A: Sample>() -> impl Strategy<Value = End<A>> {
    (any::<A>(), any::<u16>()).prop_map(|(address, port)| End { address, port })
}

pub(super) fn written<A: Sample>() -> impl Strategy<Value = Written<A>> {
    let numbers = (any::<u8>(), any::<u32>(), any::<u32>());
    let options = (0..=10_usize, 0..=10_usize, any::<bool>());
    let payload = proptest::collection::vec(any::<u8>(), 0..200);
    (end(), end(), numbers, options, payload).prop_map(|(source, destination, numbers, options, payload)| {
        let (flags, sequence, acknowledgement) = numbers;
        let (ip_options, tcp_options, partial) = options;
        Written { source, destination, flags, sequence, acknowledgement, ip_options, tcp_options, payload, partial }
    })
}
