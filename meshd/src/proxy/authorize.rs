//! MAY THEY: whether a peer may reach a target. Pure; its result type proves the question was asked.

use meshd_identity::SpiffeId;

use crate::enrol::Delivery;
use crate::fault::Fault;

/// Proof that `check` let this delivery through; nothing is delivered without one.
#[derive(Debug)]
pub(super) struct Permit(());

/// What a host allows in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Policy {
    /// Everybody with a certificate of our trust domain (Linkerd's `all-authenticated`).
    #[default]
    AllAuthenticated,
}

/// The only input about the caller is its TLS identity: no header ever counts.
pub(super) fn check(policy: Policy, _caller: &SpiffeId, _target: &Delivery) -> Result<Permit, Fault> {
    match policy {
        Policy::AllAuthenticated => Ok(Permit(())),
    }
}
