//! WHO opened the connection: its socket's owner as the kernel knows it, mapped to an enrolled workload.
//!
//! First thing after accept and before reading: a socket that closes meanwhile answers "uid 0". What has closed
//! already is looked for in what the kernel recorded when the connection was opened.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use meshd_identity::ProcessSelector;
use meshd_sys::sock_diag::{Lookup, SocketDiag};

use super::prove::Unguarded;
use crate::attest::Socket;
use crate::capture::{OwnerReader, RecordedOwner};
use crate::enrol::{self, CgroupUnits, Enrolment, Owner, PortWatch, UnitLookup, Workload};
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
struct Found {
    owner: Owner,
    /// None for one that is known from a record only.
    inode: Option<u32>,
}

/// Who opened a connection, as far as its socket tells.
pub(super) struct Identified {
    pub who: Arc<Workload>,
    /// What is still to be proved of the process.
    pub unguarded: Option<Unguarded>,
}

/// Why nobody was identified, with all an operator needs to enrol the caller.
#[derive(Debug)]
pub(super) struct Unidentified {
    pub fault: Fault,
    pub owner: Option<Owner>,
    /// What of the PKI's entry for its workload does not hold.
    pub unmet: Option<ProcessSelector>,
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
    ) -> Result<Identified, Unidentified> {
        let unidentified = |fault, owner, unmet| Unidentified { fault, owner, unmet };
        let Found { owner, inode } =
            self.owner(unknown, client, original).ok_or_else(|| unidentified(Fault::IdentifyUnknown, None, None))?;
        let Some(who) = owner.workload(enrolment, ports, Instant::now()) else {
            let is_ours = self.is_ours(owner.uid, owner.unit.as_ref());
            return Err(unidentified(if is_ours { Fault::Loop } else { Fault::Unenrolled }, Some(owner), None));
        };
        let Some(guard) = enrolment.guard(&who.identity) else { return Ok(Identified { who, unguarded: None }) };
        if let Some(unmet) = guard.unmet_by_owner(&owner).cloned() {
            return Err(unidentified(Fault::Unenrolled, Some(owner), Some(unmet)));
        }
        let unguarded = guard.needs_process().then(|| Unguarded {
            guard: guard.clone(),
            socket: inode.map(|inode| Socket { owner, inode, local: client, remote: original }),
        });
        Ok(Identified { who, unguarded })
    }

    /// Whether this daemon dialled it itself, say for a source configured by a name of the mesh.
    fn is_ours(&self, uid: u32, unit: Option<&Arc<str>>) -> bool {
        unit.is_some() && (uid, unit) == (self.own.0, self.own.1.as_ref())
    }

    /// Counts what it does not believe: a socket that is closing would answer "uid 0".
    fn owner(&self, unknown: &UnknownOwners, client: SocketAddr, original: SocketAddr) -> Option<Found> {
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
            let inode = Some(owner.inode);
            let owner = Owner { uid: owner.uid, unit, has_cgroup: owner.cgroup.is_some() };
            return Some(Found { owner, inode });
        }
        let recorded = self.recorded(client, original);
        match found {
            _ if recorded.is_some() => {}
            Lookup::Orphaned { state } => unknown.orphaned(state),
            _ => unknown.missing(),
        }
        recorded.map(|owner| Found { owner, inode: None })
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
