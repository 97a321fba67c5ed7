//! Which identities may use the Admin API, and for what.

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, get, list, put};

/// What a role may do includes what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// See everything.
    Read,
    /// The day's work: tokens, entries, evicting hosts.
    Operate,
    /// Everything.
    Admin,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Read => "read",
            Role::Operate => "operate",
            Role::Admin => "admin",
        }
    }

    pub(crate) fn parse(text: &str) -> Option<Role> {
        [Role::Read, Role::Operate, Role::Admin].into_iter().find(|role| role.name() == text)
    }
}

const PREFIX: &str = "role/";

fn key(spiffe_id: &str) -> String {
    format!("{PREFIX}{spiffe_id}")
}

pub(crate) fn all(view: &mut dyn View) -> Result<Vec<(String, Role)>, DbError> {
    list(view, PREFIX)
}

pub(crate) fn role(view: &mut dyn View, spiffe_id: &str) -> Result<Option<Role>, DbError> {
    get(view, &key(spiffe_id))
}

pub(crate) fn grant(records: &mut dyn Records, spiffe_id: &str, role: Role) -> Result<(), DbError> {
    put(records, &key(spiffe_id), &role)
}

/// Whether it had one.
pub(crate) fn revoke(records: &mut dyn Records, spiffe_id: &str) -> Result<bool, DbError> {
    records.delete(&key(spiffe_id))
}
