//! WHO opened the connection: its socket's owner as the kernel knows it, mapped to an enrolled workload.
//!
//! First thing after accept and before reading: a socket that closes meanwhile answers "uid 0". What has closed
//! already is looked for in what the kernel recorded when the connection was opened.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use meshd_sys::sock_diag::{Lookup, SocketDiag};

use crate::capture::{OwnerReader, RecordedOwner};
use crate::enrol::{self, CgroupUnits, Enrolment, PortWatch, UnitLookup, Workload};
use crate::fault::Fault;
use crate::telemetry::UnknownOwners;

/// The worker's means of asking the kernel.
pub(super) struct Identifier {
    diag: RefCell<SocketDiag>,
    recorded: Option<RefCell<OwnerReader>>,
    units: RefCell<CgroupUnits>,
    /// Whom our own sockets belong to.
    own: (u32, Option<Arc<str>>),
}

/// Who a socket belongs to, or belonged to when it was opened.
struct Owner {
    uid: u32,
    unit: Option<Arc<str>>,
    /// Whether the kernel told its cgroup, of a unit or not.
    has_cgroup: bool,
}

/// Why nobody was identified, with all an operator needs to enrol the caller.
#[derive(Debug)]
pub(super) struct Unidentified {
    pub fault: Fault,
    pub unit: Option<Arc<str>>,
    pub uid: Option<u32>,
}

impl Identifier {
    pub(super) fn open(recorded: Option<OwnerReader>) -> std::io::Result<Identifier> {
        Ok(Identifier {
            diag: RefCell::new(SocketDiag::open()?),
            recorded: recorded.map(RefCell::new),
            units: RefCell::new(CgroupUnits::discover()),
            own: (nix::unistd::getuid().as_raw(), enrol::own_unit()),
        })
    }

    /// The workload whose socket is bound to `client` and connected to `original`.
    pub(super) fn local(
        &self,
        enrolment: &Enrolment,
        ports: &PortWatch,
        unknown: &UnknownOwners,
        client: SocketAddr,
        original: SocketAddr,
    ) -> Result<Arc<Workload>, Unidentified> {
        let Owner { uid, unit, has_cgroup } = self.owner(unknown, client, original).ok_or(Unidentified {
            fault: Fault::IdentifyUnknown,
            unit: None,
            uid: None,
        })?;
        let found = enrolment.workload_of(unit.as_ref(), uid);
        let found =
            found.or_else(|| ports.workload_of(enrolment, unit.as_ref(), (!has_cgroup).then_some(uid), Instant::now()));
        if let Some(who) = found {
            return Ok(who.clone());
        }
        let fault = if self.is_ours(uid, unit.as_ref()) { Fault::Loop } else { Fault::Unenrolled };
        Err(Unidentified { fault, unit, uid: Some(uid) })
    }

    /// Whether this daemon dialled it itself, say for a source configured by a name of the mesh.
    fn is_ours(&self, uid: u32, unit: Option<&Arc<str>>) -> bool {
        unit.is_some() && (uid, unit) == (self.own.0, self.own.1.as_ref())
    }

    /// Counts what it does not believe: a socket that is closing would answer "uid 0".
    fn owner(&self, unknown: &UnknownOwners, client: SocketAddr, original: SocketAddr) -> Option<Owner> {
        let found = match self.diag.borrow_mut().owner(client, original) {
            Ok(found) => found,
            Err(error) => {
                unknown.no_answer();
                tracing::warn!(%client, %error, "the kernel does not answer who opened a connection");
                return None;
            }
        };
        if let Lookup::Owned(owner) = found {
            let unit = match owner.cgroup.map(|cgroup| self.units.borrow_mut().unit_of(cgroup)) {
                Some(UnitLookup::Unit(unit)) => Some(unit),
                Some(UnitLookup::Unknown) | None => None,
                Some(UnitLookup::NotLookedFor) => {
                    // Its user is no answer: the cgroup may be a unit's that is another workload.
                    unknown.not_looked_for();
                    return None;
                }
            };
            return Some(Owner { uid: owner.uid, unit, has_cgroup: owner.cgroup.is_some() });
        }
        let recorded = self.recorded(client, original);
        match found {
            _ if recorded.is_some() => {}
            Lookup::Orphaned { state } => unknown.orphaned(state),
            _ => unknown.missing(),
        }
        recorded
    }

    /// A cgroup below no unit we know may have been an enrolled unit's that has ended: its user alone is no answer.
    fn recorded(&self, client: SocketAddr, original: SocketAddr) -> Option<Owner> {
        let RecordedOwner { uid, cgroup } = match self.recorded.as_ref()?.borrow_mut().owner(client, original) {
            Ok(recorded) => recorded?,
            Err(error) => {
                tracing::warn!(%client, %error, "the kernel does not answer who it recorded as a connection's owner");
                return None;
            }
        };
        let Some(cgroup) = cgroup else { return Some(Owner { uid, unit: None, has_cgroup: false }) };
        match self.units.borrow_mut().unit_of(cgroup) {
            UnitLookup::Unit(unit) => Some(Owner { uid, unit: Some(unit), has_cgroup: true }),
            UnitLookup::Unknown | UnitLookup::NotLookedFor => None,
        }
    }
}
