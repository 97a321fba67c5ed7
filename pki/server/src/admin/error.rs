use tonic::{Code, Status};

use crate::commands::CommandError;
use crate::keys::KeyError;
use crate::pki::PkiError;
use crate::state_dir::StateError;
use crate::store::DbError;

/// Why a command was not carried out, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// It could be, at another time or after something else.
    #[error("{0}")]
    NotNow(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Invalid(String),
    /// The caller may not.
    #[error("{0}")]
    Forbidden(String),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Pki(#[from] PkiError),
}

impl From<StateError> for AdminError {
    fn from(error: StateError) -> AdminError {
        AdminError::Command(error.into())
    }
}

impl From<DbError> for AdminError {
    fn from(error: DbError) -> AdminError {
        AdminError::Command(error.into())
    }
}

impl From<KeyError> for AdminError {
    fn from(error: KeyError) -> AdminError {
        AdminError::Command(error.into())
    }
}

impl AdminError {
    /// The command itself is what is wrong with it, not the PKI.
    fn code(&self) -> Code {
        match self {
            AdminError::NotNow(_) => Code::FailedPrecondition,
            AdminError::NotFound(_) => Code::NotFound,
            AdminError::Invalid(_) => Code::InvalidArgument,
            AdminError::Forbidden(_) => Code::PermissionDenied,
            AdminError::Command(CommandError::State(_) | CommandError::Db(_) | CommandError::Key(_))
            | AdminError::Pki(_) => Code::Internal,
            AdminError::Command(_) => Code::InvalidArgument,
        }
    }
}

impl From<AdminError> for Status {
    fn from(error: AdminError) -> Status {
        Status::new(error.code(), error.to_string())
    }
}
