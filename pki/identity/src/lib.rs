//! Identity types of the mesh. Pure: no files, no sockets, no clock.
//!
//! - [`TrustDomain`] and [`SpiffeId`]: who somebody is, always `spiffe://<trust domain>/ns/<namespace>/sa/<name>`.
//! - [`inspect_svid`]: what a leaf certificate claims, and whether it may claim it.
//! - [`Bundle`]: the roots of one trust domain, as a SPIFFE bundle (JWKS).
//! - [`JoinToken`]: what an operator carries to a new host.

mod bundle;
mod spiffe_id;
mod svid;
mod token;
mod trust_domain;

pub use bundle::{Bundle, BundleError, MAX_BUNDLE_BYTES, sha256};
pub use spiffe_id::{IdError, SYSTEM_NAMESPACE, SpiffeId, server_name};
pub use svid::{SvidError, SvidInfo, inspect_svid};
pub use token::{JoinToken, Secret, TokenError};
pub use trust_domain::{TrustDomain, TrustDomainError};
