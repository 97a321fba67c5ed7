//! What a client sends on an HTTP/2 connection, with every header block rewritten and all else left as it is.
//!
//! Once one block is written anew, all later ones must be: compression carries over from block to block.

use super::headers::{Broken, Headers, MAX_BYTES};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// With padding and a priority on top, which are not passed on.
const MAX_FRAME: usize = MAX_BYTES + 6 + 255;
/// Frames of one header block: a block of 16 KiB fits in one, and empty ones must end some time.
const MAX_PARTS: usize = 8;
/// What is ready is taken before more is made: a few bytes of a client can mean 16 KiB of headers.
const ENOUGH: usize = 16 * 1024;

/// Bytes in, bytes out, however they are cut.
pub(super) struct Frames {
    state: State,
    headers: Headers,
    /// Header blocks rewritten so far.
    pub(super) blocks: u64,
}

enum State {
    /// How much of the preface has come.
    Preface(usize),
    /// The head of a frame, as far as it has come, and the block it must go on with.
    Head(Vec<u8>, Option<Block>),
    /// Payload that passes as it is, and how much of it is left.
    Pass(usize),
    /// Payload of a frame with a header block, or the next part of one, as far as it has come.
    Part(Head, Vec<u8>, Option<Block>),
}

/// A header block that goes on in the next frame.
struct Block {
    stream: [u8; 4],
    ends_stream: u8,
    fragment: Vec<u8>,
    parts: usize,
}

#[derive(Clone, Copy)]
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: [u8; 4],
}

impl Frames {
    pub(super) fn new() -> Frames {
        Frames { state: State::Preface(0), headers: Headers::new(), blocks: 0 }
    }

    /// Takes from `input` as long as there is little ready; how much it took.
    pub(super) fn advance(&mut self, input: &[u8], ready: &mut Vec<u8>) -> Result<usize, Broken> {
        let mut rest = input;
        while !rest.is_empty() && ready.len() < ENOUGH {
            self.state = match std::mem::replace(&mut self.state, State::Pass(0)) {
                State::Preface(seen) => preface(seen, &mut rest, ready)?,
                State::Head(mut seen, block) => {
                    take(HEAD, &mut seen, &mut rest);
                    match <[u8; HEAD]>::try_from(&seen[..]) {
                        Ok(head) => self.start(head, block, ready)?,
                        Err(_) => State::Head(seen, block),
                    }
                }
                State::Pass(left) => pass(left, &mut rest, ready),
                State::Part(head, mut payload, block) => {
                    take(head.length, &mut payload, &mut rest);
                    self.part(head, payload, block, ready)?
                }
            };
        }
        Ok(input.len() - rest.len())
    }

    fn start(&mut self, bytes: [u8; HEAD], block: Option<Block>, ready: &mut Vec<u8>) -> Result<State, Broken> {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = bytes;
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        // The highest bit of a stream's number means nothing.
        let head = Head { length, kind, flags, stream: [s0 & 127, s1, s2, s3] };
        match (kind, &block) {
            (CONTINUATION, Some(block)) if block.stream == head.stream => {}
            (HEADERS, None) => {}
            (CONTINUATION, _) | (_, Some(_)) => return Err(Broken("a header block that is not continued properly")),
            (_, None) => {
                ready.extend(bytes);
                return Ok(after_payload(length));
            }
        }
        if length > MAX_FRAME {
            return Err(Broken("a request with headers over 16 KiB"));
        }
        self.part(head, Vec::new(), block, ready)
    }

    fn part(
        &mut self,
        head: Head,
        payload: Vec<u8>,
        block: Option<Block>,
        ready: &mut Vec<u8>,
    ) -> Result<State, Broken> {
        if payload.len() < head.length {
            return Ok(State::Part(head, payload, block));
        }
        let fragment = if head.kind == HEADERS { fragment(head.flags, &payload)? } else { &payload };
        let mut block = block.unwrap_or_else(|| Block::of(head));
        block.fragment.extend_from_slice(fragment);
        block.parts += 1;
        if block.fragment.len() > MAX_BYTES || block.parts > MAX_PARTS {
            return Err(Broken("a request with headers over 16 KiB"));
        }
        if head.flags & END_HEADERS == 0 {
            return Ok(State::Head(Vec::new(), Some(block)));
        }
        let written = self.headers.rewrite(&block.fragment)?;
        self.blocks += 1;
        ready.extend_from_slice(&(written.len() as u32).to_be_bytes()[1..]);
        ready.extend([HEADERS, block.ends_stream | END_HEADERS]);
        ready.extend(block.stream);
        ready.extend(written);
        Ok(after_payload(0))
    }
}

