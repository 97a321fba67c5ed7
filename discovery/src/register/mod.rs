//! What this host serves, written where other hosts look for it, and kept there for as long as the host lives.
//!
//! ```text
//!   Absent --> Registering --> Held --> Draining --> Gone
//!                 ^    |        |
//!                 |    v        |  the lease ended
//!                 | Superseded  |
//!                 +-------------+
//! ```
//! Each registration is a task of its own (`live.rs`), what it does next is decided without I/O (`life.rs`). A backend
//! is a [`Registrar`]; nothing of this touches traffic.

mod all;
pub(crate) mod etcd;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod host;
mod life;
mod live;
mod offer;
mod way;

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::time::Duration;

pub use all::{RegistrationHealth, Registrations};
pub use host::HostConfig;
pub use life::Phase;
#[cfg(test)]
pub(crate) use offer::tests::offer as offer_for_tests;
pub use offer::{Key, Offer};
pub(crate) use way::address_towards;

use crate::Registration;

/// A host that died is gone after it, and a second that backends take to notice. Kept every third of it, so that one lost
/// answer (4 s) costs nothing.
pub(crate) const TTL: Duration = Duration::from_secs(9);

/// Why a backend did not do what it was asked for, in full for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RegistrarError(pub String);

pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, RegistrarError>> + Send + 'a>>;

/// A backend that registrations are written to. It carries out single steps, each bounded in time and safe to be asked
/// twice; when they are taken is not its concern. The simplest one is `fake::Store`.
pub trait Registrar: Send + Sync {
    /// Of the source it belongs to.
    fn name(&self) -> &str;

    /// How long the backend keeps a registration that it does not hear of.
    fn ttl(&self) -> Duration {
        TTL
    }

    /// The address this host has on the way to the backend.
    fn address_here(&self) -> Answer<'_, IpAddr>;

    /// What is registered now, by whomever.
    fn find<'a>(&'a self, key: &'a Key) -> Answer<'a, Option<Found>>;

    /// Only if the backend still has what `over` says; `None` if it has something else.
    fn write<'a>(&'a self, key: &'a Key, said: &'a Registration, over: Over) -> Answer<'a, Option<Hold>>;

    /// For another `ttl`. False if what was written is not there any more, or is another's.
    fn keep<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, bool>;

    /// Takes it away unless it is another's by now.
    fn withdraw<'a>(&'a self, key: &'a Key, hold: Hold) -> Answer<'a, ()>;
}

/// What a backend has of a registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The highest of all lives that left something, also of those that ended.
    pub epoch: u64,
    /// Changes with every write.
    pub version: u64,
    /// The latest life that may still go on.
    pub owner: Option<Owner>,
}

/// A life that wrote a registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    pub epoch: u64,
    /// It is the later one also of whoever asks with the same epoch.
    pub wins_ties: bool,
    /// For messages.
    pub address: String,
}

impl Found {
    /// Where a backend has one life at a time, so that an epoch of one's own is one's own.
    pub(crate) fn only(epoch: u64, version: u64, address: String) -> Found {
        Found { epoch, version, owner: Some(Owner { epoch, wins_ties: false, address }) }
    }

    pub(crate) fn is_later_than(&self, epoch: u64) -> bool {
        self.later_than(epoch).is_some()
    }

    pub(crate) fn later_than(&self, epoch: u64) -> Option<&Owner> {
        self.owner.as_ref().filter(|owner| owner.epoch > epoch || (owner.epoch == epoch && owner.wins_ties))
    }
}

/// What a write replaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// Whatever was found at this version, or nothing (0); under a lease of its own.
    Version(u64),
    /// Our own, whose lease goes on.
    Own(Hold),
}

/// Proof of having written what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// 0 where the backend has none.
    pub lease: i64,
    pub version: u64,
}
