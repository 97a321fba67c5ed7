//! Names and limits of the wire protocol (docs/wire.md).

use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use meshd_discovery::ServiceName;

use crate::fault::Fault;

/// ALPN tokens, newest first: the server picks its newest; a new token is a new wire version.
pub const ALPN_MESHD: &[u8] = b"meshd/1";
/// A plain HBONE peer, as Istio's ztunnel is.
pub const ALPN_HBONE: &[u8] = b"h2";

/// Which refusal, on a response that is none.
pub const ERROR_HEADER: HeaderName = HeaderName::from_static("meshd-error");

/// Streams one connection carries, and the window of each. The connection window holds all of them, so
/// that readers that stop never freeze their neighbours.
pub const STREAMS: u32 = 64;
pub const STREAM_WINDOW: u32 = 1 << 20;
pub const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// Frames as large as the buffers bytes are copied with: fewer headers, and no frame waits for more.
pub const MAX_FRAME: u32 = 64 * 1024;
pub const MAX_HEADERS: u32 = 16 * 1024;
/// Bytes one stream may have queued for a connection that does not drain.
pub const SEND_BUFFER: usize = 128 * 1024;

/// A peer's time for its TLS handshake and HTTP/2 preface.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(3);
/// Silence on a connection with streams after which we ask, and after which it is dead.
pub const PING_AFTER: Duration = Duration::from_secs(10);
pub const DEAD_AFTER: Duration = Duration::from_secs(30);
/// Silence on a connection without streams after which we ask: vanished peers must not be kept for ever.
pub const IDLE_PING_AFTER: Duration = Duration::from_secs(60);

/// Bytes sent before the CONNECT's 200, kept by the sender for the next candidate.
pub const EARLY_DATA: usize = 64 * 1024;

/// What is agreed by ALPN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WireVersion {
    /// Targets are services; early data allowed.
    Meshd1,
    /// Targets are addresses; nothing but CONNECT.
    Hbone,
}

impl WireVersion {
    pub fn from_alpn(token: Option<&[u8]>) -> Option<WireVersion> {
        match token {
            Some(ALPN_MESHD) => Some(WireVersion::Meshd1),
            Some(ALPN_HBONE) => Some(WireVersion::Hbone),
            _ => None,
        }
    }
}

/// What a CONNECT asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Service(ServiceName, u16),
    Address(SocketAddr),
}

impl Target {
    /// Reads a CONNECT's `:authority` under `version`; None is a malformed request (400).
    pub fn parse(version: WireVersion, authority: &str) -> Option<Target> {
        match version {
            WireVersion::Hbone => authority.parse().ok().map(Target::Address),
            WireVersion::Meshd1 => {
                let (service, port) = authority.rsplit_once(':')?;
                Some(Target::Service(service.parse().ok()?, port.parse().ok().filter(|port| *port != 0)?))
            }
        }
    }
}

/// What a peer may say of itself (docs/wire.md).
const REFUSALS: [Fault; 11] = [
    Fault::Denied,
    Fault::Banned,
    Fault::Unfederated,
    Fault::UnknownTarget,
    Fault::NoService,
    Fault::Misdirected,
    Fault::Limit,
    Fault::ConnectRefused,
    Fault::ConnectTimeout,
    Fault::Drain,
    Fault::Loop,
];

/// The fault a refusal names, or what its status says when it names none (a foreign peer).
pub fn refusal(status: u16, headers: &HeaderMap) -> Fault {
    let named = headers.get(ERROR_HEADER).and_then(|value| value.to_str().ok()).and_then(Fault::from_label);
    // A peer speaks for itself only: its other names are not outcomes of ours.
    named.filter(|fault| REFUSALS.contains(fault) && fault.status() == status).unwrap_or(match status {
        401 | 403 => Fault::Denied,
        400 | 404 => Fault::UnknownTarget,
        421 => Fault::Misdirected,
        429 => Fault::Limit,
        504 => Fault::ConnectTimeout,
        _ => Fault::ConnectRefused,
    })
}

pub fn error_header(fault: Fault) -> HeaderValue {
    HeaderValue::from_static(fault.label())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_meshd_target_is_a_service_and_never_an_address() {
        let parse = |text| Target::parse(WireVersion::Meshd1, text);
        assert_eq!(parse("payments.shop:80"), Some(Target::Service("payments.shop".parse().unwrap(), 80)));
        for bad in ["10.0.0.1:80", "payments.shop", "payments.shop:0", "payments.shop:99999", ":80", "[::1]:80"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_hbone_target_is_an_address_and_never_a_name() {
        let parse = |text| Target::parse(WireVersion::Hbone, text);
        assert_eq!(parse("10.0.0.1:80"), Some(Target::Address("10.0.0.1:80".parse().unwrap())));
        assert_eq!(parse("[fd00::1]:80"), Some(Target::Address("[fd00::1]:80".parse().unwrap())));
        for bad in ["payments.shop:80", "10.0.0.1", "fd00::1:80x"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_refusal_survives_the_wire_and_nothing_else_does() {
        for fault in Fault::ALL {
            let mut headers = HeaderMap::new();
            headers.insert(ERROR_HEADER, error_header(*fault));
            let expected = if REFUSALS.contains(fault) { *fault } else { Fault::ConnectRefused };
            assert_eq!(refusal(fault.status(), &headers), expected);
            assert_eq!(refusal(418, &headers), Fault::ConnectRefused);
        }
    }

    proptest! {
        #[test]
        fn no_authority_panics(text in ".{0,80}") {
            let _ = Target::parse(WireVersion::Meshd1, &text);
            let _ = Target::parse(WireVersion::Hbone, &text);
        }
    }
}