impl Block {
    fn of(head: Head) -> Block {
        Block { stream: head.stream, ends_stream: head.flags & END_STREAM, fragment: Vec::new(), parts: 0 }
    }
}

fn after_payload(left: usize) -> State {
    if left == 0 { State::Head(Vec::new(), None) } else { State::Pass(left) }
}

fn preface(seen: usize, rest: &mut &[u8], ready: &mut Vec<u8>) -> Result<State, Broken> {
    let expected = &PREFACE[seen..];
    let length = expected.len().min(rest.len());
    let (given, after) = rest.split_at(length);
    if *given != expected[..length] {
        return Err(Broken("this is not HTTP/2"));
    }
    ready.extend_from_slice(given);
    *rest = after;
    let seen = seen + length;
    Ok(if seen == PREFACE.len() { after_payload(0) } else { State::Preface(seen) })
}

fn pass(left: usize, rest: &mut &[u8], ready: &mut Vec<u8>) -> State {
    let length = left.min(rest.len());
    let (given, after) = rest.split_at(length);
    ready.extend_from_slice(given);
    *rest = after;
    after_payload(left - length)
}

/// Fills `into` up to `length`.
fn take(length: usize, into: &mut Vec<u8>, rest: &mut &[u8]) {
    let (given, after) = rest.split_at((length - into.len()).min(rest.len()));
    into.extend_from_slice(given);
    *rest = after;
}

/// The part of a HEADERS frame that is headers (RFC 9113, 6.2).
fn fragment(flags: u8, mut payload: &[u8]) -> Result<&[u8], Broken> {
    const CUT: Broken = Broken("a frame shorter than it says");
    let mut padding = 0;
    if flags & PADDED != 0 {
        let (first, rest) = payload.split_first().ok_or(CUT)?;
        (padding, payload) = (usize::from(*first), rest);
    }
    if flags & PRIORITY != 0 {
        payload = payload.get(5..).ok_or(CUT)?;
    }
    payload.get(..payload.len().checked_sub(padding).ok_or(CUT)?).ok_or(CUT)
}

#[cfg(test)]
mod tests {
    use loona_hpack::{Decoder, Encoder};
    use proptest::prelude::*;

    use super::*;

    const PATH: &str = "%2Frun%2Fmeshd%2Fapi.sock";

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn request(authority: &str) -> Vec<u8> {
        Encoder::new().encode([(b":authority".as_slice(), authority.as_bytes()), (b"te", b"trailers")])
    }

    /// What comes out, cut as given on the way in.
    fn through(bytes: &[u8], cuts: &[usize]) -> Result<Vec<u8>, Broken> {
        let (mut frames, mut out, mut rest) = (Frames::new(), Vec::new(), bytes);
        let mut cuts = cuts.iter().cycle();
        while !rest.is_empty() {
            let cut = cuts.next().map_or(rest.len(), |cut| (*cut).clamp(1, rest.len()));
            let (mut piece, after) = rest.split_at(cut);
            while !piece.is_empty() {
                let mut ready = Vec::new();
                let taken = frames.advance(piece, &mut ready)?;
                assert!(taken > 0 || !ready.is_empty(), "no progress");
                piece = &piece[taken..];
                out.extend(ready);
            }
            rest = after;
        }
        Ok(out)
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        [PREFACE, &frames.concat()].concat()
    }

    /// One frame with the request's headers, with an authority anybody accepts.
    fn rewritten(stream: u32, flags: u8) -> Vec<u8> {
        frame(HEADERS, flags, stream, &Headers::new().rewrite(&request("localhost")).unwrap())
    }

    #[test]
    fn a_request_in_one_frame_in_many_and_with_padding_becomes_the_same_frame() {
        let block = request(PATH);
        let (a, rest) = block.split_at(3);
        let (b, c) = rest.split_at(5);
        let padded = [&[4, 0, 0, 0, 0, 16], &block[..], &[0; 4]].concat();
        for given in [
            frame(HEADERS, END_STREAM | END_HEADERS, 5, &block),
            [frame(HEADERS, END_STREAM, 5, a), frame(CONTINUATION, 0, 5, b), frame(CONTINUATION, END_HEADERS, 5, c)]
                .concat(),
            [frame(HEADERS, END_STREAM, 5, &block), frame(CONTINUATION, END_HEADERS, 5, &[])].concat(),
            frame(HEADERS, END_STREAM | END_HEADERS | PADDED | PRIORITY, 5, &padded),
        ] {
            let out = through(&connection(&[given]), &[]).unwrap();
            assert_eq!(out, connection(&[rewritten(5, END_STREAM | END_HEADERS)]));
        }
    }

