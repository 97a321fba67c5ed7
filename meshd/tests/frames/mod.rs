//! HTTP/2 frames by hand (RFC 9113), written down as they pass. No flow control of its own: tests say little.

// Every test program compiles this anew and uses its own part of it.
#![allow(dead_code, reason = "each test program uses a part")]

mod header_block;

use std::fmt::Write as _;
use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::common::within;
use header_block::Decoder;

pub(crate) const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
pub(crate) const END_HEADERS: u8 = 0x4;

pub(crate) const ENABLE_PUSH: u16 = 2;
pub(crate) const INITIAL_WINDOW: u16 = 4;
pub(crate) const MAX_FRAME: u16 = 5;
pub(crate) const MAX_HEADERS: u16 = 6;
const SETTINGS_NAMES: [(u16, &str); 7] = [
    (1, "header_table_size"),
    (ENABLE_PUSH, "enable_push"),
    (3, "max_concurrent_streams"),
    (INITIAL_WINDOW, "initial_window_size"),
    (MAX_FRAME, "max_frame_size"),
    (MAX_HEADERS, "max_header_list_size"),
    (8, "enable_connect_protocol"),
];

pub(crate) const CANCEL: u32 = 8;
const REASONS: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

/// A connection that keeps a transcript of itself.
pub(crate) struct Wire {
    tls: TlsStream<TcpStream>,
    decoder: Decoder,
    /// Ports differ from run to run: what stands for them.
    ports: Vec<(u16, &'static str)>,
    pub(crate) transcript: String,
}

impl Wire {
    pub(crate) fn new(tls: TlsStream<TcpStream>, ports: Vec<(u16, &'static str)>) -> Wire {
        Wire { tls, decoder: Decoder::default(), ports, transcript: String::new() }
    }

    pub(crate) fn note(&mut self, line: &str) {
        let named = |line: String, (port, name): &(u16, &str)| line.replace(&format!(":{port}"), &format!(":{name}"));
        let line = self.ports.iter().fold(line.to_owned(), named);
        writeln!(self.transcript, "{line}").unwrap();
    }

    pub(crate) async fn preface(&mut self) {
        self.note("> PREFACE");
        self.tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    }

    pub(crate) async fn settings(&mut self, settings: &[(u16, u32)]) {
        let payload = settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat());
        self.send(Frame { kind: SETTINGS, flags: 0, stream: 0, payload: payload.collect() }).await;
    }

    pub(crate) async fn acknowledge_settings(&mut self) {
        self.send(Frame { kind: SETTINGS, flags: ACK, stream: 0, payload: Vec::new() }).await;
    }

    pub(crate) async fn ping(&mut self) {
        self.send(Frame { kind: PING, flags: 0, stream: 0, payload: vec![0; 8] }).await;
    }

    pub(crate) async fn window_update(&mut self, increment: u32) {
        self.send(window_update(0, increment)).await;
    }

    pub(crate) async fn headers(&mut self, stream: u32, flags: u8, headers: &[(&str, &str)]) {
        let payload = header_block::encode(headers);
        self.send(Frame { kind: HEADERS, flags, stream, payload }).await;
    }

    pub(crate) async fn data(&mut self, stream: u32, flags: u8, text: &str) {
        self.send(Frame { kind: DATA, flags, stream, payload: text.into() }).await;
    }

    pub(crate) async fn reset(&mut self, stream: u32, reason: u32) {
        self.send(Frame { kind: RST_STREAM, flags: 0, stream, payload: reason.to_be_bytes().to_vec() }).await;
    }

    async fn send(&mut self, frame: Frame) {
        let line = self.describe(&frame, &mut Decoder::default());
        self.note(&format!("> {line}"));
        self.try_send(frame).await.unwrap();
    }

    async fn try_send(&mut self, frame: Frame) -> io::Result<()> {
        let length = (frame.payload.len() as u32).to_be_bytes();
        let mut bytes = vec![length[1], length[2], length[3], frame.kind, frame.flags];
        bytes.extend(frame.stream.to_be_bytes());
        bytes.extend(frame.payload);
        self.tls.write_all(&bytes).await?;
        self.tls.flush().await
    }

    /// The peer's settings, its window and its answer to ours, written down in this order whatever theirs was.
    pub(crate) async fn hear_opening(&mut self) {
        let mut heard = [self.receive().await, self.receive().await, self.receive().await];
        heard.sort_by_key(|frame| (frame.kind == SETTINGS && frame.flags & ACK != 0, frame.kind));
        for frame in heard {
            self.write_down(&frame);
        }
    }

