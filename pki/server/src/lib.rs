//! The PKI of the mesh: enrols hosts, issues their certificates, rotates its own.
//!
//! - [`state_dir`]: the directory that is the PKI: database, wrapping key, audit log.
//! - [`authority`]: certificate profiles. [`lifetimes`]: how long everything lives.
//! - `store`: what is remembered, in records. `rotation`: roots and JWT keys come and go.
//! - [`pki`]: the running PKI. For hosts it does [`enrol`], [`issue`], `attest`, `jwt`, `transitions` and `sync`.
//! - [`clock`] and `start`: whether its clock may be believed.
//! - [`admin`]: what operators do. [`adoption`]: hosts of a PKI that was lost come back to the one in its place.
//! - `istio`: certificates for proxies of Istio.
//! - [`service`] and [`serve`]: gRPC and HTTP over one TLS port.

pub mod admin;
pub mod adoption;
mod attest;
mod attestors;
pub mod audit;
pub mod authority;
pub mod clock;
pub mod commands;
mod csr;
mod deny;
pub mod enrol;
pub mod entries;
mod failpoint;
pub mod federation;
mod files;
mod handshakes;
mod health;
mod instances;
pub mod issue;
mod istio;
mod join_token;
mod jwt;
pub mod keeping;
mod keys;
pub mod labels;
pub mod lifetimes;
pub mod metrics;
pub mod pki;
pub mod recovery;
mod refused;
pub mod rehearsal;
pub mod replicas;
mod rotation;
pub mod serve;
mod service;
mod signer;
mod start;
pub mod state_dir;
pub mod status;
pub mod store;
mod sync;
pub mod times;
mod transitions;
pub mod upstream;

pub use pki::{Options, Pki};
pub use refused::Refused;
