//! Enough of pcap, Ethernet, IP and TCP to say what crossed a wire.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail, ensure};

const ETHERNET: u32 = 1;
const TCP: u8 = 6;
const SYN: u8 = 0x02;

/// The TCP streams of a capture, each direction on its own and put in order.
#[derive(Debug, Default)]
pub struct Pcap {
    pub streams: Vec<Stream>,
    raw: Vec<u8>,
}

#[derive(Debug)]
pub struct Stream {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub bytes: Vec<u8>,
    /// False when the capture began after the connection did, or lost a segment.
    pub complete: bool,
}

/// What the streams of one port are made of.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TlsReport {
    pub streams: usize,
    pub records: usize,
    pub bytes: usize,
    /// One line per stream that is not TLS records from its first byte on.
    pub foreign: Vec<String>,
}

impl Pcap {
    pub fn parse(file: &[u8]) -> Result<Self> {
        let mut connections = BTreeMap::new();
        for packet in packets(file)? {
            if let Some(segment) = Segment::of_ethernet(packet) {
                connections.entry((segment.from, segment.to)).or_insert_with(Vec::new).push(segment);
            }
        }
        let streams = connections.into_iter().flat_map(|((from, to), segments)| assemble(from, to, segments));
        Ok(Self { streams: streams.collect(), raw: file.to_vec() })
    }

    /// Whether these bytes are anywhere in the capture, headers included.
    pub fn contains(&self, marker: &[u8]) -> bool {
        let whole = |bytes: &[u8]| bytes.windows(marker.len()).any(|window| window == marker);
        whole(&self.raw) || self.streams.iter().any(|stream| whole(&stream.bytes))
    }

    /// Streams with payload that touch none of these ports.
    pub fn outside(&self, ports: &[u16]) -> impl Iterator<Item = &Stream> {
        let inside = |stream: &Stream| ports.iter().any(|&port| stream.touches(port));
        self.streams.iter().filter(move |stream| stream.has_payload() && !inside(stream))
    }

    pub fn tls_on(&self, port: u16) -> TlsReport {
        let mut report = TlsReport::default();
        for stream in self.streams.iter().filter(|stream| stream.touches(port) && stream.has_payload()) {
            report.streams += 1;
            report.bytes += stream.bytes.len();
            match (stream.complete, tls_records(&stream.bytes)) {
                (true, Ok(records)) => report.records += records,
                (false, _) => report.foreign.push(format!("{} -> {}: incomplete", stream.from, stream.to)),
                (_, Err(why)) => report.foreign.push(format!("{} -> {}: {why}", stream.from, stream.to)),
            }
        }
        report
    }
}

impl Stream {
    fn has_payload(&self) -> bool {
        !self.bytes.is_empty() || !self.complete
    }

    fn touches(&self, port: u16) -> bool {
        self.from.port() == port || self.to.port() == port
    }
}

/// Walks record after record; the last may be cut off by the end of the capture.
fn tls_records(mut bytes: &[u8]) -> Result<usize, String> {
    let whole = bytes.len();
    let mut records = 0;
    while let [kind, major, minor, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        let known = (20..=23).contains(kind) && *major == 3 && (1..=3).contains(minor);
        if !known || length == 0 || length > 16384 + 256 {
            return Err(format!("no TLS record at byte {} but {:02x?}", whole - bytes.len(), &bytes[..5]));
        }
        records += 1;
        bytes = rest.get(length..).unwrap_or_default();
    }
    Ok(records)
}

struct Segment {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    syn: bool,
    payload: Vec<u8>,
}

impl Segment {
    fn of_ethernet(frame: &[u8]) -> Option<Self> {
        let packet = frame.get(14..)?;
        match frame.get(12..14)? {
            [0x08, 0x00] => Self::of_ipv4(packet),
            [0x86, 0xdd] => Self::of_ipv6(packet),
            _ => None,
        }
    }