    /// The next frame, whatever it is.
    pub(crate) async fn hear_frame(&mut self) {
        let frame = self.receive().await;
        self.write_down(&frame);
    }

    /// `count` bytes of a stream, in however many frames they come.
    pub(crate) async fn hear_data(&mut self, stream: u32, count: usize) {
        let mut whole = self.receive().await;
        while whole.payload.len() < count && (whole.kind, whole.stream, whole.flags) == (DATA, stream, 0) {
            let more = self.receive().await;
            assert_eq!((more.kind, more.stream), (DATA, stream), "a frame within the bytes");
            whole.payload.extend(more.payload);
            whole.flags = more.flags;
        }
        self.write_down(&whole);
    }

    /// Reads a stream to its end as a receiver does, giving windows back on the way; how much it was.
    pub(crate) async fn drain_data(&mut self, stream: u32) -> io::Result<usize> {
        let mut total = 0;
        loop {
            let frame = self.try_receive().await?;
            if (frame.kind, frame.stream) != (DATA, stream) {
                self.write_down(&frame);
                continue;
            }
            total += frame.payload.len();
            if frame.flags & END_STREAM != 0 {
                return Ok(total);
            }
            // It may be gone already; what it sent before must arrive all the same.
            let _ = self.try_send(window_update(0, frame.payload.len() as u32)).await;
        }
    }

    /// Answers the question that precedes a last GOAWAY, and waits for it.
    pub(crate) async fn hear_farewell(&mut self) {
        let mut farewells = 0;
        while farewells < 2 {
            let frame = self.receive().await;
            self.write_down(&frame);
            farewells += u32::from(frame.kind == GOAWAY);
            if frame.kind == PING {
                self.send(Frame { flags: ACK, ..frame }).await;
            }
        }
    }

    fn write_down(&mut self, frame: &Frame) {
        let mut decoder = std::mem::take(&mut self.decoder);
        let line = self.describe(frame, &mut decoder);
        self.decoder = decoder;
        self.note(&format!("< {line}"));
    }

    async fn receive(&mut self) -> Frame {
        self.try_receive().await.unwrap()
    }

    async fn try_receive(&mut self) -> io::Result<Frame> {
        let mut head = [0; 9];
        within("a frame", self.tls.read_exact(&mut head)).await?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        within("the rest of a frame", self.tls.read_exact(&mut payload)).await?;
        Ok(Frame { kind: head[3], flags: head[4], stream: number(&head[5..]), payload })
    }

    fn describe(&self, frame: &Frame, decoder: &mut Decoder) -> String {
        let Frame { kind, flags, stream, payload } = frame;
        let end = if *kind <= HEADERS && flags & END_STREAM != 0 { " end" } else { "" };
        match *kind {
            DATA if payload.is_empty() => format!("DATA stream={stream}{end}"),
            DATA => format!("DATA stream={stream} {:?}{end}", String::from_utf8_lossy(payload)),
            HEADERS => {
                assert!(flags & !END_STREAM == END_HEADERS, "no padding, priority or continuation");
                format!("HEADERS stream={stream} {}{end}", decoder.decode(payload))
            }
            RST_STREAM => format!("RST_STREAM stream={stream} {}", REASONS[number(payload) as usize]),
            SETTINGS if flags & ACK != 0 => "SETTINGS ack".to_owned(),
            SETTINGS => format!("SETTINGS{}", describe_settings(payload)),
            PING if flags & ACK != 0 => "PING ack".to_owned(),
            PING => "PING".to_owned(),
            GOAWAY => format!("GOAWAY {}", REASONS[number(&payload[4..8]) as usize]),
            WINDOW_UPDATE => format!("WINDOW_UPDATE stream={stream} +{}", number(payload)),
            other => format!("frame type {other}"),
        }
    }
}

impl Drop for Wire {
    /// A step that fails says little without those before it.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the exchange so far:\n{}", self.transcript);
        }
    }
}

fn window_update(stream: u32, increment: u32) -> Frame {
    Frame { kind: WINDOW_UPDATE, flags: 0, stream, payload: increment.to_be_bytes().to_vec() }
}

fn describe_settings(payload: &[u8]) -> String {
    let setting = |pair: &[u8]| {
        let id = u16::from_be_bytes([pair[0], pair[1]]);
        let name = SETTINGS_NAMES.iter().find(|(known, _)| *known == id).map_or("unknown", |(_, name)| name);
        format!(" {name}={}", number(&pair[2..]))
    };
    payload.chunks(6).map(setting).collect()
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().unwrap())
}
