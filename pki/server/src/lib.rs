//! The PKI of the mesh: enrols hosts, issues their certificates, rotates its own.
//!
//! - [`state_dir`]: the directory that is the PKI: database, wrapping key, audit log.
//! - [`authority`]: certificate profiles. [`lifetimes`]: how long everything lives.
//! - `store`: what is remembered, in records. `rotation`: roots and JWT keys come and go.
//! - [`pki`]: the running PKI; [`enrol`] and [`issue`] are the two things it does for hosts.
//! - [`service`] and [`serve`]: gRPC and HTTP over one TLS port.

mod attest;
pub mod audit;
pub mod authority;
mod clock;
pub mod commands;
mod csr;
mod deny;
pub mod enrol;
mod failpoint;
mod instances;
pub mod issue;
mod jwt;
mod keys;
pub mod lifetimes;
pub mod metrics;
pub mod pki;
mod refused;
mod rotation;
pub mod serve;
mod service;
mod signer;
pub mod state_dir;
pub mod status;
mod store;
mod sync;
pub mod times;
mod transitions;

pub use pki::{Options, Pki};
pub use refused::Refused;
