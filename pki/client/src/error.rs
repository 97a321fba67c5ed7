//! Why a try to renew changed nothing.

use meshd_identity::signed::SignedError;

use crate::connect::{ConnectError, Unusable};
use crate::reply::ReplyError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewError {
    #[error("no PKI server could be used: {0}")]
    Unreachable(String),
    /// What answers does not prove to be the PKI by the bundle held here.
    #[error("no PKI server could be used: {0}")]
    Distrusted(String),
    /// The PKI is who it should be, and does not take this host for what it says it is.
    #[error("the PKI does not know this host by its certificate: {0}")]
    Unknown(String),
    #[error("the PKI refused: {0}")]
    Refused(String),
    #[error(transparent)]
    Reply(#[from] ReplyError),
    #[error(
        "new certificates are due for renewal on arrival: this clock is {0} s ahead of the PKI's; check NTP on both"
    )]
    Clock(i64),
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
    #[error("cannot sign with this host's key: {0}")]
    Sign(#[from] SignedError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{connect}; {doubts}")]
    NoWay { connect: ConnectError, doubts: String },
}

impl From<Unusable> for RenewError {
    fn from(unusable: Unusable) -> RenewError {
        match unusable.is_distrusted {
            true => RenewError::Distrusted(unusable.reasons),
            false => RenewError::Unreachable(unusable.reasons),
        }
    }
}
