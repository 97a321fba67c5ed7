//! That the process behind a captured connection is all that the PKI's entry asks for, where that is more than its unit
//! and user: group, program, content of the program.

use std::sync::Arc;

use super::env::Env;
use crate::attest::{Socket, Unproven};
use crate::enrol::{Guard, Workload};
use crate::fault::Fault;

/// What is to be proved of a connection before anything of it is carried.
pub(super) struct Unguarded {
    pub(super) guard: Arc<Guard>,
    /// None: it was closed before meshd could look.
    pub(super) socket: Option<Socket>,
}

pub(super) async fn process(env: &Env, who: &Workload, unguarded: Unguarded) -> Result<(), Fault> {
    let Unguarded { guard, socket } = unguarded;
    let proved = match socket {
        Some(socket) => env.shared.attestor.prove(&who.identity, &socket, &guard).await,
        None => Err(Unproven::NoHolder),
    };
    proved.map_err(|why| {
        if env.may_log(&who.unit) {
            tracing::warn!(unit = %who.unit, identity = %who.identity, "refused a connection: {why}");
        }
        match why {
            Unproven::Unmet(_) => Fault::Unenrolled,
            Unproven::NoHolder | Unproven::TooMany(_) | Unproven::NoAnswer(_) | Unproven::TooSlow(_) => {
                Fault::IdentifyUnknown
            }
        }
    })
}
