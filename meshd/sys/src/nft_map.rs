//! What an nftables map holds for one key: one exact request, no dump, no program run.

use std::io;

use super::nfnetlink::{NESTED, Nfnetlink, attribute, find};

/// NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETSETELEM.
const GET_ELEMENT: u16 = 10 << 8 | 13;
const NFPROTO_INET: u8 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

/// A netlink socket to read the maps of `inet` tables with; one per worker thread. Needs CAP_NET_ADMIN.
pub struct NftMaps(Nfnetlink);

impl NftMaps {
    pub fn open() -> io::Result<NftMaps> {
        Nfnetlink::open().map(NftMaps)
    }

    /// The value of exactly `key`: what rules loaded, each field in the byte order they loaded it in and padded
    /// to 4 bytes. None without such an element, map or table.
    pub fn value(&mut self, table: &str, map: &str, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let request = encode_request(table, map, key);
        self.0.ask(GET_ELEMENT, NFPROTO_INET, &request, |answer| value_of(answer, key))
    }
}

fn encode_request(table: &str, map: &str, key: &[u8]) -> Vec<u8> {
    let mut request = Vec::with_capacity(128);
    attribute(&mut request, NFTA_SET_ELEM_LIST_TABLE, &[table.as_bytes(), b"\0"].concat());
    attribute(&mut request, NFTA_SET_ELEM_LIST_SET, &[map.as_bytes(), b"\0"].concat());
    attribute(&mut request, NFTA_SET_ELEM_LIST_ELEMENTS | NESTED, &nested(NFTA_LIST_ELEM, &element_key(key)));
    request
}

fn element_key(key: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(64);
    attribute(&mut value, NFTA_DATA_VALUE, key);
    nested(NFTA_SET_ELEM_KEY, &value)
}

fn nested(kind: u16, inner: &[u8]) -> Vec<u8> {
    let mut outer = Vec::with_capacity(inner.len() + 4);
    attribute(&mut outer, kind | NESTED, inner);
    outer
}

fn value_of(answer: &[u8], key: &[u8]) -> Option<Vec<u8>> {
    let element = find(find(answer, NFTA_SET_ELEM_LIST_ELEMENTS)?, NFTA_LIST_ELEM)?;
    let data = |of: u16| find(find(element, of)?, NFTA_DATA_VALUE);
    // Another key's element would be somebody else's.
    (data(NFTA_SET_ELEM_KEY)? == key).then(|| data(NFTA_SET_ELEM_DATA).map(<[u8]>::to_vec))?
}

#[cfg(test)]
mod tests {
    use super::super::nfnetlink::{HEADERS, decode};
    use super::*;

    const KEY: [u8; 16] = [127, 0, 0, 1, 0xc3, 0x51, 0, 0, 240, 240, 0, 9, 0, 80, 0, 0];

    fn answer() -> Vec<u8> {
        let mut value = Vec::new();
        attribute(&mut value, NFTA_DATA_VALUE, &[7; 12]);
        let element = [element_key(&KEY), nested(NFTA_SET_ELEM_DATA, &value)].concat();
        let mut message = vec![0u8; HEADERS];
        message[4..6].copy_from_slice(&(10u16 << 8 | 12).to_ne_bytes());
        message.extend(nested(NFTA_SET_ELEM_LIST_ELEMENTS, &nested(NFTA_LIST_ELEM, &element)));
        message
    }

    #[test]
    fn the_value_of_an_answer_is_read_and_only_of_the_key_that_was_asked_for() {
        let message = answer();
        let read = |message: &[u8], key: &[u8]| decode(message, |answer| value_of(answer, key));
        assert_eq!(read(&message, &KEY).unwrap(), Some(vec![7; 12]));
        let mut other = KEY;
        other[5] += 1;
        assert!(read(&message, &other).is_err());
        for length in 0..message.len() {
            let _ = read(&message[..length], &KEY);
        }
    }
}
