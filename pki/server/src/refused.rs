use tonic::{Code, Status};

use crate::authority::AuthorityError;
use crate::store::DbError;

/// Why a host's request was not served. The text goes to the host's operator and names the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The caller did not prove who it is.
    #[error("{0}")]
    Unauthenticated(String),
    /// The caller is known and may not.
    #[error("{0}")]
    Forbidden(String),
    /// The request makes no sense whoever sends it.
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    NotFound(String),
    /// The PKI cannot do it now; details are in its own log.
    #[error("{0}")]
    Unavailable(String),
}

impl Refused {
    /// A label for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Refused::Unauthenticated(_) => "unauthenticated",
            Refused::Forbidden(_) => "forbidden",
            Refused::Invalid(_) => "invalid",
            Refused::NotFound(_) => "not_found",
            Refused::Unavailable(_) => "unavailable",
        }
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Status {
        let code = match refused {
            Refused::Unauthenticated(_) => Code::Unauthenticated,
            Refused::Forbidden(_) => Code::PermissionDenied,
            Refused::Invalid(_) => Code::InvalidArgument,
            Refused::NotFound(_) => Code::NotFound,
            Refused::Unavailable(_) => Code::Unavailable,
        };
        Status::new(code, refused.to_string())
    }
}

impl From<DbError> for Refused {
    fn from(error: DbError) -> Refused {
        tracing::error!(%error, "the database failed");
        Refused::Unavailable("the PKI's database failed; see the log of meshd-pki".to_owned())
    }
}

impl From<AuthorityError> for Refused {
    fn from(error: AuthorityError) -> Refused {
        tracing::error!(%error, "signing failed");
        Refused::Unavailable("the PKI cannot sign now; see the log of meshd-pki".to_owned())
    }
}
