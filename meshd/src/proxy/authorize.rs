//! MAY THEY: whether a peer may reach a target. Pure; its result type proves the question was asked.

use meshd_identity::SpiffeId;

use crate::enrol::Delivery;
use crate::fault::Fault;
use crate::transport::tls::TlsState;

/// Proof that `check` let this delivery through; nothing is delivered without one.
#[derive(Debug)]
pub(super) struct Permit(());

/// What a host allows in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Policy {
    /// Everybody with a certificate of our trust domain (Linkerd's `all-authenticated`), or of another one that the PKI
    /// has federated with the identity called.
    #[default]
    AllAuthenticated,
}

/// The only input about the caller is its TLS identity: no header ever counts.
pub(super) fn check(policy: Policy, tls: &TlsState, caller: &SpiffeId, target: &Delivery) -> Result<Permit, Fault> {
    match policy {
        Policy::AllAuthenticated if !tls.deals(&target.owner.identity, caller.trust_domain()) => {
            Err(Fault::Unfederated)
        }
        Policy::AllAuthenticated => Ok(Permit(())),
    }
}
