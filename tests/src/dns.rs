//! Just enough DNS to ask for an address and to be the server of a host: A records, UDP and TCP.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub const NO_ERROR: u8 = 0;
pub const SERVER_FAILURE: u8 = 2;
pub const NO_SUCH_NAME: u8 = 3;
pub const REFUSED: u8 = 5;

const LIMIT: Duration = Duration::from_secs(15);
const HEADER: usize = 12;
const TYPE_A: [u8; 2] = [0, 1];

/// What a server said about a name: the response code, the first address.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub code: u8,
    pub address: Option<Ipv4Addr>,
}

pub fn ask_udp(server: SocketAddr, name: &str) -> Result<Answer> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.connect(server)?;
    let query = query(name);
    socket.send(&query)?;
    let mut packet = [0; 1232];
    let length = socket.recv(&mut packet).with_context(|| format!("{server} does not answer"))?;
    read_answer(&query, &packet[..length])
}

pub fn ask_tcp(server: SocketAddr, name: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let query = query(name);
    stream.write_all(&framed(&query))?;
    let mut length = [0; 2];
    stream.read_exact(&mut length).with_context(|| format!("{server} does not answer"))?;
    let mut packet = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut packet)?;
    read_answer(&query, &packet)
}

/// A message as TCP carries it.
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("messages here are short");
    [&length.to_be_bytes(), message].concat()
}

/// The name a query asks for, and the answer of a server that knows some names.
pub fn serve(packet: &[u8], known: &[(String, Ipv4Addr)]) -> Option<(String, Vec<u8>)> {
    let (name, end) = question(packet)?;
    let asks_a = packet[end - 4..end - 2] == TYPE_A;
    let address = known.iter().find(|(known, _)| *known == name).map(|(_, address)| address);
    let records = u8::from(asks_a && address.is_some());
    let code = if address.is_some() { NO_ERROR } else { NO_SUCH_NAME };
    let mut answer = [&packet[..2], &[0x81, 0x80 | code, 0, 1, 0, records, 0, 0, 0, 0]].concat();
    answer.extend_from_slice(&packet[HEADER..end]);
    if let Some(address) = address.filter(|_| asks_a) {
        answer.extend_from_slice(&[0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend_from_slice(&address.octets());
    }
    Some((name, answer))
}

fn query(name: &str) -> Vec<u8> {
    let labels = name.split('.').flat_map(|label| {
        let length = u8::try_from(label.len()).expect("labels are short");
        std::iter::once(length).chain(label.bytes())
    });
    let header = [0x47, 0x11, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    header.into_iter().chain(labels).chain([0, 0, 1, 0, 1]).collect()
}

/// The name asked for, and where the question ends.
fn question(packet: &[u8]) -> Option<(String, usize)> {
    let mut at = HEADER;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*packet.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8(packet.get(at..at + length)?.to_owned()).ok()?);
        at += length;
    }
    (packet.len() >= at + 4).then(|| (labels.join("."), at + 4))
}

fn read_answer(query: &[u8], packet: &[u8]) -> Result<Answer> {
    ensure!(packet.len() >= query.len() && packet[..2] == query[..2], "not an answer to the question: {packet:?}");
    ensure!(packet[HEADER..query.len()] == query[HEADER..], "an answer to another question: {packet:?}");
    let answers = u16::from_be_bytes([packet[6], packet[7]]);
    let address = (answers > 0).then(|| address_of(&packet[query.len()..])).transpose()?;
    Ok(Answer { code: packet[3] & 15, address })
}

/// The address of the first record; its name is compressed or repeated.
fn address_of(record: &[u8]) -> Result<Ipv4Addr> {
    let name = match record.first() {
        Some(0xc0..) => 2,
        _ => 1 + record.iter().position(|byte| *byte == 0).context("a name without end")?,
    };
    let data: [u8; 4] = record.get(name + 10..name + 14).context("no address in the record")?.try_into()?;
    Ok(data.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_and_server_understand_each_other() {
        let known = [("example.org".to_owned(), Ipv4Addr::new(192, 0, 2, 7))];
        for (name, code, address) in [("example.org", NO_ERROR, Some(known[0].1)), ("example.com", NO_SUCH_NAME, None)]
        {
            let query = query(name);
            let (asked, answer) = serve(&query, &known).unwrap();
            assert_eq!(asked, name);
            assert_eq!(read_answer(&query, &answer).unwrap(), Answer { code, address });
        }
        assert_eq!(serve(b"nonsense", &known), None);
    }
}
