//! WHO opened the connection: its socket's owner as the kernel knows it, mapped to an enrolled workload.
//!
//! First thing after accept and before reading: a socket that closes meanwhile answers "uid 0".

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use meshd_sys::sock_diag::{Lookup, SocketDiag, SocketOwner};

use crate::enrol::{self, CgroupUnits, Enrolment, PortWatch, UnitLookup, Workload};
use crate::fault::Fault;
use crate::telemetry::UnknownOwners;

/// The worker's means of asking the kernel.
pub(super) struct Identifier {
    diag: RefCell<SocketDiag>,
    units: RefCell<CgroupUnits>,
    /// Whom our own sockets belong to.
    own: (u32, Option<Arc<str>>),
}

/// Why nobody was identified, with all an operator needs to enrol the caller.
#[derive(Debug)]
pub(super) struct Unidentified {
    pub fault: Fault,
    pub unit: Option<Arc<str>>,
    pub uid: Option<u32>,
}

impl Identifier {
    pub(super) fn open() -> std::io::Result<Identifier> {
        Ok(Identifier {
            diag: RefCell::new(SocketDiag::open()?),
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
        let owner = self.owner(unknown, client, original).ok_or(Unidentified {
            fault: Fault::IdentifyUnknown,
            unit: None,
            uid: None,
        })?;
        let unit = self.unit_of(owner);
        let found = enrolment.workload_of(unit.as_ref(), owner.uid);
        let found = found.or_else(|| ports.workload_of(enrolment, unit.as_ref(), owner.uid, Instant::now()));
        if let Some(who) = found {
            return Ok(who.clone());
        }
        let fault = if self.is_ours(owner.uid, unit.as_ref()) { Fault::Loop } else { Fault::Unenrolled };
        Err(Unidentified { fault, unit, uid: Some(owner.uid) })
    }

    /// Whether this daemon dialled it itself, say for a source configured by a name of the mesh.
    fn is_ours(&self, uid: u32, unit: Option<&Arc<str>>) -> bool {
        unit.is_some() && (uid, unit) == (self.own.0, self.own.1.as_ref())
    }

    /// Counts what it does not believe: a socket that is closing would answer "uid 0".
    fn owner(&self, unknown: &UnknownOwners, client: SocketAddr, original: SocketAddr) -> Option<SocketOwner> {
        match self.diag.borrow_mut().owner(client, original) {
            Ok(Lookup::Owned(owner)) => return Some(owner),
            Ok(Lookup::Orphaned { state }) => unknown.orphaned(state),
            Ok(Lookup::Missing) => unknown.missing(),
            Err(error) => {
                unknown.no_answer();
                tracing::warn!(%client, %error, "the kernel does not answer who opened a connection");
            }
        }
        None
    }

    fn unit_of(&self, owner: SocketOwner) -> Option<Arc<str>> {
        match self.units.borrow_mut().unit_of(owner.cgroup?) {
            UnitLookup::Unit(unit) => Some(unit),
            UnitLookup::Unknown => None,
        }
    }
}
