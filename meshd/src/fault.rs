//! The one list of what can go wrong with a connection: metric label, log field, `meshd-error` on
//! the wire and exit code of `meshd probe` all use these names.

use std::fmt;

/// Whose fault it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Us,
    Peer,
    App,
}

macro_rules! faults {
    ($($variant:ident $label:literal $side:ident $retryable:literal $doc:literal)*) => {
        /// Why a connection was refused or broke.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Fault { $(#[doc = $doc] $variant,)* }

        impl Fault {
            pub const ALL: &'static [Fault] = &[$(Fault::$variant,)*];

            pub fn label(self) -> &'static str {
                match self { $(Fault::$variant => $label,)* }
            }

            pub fn side(self) -> Side {
                match self { $(Fault::$variant => Side::$side,)* }
            }

            /// What it means, in a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Fault::$variant => $doc,)* }
            }

            /// Whether another endpoint may do better. Says nothing of bytes already delivered: `connect` knows that.
            pub fn retryable(self) -> bool {
                match self { $(Fault::$variant => $retryable,)* }
            }
        }
    };
}

faults! {
    Unenrolled      "unenrolled"       App  false "The caller is no enrolled workload of this host."
    IdentifyUnknown "identify_unknown" App  false "The kernel could not say who opened the connection."
    NoService       "no_service"       App  false "No service has this address, or it has no such port."
    NoEndpoints     "no_endpoints"     Peer false "The service has no endpoint for this port."
    ConnectRefused  "connect_refused"  Peer true  "The peer, or the application behind it, refused the connection."
    ConnectTimeout  "connect_timeout"  Peer true  "No answer within the connect timeout."
    TlsHandshake    "tls_handshake"    Peer true  "The TLS handshake failed."
    IdentityMismatch "identity_mismatch" Peer true "The peer proved another identity than the endpoint's."
    CertExpired     "cert_expired"     Peer true  "A certificate is past its NotAfter."
    Denied          "denied"           Us   false "Authorization refused the caller."
    Banned          "banned"           Us   true  "A certificate is on the deny list, the caller's or the peer's."
    UnknownTarget   "unknown_target"   Peer false "The target is no service of that host."
    Misdirected     "misdirected"      Peer true  "The target belongs to another identity than the connection's."
    Loop            "loop"             Us   true  "The connection would come back to this daemon."
    Limit           "limit"            Us   true  "A limit on connections, handshakes or buffered bytes was reached."
    Drain           "drain"            Peer true  "The peer is shutting down."
    PeerReset       "peer_reset"       Peer false "The peer broke the stream."
    AppReset        "app_reset"        App  false "The local application broke the connection."
    Internal        "internal"         Us   false "A defect in meshd; the log has more."
    Unfederated     "unfederated"      Us   true  "The peer is of another trust domain, with which this identity has no dealings."
}

impl Fault {
    pub fn from_label(label: &str) -> Option<Fault> {
        Fault::ALL.iter().copied().find(|fault| fault.label() == label)
    }

    /// What `meshd probe` exits with. Below 10 are what every program uses (1 failed, 2 wrong arguments).
    pub fn exit_code(self) -> u8 {
        10 + self as u8
    }

    /// The HTTP status a refusal travels with (docs/wire.md).
    pub fn status(self) -> u16 {
        match self {
            Fault::Denied | Fault::Banned | Fault::Unfederated => 403,
            Fault::UnknownTarget | Fault::NoService => 404,
            Fault::Misdirected => 421,
            Fault::Limit => 429,
            Fault::ConnectTimeout => 504,
            Fault::Loop => 508,
            _ => 503,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

impl std::error::Error for Fault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_is_unique_and_found_again() {
        for fault in Fault::ALL {
            assert_eq!(Fault::from_label(fault.label()), Some(*fault));
        }
    }

    #[test]
    fn every_exit_code_is_documented() {
        let page = include_str!("../../docs/enrolment.md");
        for fault in Fault::ALL {
            let row = format!("| {} | {fault} |", fault.exit_code());
            assert!(page.contains(&row), "missing `{row}` in docs/enrolment.md");
        }
    }
}
