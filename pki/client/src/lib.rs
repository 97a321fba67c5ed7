//! The host side of the PKI: joins once, keeps credentials on disk, renews them in the background.
//!
//! - [`join`]: a join token becomes credentials.
//! - [`Agent`]: last known good credentials from disk at once; renewal that can only ever improve them.
//! - [`operator`]: an operator's connection to the PKI.
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
pub mod operator;
mod reply;
mod schedule;
mod state;
mod store;
mod verify;

pub use agent::{Agent, Surroundings};
pub use credentials::{Credentials, Svid};
pub use join::{JoinError, join};
pub use judge::{Judgement, ServerJudge};
pub use metrics::RenewalMetrics;
pub use store::StoreError;

/// What a refusal says, made safe for a log line: it comes from a peer.
fn refusal_text(status: &tonic::Status) -> String {
    status.message().chars().take(500).flat_map(char::escape_debug).collect()
}
