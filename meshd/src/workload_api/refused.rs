//! Why there is no answer, in the codes of the standard.

use tonic::Status;

/// SPIRE's words; clients compare them.
const NO_IDENTITY: &str = "no identity issued";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The header that keeps others from using the socket by accident is missing.
    NoHeader,
    /// Nobody, or nobody who may have one. The log says why, and what to do; the caller might be anybody.
    NoIdentity,
    /// Its certificate is still on its way, or has ended while the PKI is away.
    NotYet(String),
    /// Too much at once.
    Busy,
    /// The question itself.
    Invalid(String),
}

impl Refused {
    /// Whether an open stream waits until it is over.
    pub(super) fn may_pass(&self) -> bool {
        matches!(self, Refused::NotYet(_))
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Status {
        match refused {
            Refused::NoHeader => {
                Status::invalid_argument("the request has no metadata `workload.spiffe.io: true`; use a SPIFFE client")
            }
            Refused::NoIdentity => Status::permission_denied(NO_IDENTITY),
            Refused::NotYet(why) => Status::unavailable(why),
            Refused::Busy => Status::unavailable("this user holds too many streams of this socket; close some"),
            Refused::Invalid(why) => Status::invalid_argument(why),
        }
    }
}
