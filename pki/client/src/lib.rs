//! The host side of the PKI: joins once, keeps credentials on disk, renews them in the background.
//!
//! - [`join`]: a join token becomes credentials; [`join_by`]: so does another [`Proof`].
//! - [`Agent`]: last known good credentials from disk at once; renewal that can only ever improve them.
//! - [`Tokens`]: JWT-SVIDs, asked for when they are needed.
//! - `fake` (feature `testing`): an authority in memory.
//!
//! Inside: `schedule` decides when (pure), `connect` and `verify` reach the PKI, `reply` judges what it sent,
//! `state` and `store` are the disk.

mod agent;
mod connect;
mod credentials;
#[cfg(feature = "testing")]
pub mod fake;
mod inventory;
mod join;
mod judge;
mod key;
mod metrics;
mod proof;
mod reply;
mod schedule;
mod state;
mod store;
mod tokens;
mod verify;

pub use agent::{Agent, Surroundings};
pub use credentials::{Credentials, Svid};
pub use join::{JoinError, join, join_by};
pub use judge::{Judgement, ServerJudge};
pub use metrics::RenewalMetrics;
pub use proof::{MachineCertificate, Proof, ProofError};
pub use store::StoreError;
pub use tokens::{TokenIssueError, Tokens};

/// What a refusal says, made safe for a log line: it comes from a peer.
fn refusal_text(status: &tonic::Status) -> String {
    status.message().chars().take(500).flat_map(char::escape_debug).collect()
}