    #[test]
    fn what_would_confuse_the_order_of_blocks_ends_the_connection() {
        let block = request(PATH);
        for given in [
            vec![frame(HEADERS, 0, 5, &block), frame(HEADERS, END_HEADERS, 7, &block)],
            vec![frame(HEADERS, 0, 5, &block), frame(CONTINUATION, END_HEADERS, 7, &[])],
            vec![frame(HEADERS, 0, 5, &block), frame(0, 0, 5, &[1])],
            vec![frame(CONTINUATION, END_HEADERS, 5, &block)],
            vec![frame(HEADERS, END_HEADERS | PADDED, 5, &[9, 130])],
            vec![frame(HEADERS, END_HEADERS | PRIORITY, 5, &[1, 2])],
            [vec![frame(HEADERS, 0, 5, &block)], vec![frame(CONTINUATION, 0, 5, &[]); MAX_PARTS]].concat(),
            vec![frame(HEADERS, END_HEADERS, 5, &vec![130; MAX_FRAME + 1])],
        ] {
            assert!(through(&connection(&given), &[]).is_err(), "{given:?}");
        }
        assert_eq!(through(b"GET / HTTP/1.1\r\n", &[]), Err(Broken("this is not HTTP/2")));
    }

    #[derive(Debug, Clone)]
    enum Sent {
        Request { authority: String, value: String, cut: usize },
        Other { kind: u8, flags: u8, payload: Vec<u8> },
    }

    fn sent() -> impl Strategy<Value = Sent> {
        prop_oneof![
            ("(%2F[a-z]{1,5}|[a-z]{1,9})", "[ -~]{0,300}", 0..200_usize)
                .prop_map(|(authority, value, cut)| Sent::Request { authority, value, cut }),
            (any::<u8>(), any::<u8>(), prop::collection::vec(any::<u8>(), 0..600)).prop_map(
                |(kind, flags, payload)| {
                    let kind = if [HEADERS, CONTINUATION].contains(&kind) { 0 } else { kind };
                    Sent::Other { kind, flags, payload }
                }
            ),
        ]
    }

    proptest! {
        #[test]
        fn however_reads_are_cut_requests_arrive_whole_and_other_frames_untouched(
            sent in prop::collection::vec(sent(), 1..8),
            cuts in prop::collection::vec(1..700_usize, 1..6),
        ) {
            let (mut encoder, mut given, mut expected) = (Encoder::new(), Vec::new(), Vec::new());
            let mut fresh = Headers::new();
            for (number, sent) in (1..).zip(sent) {
                match sent {
                    Sent::Request { authority, value, cut } => {
                        let fields = |authority: &str| vec![
                            (b":authority".to_vec(), authority.as_bytes().to_vec()),
                            (b"x-value".to_vec(), value.as_bytes().to_vec()),
                        ];
                        let block = encoder.encode(fields(&authority).iter().map(|(name, value)| (&name[..], &value[..])));
                        let (first, second) = block.split_at(cut.min(block.len()));
                        given.push(frame(HEADERS, 0, number, first));
                        given.push(frame(CONTINUATION, END_HEADERS, number, second));
                        let accepted = if authority.starts_with('%') { "localhost" } else { &authority };
                        let plain = Encoder::new().encode(fields(accepted).iter().map(|(name, value)| (&name[..], &value[..])));
                        expected.push(frame(HEADERS, END_HEADERS, number, &fresh.rewrite(&plain).unwrap()));
                        fresh = Headers::new();
                    }
                    Sent::Other { kind, flags, payload } => {
                        given.push(frame(kind, flags, number, &payload));
                        expected.push(frame(kind, flags, number, &payload));
                    }
                }
            }
            prop_assert_eq!(through(&connection(&given), &cuts).unwrap(), connection(&expected));
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            frames in prop::collection::vec(
                (0..12_u8, any::<u8>(), 0..4_u32, prop::collection::vec(any::<u8>(), 0..100)), 0..8),
            tail in prop::collection::vec(any::<u8>(), 0..100),
            cuts in prop::collection::vec(1..50_usize, 1..4),
        ) {
            let frames: Vec<_> =
                frames.iter().map(|(kind, flags, stream, payload)| frame(*kind, *flags, *stream, payload)).collect();
            let bytes = [connection(&frames), tail].concat();
            let _ = through(&bytes, &cuts);
        }

        #[test]
        fn every_block_passed_on_can_be_read_by_whoever_knows_no_block_before(
            blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 1..6),
        ) {
            let mut frames = Frames::new();
            let mut ready = Vec::new();
            frames.advance(PREFACE, &mut ready).unwrap();
            for block in blocks {
                ready.clear();
                if frames.advance(&frame(HEADERS, END_HEADERS, 1, &block), &mut ready).is_ok() {
                    prop_assert!(Decoder::new().decode(&ready[HEAD..]).is_ok());
                }
            }
        }
    }
}
