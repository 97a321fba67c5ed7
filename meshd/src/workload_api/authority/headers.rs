//! One header block: decoded, its `:authority` made one that HTTP accepts, encoded again.

use std::fmt;

use loona_hpack::Decoder;

/// As everywhere in meshd; counted as HTTP/2 counts them: name, value and 32 bytes each (RFC 9113, 6.5.2).
pub(super) const MAX_BYTES: usize = 16 * 1024;
/// gRPC clients send about ten. What a field costs us does not depend on its length alone.
const MAX_FIELDS: usize = 64;
/// What HTTP/2 allows a client until the server says otherwise, which ours does not (RFC 9113, 6.5.2).
const TABLE_BYTES: usize = 4096;
const FIELD_OVERHEAD: usize = 32;
const AUTHORITY: &[u8] = b":authority";
/// What gRPC clients that do not name the socket say.
const LOCAL: &[u8] = b"localhost";

/// Why a connection cannot go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) &'static str);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What the client's compression has built up so far. Ours builds up nothing: fields are written out whole.
pub(super) struct Headers(Decoder<'static>);

impl Headers {
    pub(super) fn new() -> Headers {
        let mut decoder = Decoder::new();
        decoder.set_max_allowed_table_size(TABLE_BYTES);
        Headers(decoder)
    }

    /// Never longer than `MAX_BYTES`: a field is written with less than it is counted for.
    pub(super) fn rewrite(&mut self, block: &[u8]) -> Result<Vec<u8>, Broken> {
        if fields(block).ok_or(Broken("a header block is cut off"))? > MAX_FIELDS {
            return Err(Broken("a request with too many headers"));
        }
        let (mut written, mut bytes) = (Vec::with_capacity(block.len() * 2), 0);
        let decoded = self.0.decode_with_cb(block, |name, value| {
            let value = if *name == *AUTHORITY && !is_authority(&value) { LOCAL } else { &value };
            bytes += name.len() + value.len() + FIELD_OVERHEAD;
            if bytes <= MAX_BYTES {
                write_field(&name, value, &mut written);
            }
        });
        decoded.map_err(|_| Broken("a header block that is not HPACK"))?;
        if bytes > MAX_BYTES {
            return Err(Broken("a request with headers over 16 KiB"));
        }
        Ok(written)
    }
}

/// By the judgement of whoever reads it next.
fn is_authority(value: &[u8]) -> bool {
    http::uri::Authority::try_from(value).is_ok()
}

/// A literal without indexing, with a new name (RFC 7541, 6.2.2).
fn write_field(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    out.push(0);
    for text in [name, value] {
        write_length(text.len(), out);
        out.extend_from_slice(text);
    }
}

/// An integer with a prefix of 7 bits; the eighth says that the text is not compressed.
fn write_length(mut length: usize, out: &mut Vec<u8>) {
    if length < 127 {
        return out.push(length as u8);
    }
    out.push(127);
    length -= 127;
    while length >= 128 {
        out.push((length % 128) as u8 | 128);
        length /= 128;
    }
    out.push(length as u8);
}

/// How many fields a block has, without decoding them; None if it ends in the middle of one.
fn fields(mut block: &[u8]) -> Option<usize> {
    let mut count = 0;
    while let [first, ..] = block {
        let (prefix, is_literal) = match first {
            128.. => (7, false),
            64.. => (6, true),
            32.. => (5, false),
            _ => (4, true),
        };
        let index = take_integer(&mut block, prefix)?;
        if is_literal {
            if index == 0 {
                take_text(&mut block)?;
            }
            take_text(&mut block)?;
        }
        count += 1;
    }
    Some(count)
}

fn take_text(block: &mut &[u8]) -> Option<()> {
    let length = take_integer(block, 7)?;
    *block = block.get(length..)?;
    Some(())
}

/// RFC 7541, 5.1.
fn take_integer(block: &mut &[u8], prefix: u32) -> Option<usize> {
    let (first, mut rest) = block.split_first()?;
    let most = (1_usize << prefix) - 1;
    let mut value = usize::from(*first) & most;
    if value == most {
        for shift in [0, 7, 14, 21] {
            let (next, after) = rest.split_first()?;
            rest = after;
            value += usize::from(next & 127) << shift;
            if next & 128 == 0 {
                *block = rest;
                return Some(value);
            }
        }
        return None;
    }
    *block = rest;
    Some(value)
}

#[cfg(test)]
mod tests {
    use loona_hpack::Encoder;
    use proptest::prelude::*;

    use super::*;

    type Fields = Vec<(Vec<u8>, Vec<u8>)>;

    fn read(block: &[u8]) -> Fields {
        Decoder::new().decode(block).unwrap()
    }

    fn block(fields: &[(&str, &str)]) -> Vec<u8> {
        Encoder::new().encode(fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
    }

    #[test]
    fn only_an_authority_nobody_accepts_is_replaced() {
        for (given, expected) in [
            ("%2Frun%2Fmeshd%2Fapi.sock", "localhost"),
            ("/run/meshd/api.sock", "localhost"),
            ("", "localhost"),
            ("sds_cluster", "sds_cluster"),
            ("localhost:80", "localhost:80"),
        ] {
            let given = block(&[(":method", "POST"), (":authority", given), ("te", "trailers")]);
            let rewritten = read(&Headers::new().rewrite(&given).unwrap());
            assert_eq!(rewritten, read(&block(&[(":method", "POST"), (":authority", expected), ("te", "trailers")])));
        }
    }

    #[test]
    fn headers_beyond_the_limits_are_refused() {
        let long = "a".repeat(MAX_BYTES - 33);
        let fits = Headers::new().rewrite(&block(&[("x", &long)])).unwrap();
        assert!(fits.len() <= MAX_BYTES);
        let longer = block(&[("x", &(long + "a"))]);
        assert_eq!(Headers::new().rewrite(&longer), Err(Broken("a request with headers over 16 KiB")));
        let many = block(&[("x", ""); MAX_FIELDS + 1]);
        assert_eq!(Headers::new().rewrite(&many), Err(Broken("a request with too many headers")));
    }

    #[test]
    fn a_few_bytes_that_repeat_a_long_header_count_whole() {
        let value = "a".repeat(3000);
        let mut encoder = Encoder::new();
        let mut headers = Headers::new();
        let field = [(b"x".as_slice(), value.as_bytes())];
        let mut first = vec![0x40, 1, b'x', 127];
        first.extend([(3000_u32 - 127) as u8 & 127 | 128, ((3000_u32 - 127) >> 7) as u8]);
        first.extend(value.as_bytes());
        headers.rewrite(&first).unwrap();
        assert_eq!(headers.rewrite(&[128 | 62; 5]).unwrap().len(), 5 * (1 + 1 + 1 + 3 + 3000));
        assert_eq!(headers.rewrite(&[128 | 62; 6]), Err(Broken("a request with headers over 16 KiB")));
        assert!(encoder.encode(field).len() < 4096);
    }

    #[test]
    fn a_table_larger_than_allowed_is_refused() {
        // A size update to 4097, then an indexed field.
        assert!(Headers::new().rewrite(&[0x3f, 0xe2, 0x1f, 0x82]).is_err());
        assert!(Headers::new().rewrite(&[0x3f, 0xe1, 0x1f, 0x82]).is_ok());
    }

    proptest! {
        #[test]
        fn fields_survive_also_when_the_client_compresses_what_it_repeats(
            requests in prop::collection::vec(
                prop::collection::vec(("[a-z-]{1,12}", "[ -~]{0,200}"), 1..12), 1..6)
        ) {
            let (mut encoder, mut headers) = (Encoder::new(), Headers::new());
            for request in requests {
                let given: Fields = request.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
                let encoded = encoder.encode(given.iter().map(|(name, value)| (&name[..], &value[..])));
                prop_assert_eq!(fields(&encoded), Some(given.len()));
                prop_assert_eq!(read(&headers.rewrite(&encoded).unwrap()), given);
            }
        }

        #[test]
        fn arbitrary_blocks_never_panic(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..5)) {
            let mut headers = Headers::new();
            for block in blocks {
                if let Ok(written) = headers.rewrite(&block) {
                    prop_assert!(written.len() <= MAX_BYTES);
                }
            }
        }
    }
}
