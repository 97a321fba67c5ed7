//! The words of `enrol.d/*.toml`: what an operator writes, and what `meshd enrol` writes for them.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{ClientAddress, Mode, Selector, SelectorError};

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EnrolFile {
    #[serde(default, rename = "workload")]
    pub(super) workloads: Vec<Spanned<WorkloadEntry>>,
}

/// `[[workload]]`: these processes are that workload.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadEntry {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// With `port`: also when somebody's login session listens there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub user_sessions: bool,
    pub namespace: String,
    pub name: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub serve: Vec<Spanned<ServeEntry>>,
}

/// `[[workload.serve]]`: what it serves to the mesh.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServeEntry {
    pub service: String,
    pub port: u16,
    /// Where the application listens; a workload known by its port has that port on loopback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deliver: Option<SocketAddr>,
    #[serde(default)]
    pub mode: Mode,
    #[serde(default, skip_serializing_if = "ClientAddress::is_none")]
    pub client_address: ClientAddress,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub local_ok: Vec<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub plaintext_from: Vec<IpNet>,
    /// False: it is not registered, where this host registers at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub publish: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check: Option<CheckEntry>,
}

/// `check` of a `[[workload.serve]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CheckEntry {
    /// A path that answers with 2xx or 3xx while it is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// It accepts a connection while it is well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tcp: bool,
    /// A program and its arguments, which exits with 0 while it is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec: Option<Vec<String>>,
    /// Of `exec`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
    /// As whom `exec` runs, where meshd may become another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every_s: Option<u64>,
}

/// Which field is wrong, and why.
pub(super) type FieldError = (&'static str, String);

impl WorkloadEntry {
    pub(super) fn selector(&self) -> Result<Selector, FieldError> {
        let in_field = |field| move |error: SelectorError| (field, error.to_string());
        let WorkloadEntry { unit, uid, port, user_sessions, name, .. } = self;
        if *user_sessions && port.is_none() {
            return Err(("workload.user_sessions", "says something about `port` only; remove it".to_owned()));
        }
        match (unit, uid, port) {
            (Some(unit), None, None) => Selector::unit(unit).map_err(in_field("workload.unit")),
            (None, Some(uid), None) => Ok(Selector::Uid(*uid)),
            (None, None, Some(port)) => Selector::port(*port).map_err(in_field("workload.port")),
            _ => Err(("workload", format!("{name}: give either `unit`, `uid` or `port`"))),
        }
    }

    /// An entry that means `selector`, and says nothing else yet.
    pub fn of(selector: &Selector) -> WorkloadEntry {
        let mut entry = WorkloadEntry::default();
        match selector {
            Selector::Unit(unit) => entry.unit = Some(unit.to_string()),
            Selector::Scope(pattern) => entry.unit = Some(pattern.to_string()),
            Selector::Uid(uid) => entry.uid = Some(*uid),
            Selector::Port(port) => entry.port = Some(*port),
        }
        entry
    }
}
