//! Who the units of this host are: `enrol.d/*.toml` claims identities for units, uids or listening ports and
//! lists what they serve. The PKI must permit each claim too; both are needed. docs/enrolment.md is for operators.

mod cgroups;
mod cli_file;
mod entry;
mod files;
mod guard;
mod owner;
mod port_memory;
mod ports;
mod publish;
mod selector;
mod sight;
mod walk_budget;
mod withheld;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use meshd_discovery::ServiceName;
use meshd_identity::SpiffeId;

pub(crate) use cgroups::cgroup2_mount;
pub use cgroups::{Cgroup, CgroupUnits, UnitLookup, find_cgroups, own_unit, unit_of_process};
pub use cli_file::{CliFile, CliFileError};
pub use entry::{CheckEntry, ServeEntry, WorkloadEntry};
pub use files::{EnrolError, Origin, Reserved, load, load_as_if};
pub use guard::{Guard, ProcessFacts, ProgramFacts};
pub use owner::Owner;
pub use port_memory::PortMemory;
pub use ports::{Ownership, PortOwner, PortOwners, PortWatch, find_port_owners};
pub use publish::{Ask, Check, Program, Published};
pub use selector::{ScopePattern, Selector, SelectorError};
pub use sight::Sight;
pub use withheld::Withheld;

/// One enrolled workload of this host.
#[derive(Debug, PartialEq, Eq)]
pub struct Workload {
    pub identity: SpiffeId,
    /// What operators see in metrics and logs: the selector's name.
    pub unit: Arc<str>,
    pub selector: Selector,
    /// Whether a login session may hold its port.
    pub user_sessions: bool,
    pub origin: Origin,
}

/// A row of the inbound delivery table: this host serves (service, port) at a local address.
#[derive(Debug, PartialEq, Eq)]
pub struct Delivery {
    pub service: ServiceName,
    pub port: u16,
    pub owner: Arc<Workload>,
    pub deliver: SocketAddr,
    pub mode: Mode,
    /// Whether, and how, the application learns who calls.
    pub client_address: ClientAddress,
    /// Uids besides the owner's that may call a strict port in clear.
    pub local_ok: Vec<u32>,
    /// Networks that may call a strict port in clear.
    pub plaintext_from: Vec<IpNet>,
    /// What is registered of it; None: nothing.
    pub published: Option<Published>,
    /// File and line, for whoever must change it.
    pub origin: Origin,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Plaintext callers of the port are refused in the kernel.
    Strict,
    #[default]
    Permissive,
}

impl Mode {
    pub fn label(self) -> &'static str {
        match self {
            Mode::Strict => "strict",
            Mode::Permissive => "permissive",
        }
    }
}

/// How the application learns the address of the host that calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientAddress {
    /// Not at all: it sees a connection from this host.
    #[default]
    None,
    /// By a PROXY protocol header of version 2 before the first byte, with the caller's SPIFFE ID in a TLV.
    ProxyV2,
    /// As the address the connection comes from.
    Transparent,
}

impl ClientAddress {
    fn is_none(&self) -> bool {
        *self == ClientAddress::None
    }
}

/// All enrolment of this host; replaced whole when the files change.
#[derive(Clone, Debug, Default)]
pub struct Enrolment {
    workloads: Vec<Arc<Workload>>,
    units: HashMap<Arc<str>, Arc<Workload>>,
    /// The closest pattern first.
    scopes: Vec<(ScopePattern, Arc<Workload>)>,
    uids: HashMap<u32, Arc<Workload>>,
    by_port: HashMap<u16, Arc<Workload>>,
    deliveries: Vec<Arc<Delivery>>,
    by_target: HashMap<(ServiceName, u16), Arc<Delivery>>,
    /// What the PKI asks of the processes of an identity beyond what it is claimed by.
    guards: BTreeMap<SpiffeId, Arc<Guard>>,
    /// Claimed here, and given by the PKI to other processes.
    withheld: Vec<Withheld>,
    /// What those serve: nobody reaches it through the mesh, and strict ports of it stay closed.
    withheld_deliveries: Vec<Arc<Delivery>>,
}

impl Enrolment {
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    pub fn deliveries(&self) -> &[Arc<Delivery>] {
        &self.deliveries
    }

    /// Everything enrol.d says is served here, agreed on or not.
    pub fn claimed_deliveries(&self) -> impl Iterator<Item = &Arc<Delivery>> {
        self.deliveries.iter().chain(&self.withheld_deliveries)
    }

    pub fn identities(&self) -> BTreeSet<SpiffeId> {
        let claimed = self.workloads.iter().map(|workload| &workload.identity);
        // Those withheld, too: the PKI tells with each answer whose they are.
        claimed.chain(self.withheld.iter().map(|withheld| &withheld.identity)).cloned().collect()
    }

    /// What else must hold for a process of this workload to be it.
    pub fn guard(&self, identity: &SpiffeId) -> Option<&Arc<Guard>> {
        self.guards.get(identity)
    }

    /// Claims that the PKI's entries do not agree with, and why.
    pub fn withheld(&self) -> &[Withheld] {
        &self.withheld
    }

    /// The workload of a process: its unit decides; its uid only where no unit is enrolled for it.
    pub fn workload_of(&self, unit: Option<&Arc<str>>, uid: u32) -> Option<&Arc<Workload>> {
        unit.and_then(|unit| self.workload_of_unit(unit)).or_else(|| self.uids.get(&uid))
    }

    /// The workload a unit of this name is, by its name or a pattern.
    pub fn workload_of_unit(&self, unit: &str) -> Option<&Arc<Workload>> {
        self.units.get(unit).or_else(|| {
            // On the path of every connection: only scopes have patterns.
            let patterns = if unit.ends_with(".scope") { &self.scopes[..] } else { &[] };
            patterns.iter().find(|(pattern, _)| pattern.matches(unit)).map(|(_, workload)| workload)
        })
    }

    fn workload_of_port(&self, port: u16) -> Option<&Arc<Workload>> {
        self.by_port.get(&port)
    }

    /// The workload enrolled by exactly this selector.
    pub fn enrolled_by(&self, selector: &Selector) -> Option<&Arc<Workload>> {
        self.workloads.iter().find(|workload| workload.selector == *selector)
    }

    /// Adds a workload, unless its selector has one already, which is returned.
    fn insert(&mut self, workload: Arc<Workload>) -> Option<Arc<Workload>> {
        if let Some(first) = self.enrolled_by(&workload.selector) {
            return Some(first.clone());
        }
        let known = workload.clone();
        match &workload.selector {
            Selector::Unit(unit) => drop(self.units.insert(unit.clone(), known)),
            Selector::Scope(pattern) => self.scopes.push((pattern.clone(), known)),
            Selector::Uid(uid) => drop(self.uids.insert(*uid, known)),
            Selector::Port(port) => drop(self.by_port.insert(*port, known)),
        }
        self.workloads.push(workload);
        None
    }

    fn order_scopes(&mut self) {
        self.scopes.sort_by_key(|(pattern, _)| Reverse(pattern.literal()));
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
