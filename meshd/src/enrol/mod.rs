//! Who the units of this host are: `enrol.d/*.toml` claims identities for units or uids and lists
//! what they serve. The PKI must permit each claim too; both are needed.

mod cgroups;
mod files;

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use meshd_discovery::ServiceName;
use meshd_identity::SpiffeId;

pub use cgroups::{Cgroup, CgroupUnits, UnitLookup, find_cgroups};
pub use files::{EnrolError, load};

/// One enrolled workload of this host.
#[derive(Debug, PartialEq, Eq)]
pub struct Workload {
    pub identity: SpiffeId,
    /// What operators see in metrics and logs: the unit's name, or `uid:1001`.
    pub unit: Arc<str>,
    pub selector: Selector,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    Unit(Arc<str>),
    Uid(u32),
}

/// A row of the inbound delivery table: this host serves (service, port) at a local address.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivery {
    pub service: ServiceName,
    pub port: u16,
    pub owner: Arc<Workload>,
    pub deliver: SocketAddr,
    pub mode: Mode,
    /// Uids besides the owner's that may call a strict port in clear.
    pub local_ok: Vec<u32>,
    /// Networks that may call a strict port in clear.
    pub plaintext_from: Vec<IpNet>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Plaintext callers of the port are refused in the kernel.
    Strict,
    #[default]
    Permissive,
}

/// All enrolment of this host; replaced whole when the files change.
#[derive(Debug, Default)]
pub struct Enrolment {
    workloads: Vec<Arc<Workload>>,
    by_selector: HashMap<Selector, Arc<Workload>>,
    deliveries: Vec<Arc<Delivery>>,
    by_target: HashMap<(ServiceName, u16), Arc<Delivery>>,
}

impl Enrolment {
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    pub fn deliveries(&self) -> &[Arc<Delivery>] {
        &self.deliveries
    }

    pub fn identities(&self) -> BTreeSet<SpiffeId> {
        self.workloads.iter().map(|workload| workload.identity.clone()).collect()
    }

    /// The workload of a process: its unit decides; its uid only where no unit is enrolled for it.
    pub fn workload_of(&self, unit: Option<&Arc<str>>, uid: u32) -> Option<&Arc<Workload>> {
        unit.and_then(|unit| self.by_selector.get(&Selector::Unit(unit.clone())))
            .or_else(|| self.by_selector.get(&Selector::Uid(uid)))
    }

    /// The row for a target asked for by a peer.
    pub fn delivery(&self, service: &ServiceName, port: u16) -> Option<&Arc<Delivery>> {
        self.by_target.get(&(service.clone(), port))
    }

    /// The rows a plain HBONE peer can mean by `ip:port`: it names the port the application listens on.
    pub fn delivery_at(&self, port: u16) -> Option<&Arc<Delivery>> {
        self.deliveries.iter().find(|delivery| delivery.deliver.port() == port)
    }
}