    fn of_ipv4(packet: &[u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0x0f) * 4;
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        if *packet.get(9)? != TCP {
            return None;
        }
        let address = |at: usize| -> Option<IpAddr> {
            let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
            Some(Ipv4Addr::from(bytes).into())
        };
        // Length 0: larger than 64 KiB, made by offload; then the capture's length holds.
        let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
        Self::of_tcp(address(12)?, address(16)?, packet.get(header..end)?)
    }

    fn of_ipv6(packet: &[u8]) -> Option<Self> {
        let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
        if *packet.get(6)? != TCP {
            return None;
        }
        let address = |at: usize| -> Option<IpAddr> {
            let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
            Some(Ipv6Addr::from(bytes).into())
        };
        let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
        Self::of_tcp(address(8)?, address(24)?, packet.get(40..end)?)
    }

    fn of_tcp(from: IpAddr, to: IpAddr, tcp: &[u8]) -> Option<Self> {
        let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            from: SocketAddr::new(from, port(0)?),
            to: SocketAddr::new(to, port(2)?),
            sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
            syn: tcp.get(13)? & SYN != 0,
            payload: tcp.get(header..)?.to_vec(),
        })
    }
}

/// A port pair may be used again: every SYN begins a new stream (a repeated one with the same number does not).
fn assemble(from: SocketAddr, to: SocketAddr, segments: Vec<Segment>) -> Vec<Stream> {
    let mut connections: Vec<(Option<u32>, Vec<Segment>)> = Vec::new();
    for segment in segments {
        let begun = connections.last().map(|(start, _)| *start);
        if segment.syn && begun != Some(Some(segment.sequence)) {
            connections.push((Some(segment.sequence), Vec::new()));
        } else if begun.is_none() {
            connections.push((None, Vec::new()));
        }
        if let Some((_, segments)) = connections.last_mut() {
            segments.push(segment);
        }
    }
    connections.into_iter().map(|(start, segments)| in_order(from, to, start, segments)).collect()
}

fn in_order(from: SocketAddr, to: SocketAddr, start: Option<u32>, segments: Vec<Segment>) -> Stream {
    let first = start.map_or_else(|| segments.first().map_or(0, |segment| segment.sequence), |syn| syn.wrapping_add(1));
    let mut pieces: Vec<(u32, Vec<u8>)> = segments
        .into_iter()
        .filter(|segment| !segment.payload.is_empty())
        .map(|segment| (segment.sequence.wrapping_sub(first), segment.payload))
        .filter(|(offset, _)| *offset < u32::MAX / 2)
        .collect();
    pieces.sort_by_key(|(offset, _)| *offset);
    let mut stream = Stream { from, to, bytes: Vec::new(), complete: start.is_some() || pieces.is_empty() };
    for (offset, payload) in pieces {
        let Some(known) = stream.bytes.len().checked_sub(offset as usize) else {
            stream.complete = false;
            break;
        };
        stream.bytes.extend_from_slice(payload.get(known..).unwrap_or_default());
    }
    stream
}

fn packets(file: &[u8]) -> Result<Vec<&[u8]>> {
    ensure!(file.len() >= 24, "not a pcap file: {} bytes", file.len());
    let little = match file[..4] {
        [0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1] => true,
        [0xa1, 0xb2, 0xc3, 0xd4] | [0xa1, 0xb2, 0x3c, 0x4d] => false,
        _ => bail!("not a classic pcap file"),
    };
    let number = |bytes: &[u8]| -> u32 {
        let bytes: [u8; 4] = bytes.try_into().unwrap_or_default();
        if little { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) }
    };
    ensure!(number(&file[20..24]) == ETHERNET, "the capture is not of an Ethernet link");
    let (mut rest, mut found) = (&file[24..], Vec::new());
    while rest.len() >= 16 {
        let length = number(&rest[8..12]) as usize;
        let Some(packet) = rest.get(16..16 + length) else { break };
        found.push(packet);
        rest = &rest[16 + length..];
    }
    Ok(found)
}

#[cfg(test)]
#[path = "pcap_tests.rs"]
mod tests;
