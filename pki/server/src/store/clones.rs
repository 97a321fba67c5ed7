//! Hosts whose key two machines were seen to use.

use serde::{Deserialize, Serialize};

use super::hosts::{Host, HostState};
use super::{DbError, Records, View, list, put};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Alarm {
    #[serde(skip)]
    pub(crate) host: String,
    pub(crate) at: i64,
    pub(crate) remote: String,
}

impl Alarm {
    /// Until the host enrols anew, with a key only one machine has, or is banned.
    pub(crate) fn is_open(&self, hosts: &[Host]) -> bool {
        let host = hosts.iter().find(|host| host.id == self.host);
        host.is_some_and(|host| host.state == HostState::Active && host.enrolled_at <= self.at)
    }
}

pub(crate) fn put_alarm(records: &mut dyn Records, alarm: &Alarm) -> Result<(), DbError> {
    put(records, &format!("clone/{}", alarm.host), alarm)
}

pub(crate) fn alarms(view: &mut dyn View) -> Result<Vec<Alarm>, DbError> {
    let found: Vec<(String, Alarm)> = list(view, "clone/")?;
    Ok(found.into_iter().map(|(host, alarm)| Alarm { host, ..alarm }).collect())
}
