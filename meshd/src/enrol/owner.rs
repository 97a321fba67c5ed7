//! A process of this host as the kernel tells of it, and the workload it is: the same rules for captured connections and
//! for callers of the Workload API.

use std::sync::Arc;
use std::time::Instant;

use super::{Enrolment, PortWatch, Workload};

/// Whose a socket or a call is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub unit: Option<Arc<str>>,
    /// Whether the kernel told its cgroup, of a unit or not.
    pub has_cgroup: bool,
    pub uid: u32,
}

impl Owner {
    pub fn workload(&self, enrolment: &Enrolment, ports: &PortWatch, now: Instant) -> Option<Arc<Workload>> {
        let found = enrolment
            .workload_of(self.unit.as_ref(), self.uid)
            .or_else(|| ports.workload_of(enrolment, self.unit.as_ref(), (!self.has_cgroup).then_some(self.uid), now));
        found.cloned()
    }

    /// As `meshd enrol` takes it.
    pub fn selector(&self) -> String {
        self.unit.as_ref().map_or_else(|| format!("--uid {}", self.uid), ToString::to_string)
    }
}
