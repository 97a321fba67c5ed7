//! What each server of the PKI last said of itself: `status` reads it, also when the server is gone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{DbError, Records, View, list, put};
use crate::lifetimes::Lifetimes;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Server {
    #[serde(skip)]
    pub(crate) replica: String,
    pub(crate) at: i64,
    pub(crate) lifetimes: Lifetimes,
    pub(crate) certificates: Vec<ServerCertificate>,
    /// Why it issues nothing, or rotates nothing, by its clock now.
    pub(crate) distrust: Option<String>,
    /// Nobody has vouched for its clock since it started.
    #[serde(default)]
    pub(crate) is_clock_unconfirmed: bool,
    /// Since it started, by result.
    pub(crate) renewals: BTreeMap<String, u64>,
}

/// What it shows on one of its ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServerCertificate {
    pub(crate) kind: String,
    pub(crate) serial: String,
    pub(crate) not_after: i64,
}

pub(crate) const PREFIX: &str = "server/";

pub(crate) fn put_server(records: &mut dyn Records, server: &Server) -> Result<(), DbError> {
    put(records, &format!("{PREFIX}{}", server.replica), server)
}

/// It will not come back.
pub(crate) fn forget(records: &mut dyn Records, replica: &str) -> Result<(), DbError> {
    records.delete(&format!("{PREFIX}{replica}")).map(drop)
}

pub(crate) fn servers(view: &mut dyn View) -> Result<Vec<Server>, DbError> {
    let found: Vec<(String, Server)> = list(view, PREFIX)?;
    Ok(found.into_iter().map(|(replica, server)| Server { replica, ..server }).collect())
}
