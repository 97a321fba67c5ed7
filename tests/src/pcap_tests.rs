use super::*;

const CLIENT: ([u8; 4], u16) = ([10, 0, 0, 1], 40000);
const SERVER: ([u8; 4], u16) = ([10, 0, 0, 2], 15008);

/// One Ethernet/IPv4/TCP packet in pcap framing.
fn packet(from: ([u8; 4], u16), to: ([u8; 4], u16), sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.1.to_be_bytes());
    tcp.extend(to.1.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    tcp.extend(payload);
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(u16::try_from(20 + tcp.len()).unwrap().to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(from.0);
    frame.extend(to.0);
    frame.extend(tcp);
    let length = u32::try_from(frame.len()).unwrap().to_le_bytes();
    [&[0; 8][..], &length, &length, &frame].concat()
}

fn file(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut file = vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0];
    file.extend([0; 12]);
    file.extend(1_u32.to_le_bytes());
    file.extend(packets.concat());
    file
}

fn record(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&[23, 3, 3][..], &length, payload].concat()
}

#[test]
fn records_are_counted_across_reordered_and_repeated_segments() {
    let bytes = [record(b"abcdef"), record(&[7; 300])].concat();
    let capture = file(&[
        packet(CLIENT, SERVER, u32::MAX - 2, SYN, b""),
        packet(CLIENT, SERVER, (u32::MAX - 1).wrapping_add(8), 0x10, &bytes[8..]),
        packet(CLIENT, SERVER, u32::MAX - 1, 0x10, &bytes[..8]),
        packet(CLIENT, SERVER, u32::MAX - 1, 0x10, &bytes[..10]),
    ]);
    let report = Pcap::parse(&capture).unwrap().tls_on(15008);
    assert_eq!(report, TlsReport { streams: 1, records: 2, bytes: bytes.len(), foreign: vec![] });
}

#[test]
fn plaintext_on_the_mesh_port_is_foreign() {
    let capture = file(&[
        packet(CLIENT, SERVER, 0, SYN, b""),
        packet(CLIENT, SERVER, 1, 0x10, &[record(b"abc"), b"GET / HTTP/1.1\r\n".to_vec()].concat()),
    ]);
    let report = Pcap::parse(&capture).unwrap().tls_on(15008);
    assert_eq!(report.foreign.len(), 1);
    assert!(report.foreign[0].contains("at byte 8"), "{:?}", report.foreign);
}

#[test]
fn a_lost_segment_or_a_late_capture_is_not_called_tls() {
    let lost = file(&[packet(CLIENT, SERVER, 0, SYN, b""), packet(CLIENT, SERVER, 9, 0x10, &record(b"abc"))]);
    let late = file(&[packet(CLIENT, SERVER, 9, 0x10, &record(b"abc"))]);
    for capture in [lost, late] {
        let report = Pcap::parse(&capture).unwrap().tls_on(15008);
        assert_eq!(report.foreign.len(), 1);
        assert!(report.foreign[0].contains("incomplete"), "{:?}", report.foreign);
    }
}

#[test]
fn a_marker_is_found_across_segments() {
    let capture = file(&[
        packet(SERVER, CLIENT, 0, SYN, b""),
        packet(SERVER, CLIENT, 1, 0x10, b"mar"),
        packet(SERVER, CLIENT, 4, 0x10, b"ker"),
    ]);
    let pcap = Pcap::parse(&capture).unwrap();
    assert!(pcap.contains(b"marker"));
    assert!(!pcap.contains(b"markers"));
    assert_eq!(pcap.outside(&[80]).count(), 1);
    assert_eq!(pcap.outside(&[15008]).count(), 0);
}

#[test]
fn a_reused_port_pair_is_two_streams() {
    let capture = file(&[
        packet(CLIENT, SERVER, 100, SYN, b""),
        packet(CLIENT, SERVER, 101, 0x10, &record(b"one")),
        packet(CLIENT, SERVER, 9000, SYN, b""),
        packet(CLIENT, SERVER, 9000, SYN, b""),
        packet(CLIENT, SERVER, 9001, 0x10, &record(b"two")),
    ]);
    let report = Pcap::parse(&capture).unwrap().tls_on(15008);
    assert_eq!((report.streams, report.records), (2, 2));
}

#[test]
fn a_file_that_is_not_pcap_is_refused() {
    assert!(Pcap::parse(b"short").is_err());
    assert!(Pcap::parse(&[0; 64]).is_err());
}
