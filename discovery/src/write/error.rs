use super::{ResourceName, Stored};

/// Why a backend did not do what it was asked for: what, where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// These credentials may not.
    #[error("denied: {0}")]
    Denied(String),
    /// Somebody else wrote meanwhile, or it belongs to somebody else.
    #[error("conflict: {0}")]
    Conflict(String),
    /// It, or what it would lie in, is not there.
    #[error("not there: {0}")]
    Absent(String),
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The backend does not take it.
    #[error("refused: {0}")]
    Refused(String),
}

impl StoreError {
    /// Something else is there than what the change is based on.
    pub(crate) fn changed(resource: &ResourceName, now: Option<&Stored>) -> StoreError {
        let Some(now) = now else {
            return StoreError::Conflict(format!("{resource} was deleted meanwhile; `--force` writes it again"));
        };
        let by = now.by.as_ref().map_or(String::new(), |by| format!(" by {by}"));
        StoreError::Conflict(format!(
            "{resource} was changed meanwhile{by} ({}, now at {}); `meshd get` it again and make your change there, or \
             write over it with `--force`",
            now.origin, now.version
        ))
    }

    pub(crate) fn absent(resource: &ResourceName, source: &str) -> StoreError {
        let kind = resource.kind.plural();
        StoreError::Absent(format!("source {source} has no {resource}; `meshd get {kind}` lists what there is"))
    }
}
