//! The PKI of the mesh: enrols hosts, issues their certificates, rotates its own.
//!
//! - [`state_dir`]: the directory that is the PKI: database, wrapping key, audit log.
//! - [`authority`]: certificate profiles. [`lifetimes`]: how long everything lives.
//! - [`pki`]: the running PKI; [`enrol`] and [`issue`] are the two things it does for hosts.
//! - [`service`] and [`serve`]: gRPC and HTTP over one TLS port.

pub mod audit;
pub mod authority;
pub mod commands;
mod csr;
mod db;
pub mod enrol;
pub mod issue;
mod keys;
pub mod lifetimes;
pub mod metrics;
pub mod pki;
mod refused;
pub mod serve;
mod service;
mod signer;
pub mod state_dir;
pub mod status;
pub mod times;

pub use pki::{Options, Pki};
pub use refused::Refused;
