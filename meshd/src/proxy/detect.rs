//! WHAT is spoken. A declared protocol wins; nothing is peeked at yet.
//!
//! Every connection is carried as an opaque byte stream for now: HTTP awareness comes in here, by
//! whichever side speaks first, and `serve` gets a second way to serve.

use meshd_discovery::Protocol;

/// How the connection is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Bytes are copied both ways, whatever they are.
    Opaque,
}

pub(super) fn protocol(declared: Protocol) -> Served {
    match declared {
        Protocol::Detect | Protocol::Tcp | Protocol::Tls => Served::Opaque,
        // Requests ride as bytes until requests are understood; the far app sees exactly what was sent.
        Protocol::Http | Protocol::Http2 | Protocol::Grpc => Served::Opaque,
    }
}
