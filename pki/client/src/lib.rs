//! The host side of the PKI: joins once, keeps credentials on disk, renews them in the background.
//!
//! - [`join`]: a join token becomes credentials; [`join_by`]: so does another [`Proof`].
//! - [`Agent`]: last known good credentials from disk at once; renewal that can only ever improve them; a conversation
//!   with the PKI that brings bundles and deny sets the moment they change.
//! - [`operator`]: an operator's connection to the PKI.
//! - [`Tokens`]: JWT-SVIDs, asked for when they are needed.
//! - `fake` (feature `testing`): an authority in memory.
//!
//! Inside: `schedule` decides when (pure), `connect` and `verify` reach the PKI, `reply` judges what it sent,
//! `line` is the connection that all share, `link` the conversation over it, `deny` whom to refuse, `federation` whose bundles to
//! believe beside our own,
//! `come_back` readmits a host that was away, by `transitions` and `recovery` (what may be believed then),
//! `state` and `store` are the disk.

mod agent;
mod ban;
mod come_back;
mod connect;
mod credentials;
mod deny;
mod error;
#[cfg(feature = "testing")]
pub mod fake;
mod federation;
mod inventory;
mod join;
mod judge;
mod key;
mod line;
mod link;
mod metrics;
pub mod operator;
mod proof;
mod recovery;
mod reply;
mod schedule;
mod state;
mod store;
mod surroundings;
mod tokens;
mod transitions;
mod verify;

pub use agent::Agent;
pub use credentials::{Credentials, Svid};
pub use federation::{Federated, Federation, Freshness};
pub use join::{JoinError, join, join_by, join_in};
pub use judge::{Judgement, ServerJudge};
pub use line::Line;
pub use metrics::RenewalMetrics;
pub use proof::{MachineCertificate, Proof, ProofError};
pub use store::StoreError;
pub use surroundings::{BootTime, Clock, Surroundings};
pub use tokens::{TokenIssueError, Tokens};

/// What a refusal says, made safe for a log line: it comes from a peer.
fn refusal_text(status: &tonic::Status) -> String {
    status.message().chars().take(500).flat_map(char::escape_debug).collect()
}
