//! HPACK (RFC 7541), as much of it as the transcript needs: literals out; literals, indexes and Huffman codes in.

/// The part of the static table that a response to a CONNECT can refer to.
const STATIC: [(usize, &str, &str); 7] = [
    (8, ":status", "200"),
    (9, ":status", "204"),
    (10, ":status", "206"),
    (11, ":status", "304"),
    (12, ":status", "400"),
    (13, ":status", "404"),
    (14, ":status", "500"),
];
const FIRST_DYNAMIC: usize = 62;

/// The Huffman code is canonical: the codes of one length count up from the first.
const CODES: [(u32, u32, &str); 3] =
    [(5, 0x00, "012aceiost"), (6, 0x14, " %-./3456789=A_bdfghlmnpru"), (7, 0x5c, ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz")];

/// Every header as a literal that no table remembers.
pub(crate) fn encode(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        for text in [name, value] {
            assert!(text.len() < 127, "longer texts need a longer length");
            block.push(text.len() as u8);
            block.extend(text.as_bytes());
        }
    }
    block
}

/// Remembers what the peer told it to.
#[derive(Default)]
pub(crate) struct Decoder {
    dynamic: Vec<(String, String)>,
}

impl Decoder {
    /// `name=value name=value`
    pub(crate) fn decode(&mut self, mut block: &[u8]) -> String {
        let mut headers = Vec::new();
        while let Some(first) = block.first() {
            let (name, value) = match first {
                0x80.. => self.entry(integer(&mut block, 7)),
                0x40.. => {
                    let header = self.literal(&mut block, 6);
                    self.dynamic.insert(0, header.clone());
                    header
                }
                0x20.. => panic!("the peer resizes its table, which it was never asked to"),
                _ => self.literal(&mut block, 4),
            };
            headers.push(format!("{name}={value}"));
        }
        headers.join(" ")
    }

    fn literal(&self, block: &mut &[u8], prefix: u32) -> (String, String) {
        let name = match integer(block, prefix) {
            0 => string(block),
            index => self.entry(index).0,
        };
        (name, string(block))
    }

    fn entry(&self, index: usize) -> (String, String) {
        if index >= FIRST_DYNAMIC {
            return self.dynamic[index - FIRST_DYNAMIC].clone();
        }
        let known = STATIC.iter().find(|(known, ..)| *known == index);
        let (_, name, value) = known.unwrap_or_else(|| panic!("static entry {index} in a response"));
        ((*name).to_owned(), (*value).to_owned())
    }
}

fn integer(block: &mut &[u8], prefix: u32) -> usize {
    let value = usize::from(block[0]) & ((1 << prefix) - 1);
    assert!(value < (1 << prefix) - 1, "a number longer than its prefix");
    *block = &block[1..];
    value
}

fn string(block: &mut &[u8]) -> String {
    let compressed = block[0] & 0x80 != 0;
    let (text, rest) = (&block[1..], integer(block, 7));
    *block = &text[rest..];
    let text = &text[..rest];
    if compressed { inflate(text) } else { String::from_utf8(text.to_vec()).unwrap() }
}

fn inflate(compressed: &[u8]) -> String {
    let mut text = String::new();
    let (mut code, mut length) = (0, 0);
    for bit in compressed.iter().flat_map(|byte| (0..8).rev().map(move |shift| u32::from(byte >> shift & 1))) {
        (code, length) = (code << 1 | bit, length + 1);
        if let Some(letter) = letter(code, length) {
            text.push(letter);
            (code, length) = (0, 0);
        }
    }
    // What is left over pads the last byte, with ones.
    assert!(length < 8 && code == (1 << length) - 1, "a letter outside of the three shortest lengths");
    text
}

fn letter(code: u32, length: u32) -> Option<char> {
    let (_, first, letters) = CODES.iter().find(|(known, ..)| *known == length)?;
    letters.chars().nth(code.checked_sub(*first)? as usize)
}
