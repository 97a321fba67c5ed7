use proptest::prelude::*;

use super::super::packets::{self, Sample, Written, check, end, written};
use super::*;

/// `parse` for tests that know the family.
fn segment<A: Sample>(frame: &mut [u8]) -> Segment<'_, A> {
    Segment::new(frame).expect("a good packet")
}

fn redirects<A: Sample>(written: &Written<A>, source: End<A>, destination: End<A>) {
    let mut frame = written.frame();
    let before = frame.clone();
    let length = segment(&mut frame).redirect(source, destination);
    assert_eq!(length, before.len());
    check(&frame, source, destination);
    let read = segment::<A>(&mut frame);
    assert_eq!((read.source(), read.destination()), (source, destination));
    // Back again, and nothing has changed but what two ways to write zero look like.
    segment(&mut frame).redirect(written.source, written.destination);
    check(&frame, written.source, written.destination);
    let tcp = VNET_HEADER + A::header_length(&frame[VNET_HEADER..]);
    for (at, (now, then)) in frame.iter().zip(&before).enumerate() {
        assert!(now == then || (tcp + CHECKSUM..tcp + CHECKSUM + 2).contains(&at), "byte {at} changed");
    }
}

fn refuses<A: Sample>(written: &Written<A>) {
    let mut frame = written.frame();
    let length = segment::<A>(&mut frame).refuse();
    check(&frame[..length], written.destination, written.source);
    let reset = segment::<A>(&mut frame[..length]);
    assert_eq!((reset.source(), reset.destination()), (written.destination, written.source));
    let (sequence, acknowledgement) = (long(reset.frame, reset.tcp + 4), long(reset.frame, reset.tcp + 8));
    if written.flags & ACK != 0 {
        assert_eq!((sequence, reset.flags()), (written.acknowledgement, RST));
    } else {
        let counted = u32::from(written.flags & SYN != 0) + u32::from(written.flags & FIN != 0);
        let taken = written.payload.len() as u32 + counted;
        assert_eq!((sequence, acknowledgement), (0, written.sequence.wrapping_add(taken)));
        assert_eq!(reset.flags(), RST | ACK);
    }
    assert_eq!(reset.frame.len(), reset.tcp + TCP_HEADER, "a reset carries nothing");
}

proptest! {
    #[test]
    fn redirected_ipv4_packets_keep_valid_checksums(
        written in written::<Ipv4Addr>(), source in end(), destination in end(),
    ) {
        redirects(&written, source, destination);
    }

    #[test]
    fn redirected_ipv6_packets_keep_valid_checksums(
        written in written::<Ipv6Addr>(), source in end(), destination in end(),
    ) {
        redirects(&written, source, destination);
    }

    #[test]
    fn an_ipv4_packet_is_refused_with_the_reset_its_sender_expects(written in written::<Ipv4Addr>()) {
        refuses(&written);
    }

    #[test]
    fn an_ipv6_packet_is_refused_with_the_reset_its_sender_expects(written in written::<Ipv6Addr>()) {
        refuses(&written);
    }

    #[test]
    fn no_bytes_are_trusted(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..120), version in 4_u8..=6, protocol in 5_u8..=7,
    ) {
        // Random bytes hardly ever get past the first checks; push them.
        let length = bytes.len().saturating_sub(VNET_HEADER) as u16;
        if bytes.len() > VNET_HEADER + 10 {
            bytes[VNET_HEADER] = version << 4 | (bytes[VNET_HEADER] & 15);
            bytes[VNET_HEADER + 6] = protocol;
            bytes[VNET_HEADER + 9] = protocol;
            let (at, said) = if version == 4 { (2, length) } else { (4, length.saturating_sub(40)) };
            bytes[VNET_HEADER + at..VNET_HEADER + at + 2].copy_from_slice(&said.to_be_bytes());
        }
        for refuse in [false, true] {
            let mut frame = bytes.clone();
            let end4 = End { address: Ipv4Addr::LOCALHOST, port: 1 };
            let end6 = End { address: Ipv6Addr::LOCALHOST, port: 1 };
            match parse(&mut frame) {
                Ok(Parsed::V4(segment)) => { if refuse { segment.refuse() } else { segment.redirect(end4, end4) }; }
                Ok(Parsed::V6(segment)) => { if refuse { segment.refuse() } else { segment.redirect(end6, end6) }; }
                Err(_) => {}
            }
        }
    }
}

fn v4() -> Written<Ipv4Addr> {
    let end = End { address: Ipv4Addr::LOCALHOST, port: 1 };
    Written::new(end, end, packets::SYN)
}

fn v6() -> Written<Ipv6Addr> {
    let end = End { address: Ipv6Addr::LOCALHOST, port: 1 };
    Written::new(end, end, packets::SYN)
}

fn dropped(mut frame: Vec<u8>) -> Option<Dropped> {
    parse(&mut frame).err()
}

#[test]
fn what_is_not_one_whole_tcp_segment_is_dropped() {
    let changed = |mut frame: Vec<u8>, at: usize, byte: u8| {
        frame[VNET_HEADER + at] = byte;
        dropped(frame)
    };
    assert_eq!(dropped(v4().frame()), None);
    assert_eq!(dropped(v6().frame()), None);
    assert_eq!(changed(v4().frame(), 9, 17), Some(Dropped::NotTcp), "UDP");
    assert_eq!(changed(v6().frame(), 6, 17), Some(Dropped::NotTcp), "UDP");
    assert_eq!(changed(v6().frame(), 6, 0), Some(Dropped::NotTcp), "hop-by-hop options");
    assert_eq!(changed(v6().frame(), 6, 44), Some(Dropped::NotTcp), "fragment header");
    assert_eq!(changed(v4().frame(), 6, 0x20), Some(Dropped::Fragment), "first fragment");
    assert_eq!(changed(v4().frame(), 7, 1), Some(Dropped::Fragment), "later fragment");
    assert_eq!(changed(v4().frame(), 0, 0x44), Some(Dropped::Malformed), "IP header too short");
    assert_eq!(changed(v4().frame(), 0, 0x4f), Some(Dropped::Malformed), "IP header longer than the packet");
    assert_eq!(changed(v4().frame(), 3, 10), Some(Dropped::Malformed), "length in the header");
    assert_eq!(changed(v6().frame(), 5, 10), Some(Dropped::Malformed), "length in the header");
    assert_eq!(changed(v4().frame(), 20 + DATA_OFFSET, 0x40), Some(Dropped::Malformed), "TCP header too short");
    assert_eq!(changed(v6().frame(), 40 + DATA_OFFSET, 0x60), Some(Dropped::Malformed), "TCP options missing");
    assert_eq!(changed(v4().frame(), 0, 0x50), Some(Dropped::NotTcp), "no version of IP");
    assert_eq!(dropped(vec![0; VNET_HEADER]), Some(Dropped::Malformed), "nothing behind the header");
}

#[test]
fn segmentation_is_left_to_the_kernel() {
    let mut written = v4();
    written.partial = true;
    written.payload = vec![7; 60_000];
    let mut frame = written.frame();
    // VIRTIO_NET_HDR_GSO_TCPV4, header length, segment size, where the checksum goes.
    frame[1..10].copy_from_slice(&[1, 40, 0, 0xb4, 5, 20, 0, 16, 0]);
    let header = frame[..VNET_HEADER].to_vec();
    let (source, destination) = (End { address: [10, 0, 0, 1].into(), port: 2 }, written.source);
    segment(&mut frame).redirect(source, destination);
    assert_eq!(frame[..VNET_HEADER], header);
    check(&frame, source, destination);
}
