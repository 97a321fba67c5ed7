//! Identity types of the mesh. Pure: no files, no sockets, no clock.
//!
//! - [`TrustDomain`] and [`SpiffeId`]: who somebody is, always `spiffe://<trust domain>/ns/<namespace>/sa/<name>`.
//! - [`inspect_svid`]: what a leaf certificate claims, and whether it may claim it.
//! - [`root_id`] and [`roots_of`]: what a root is called, and which one a certificate hangs on.
//! - [`Bundle`]: the roots and JWT keys of one trust domain, as a SPIFFE bundle (JWKS).
//! - [`JoinToken`]: what an operator carries to a new host.
//! - [`jwt`]: tokens that others sign.
//! - [`signed`] and [`statements`]: what the PKI says under a signature, and how to verify it.
//! - [`ProcessSelector`]: what processes of a host are known by.
//! - [`denial`]: whom to refuse although their certificates are valid.

mod authority;
mod bundle;
pub mod denial;
pub mod jwt;
mod selector;
pub mod signed;
mod spiffe_id;
pub mod statements;
mod svid;
mod token;
mod trust_domain;

pub use authority::{digest_id, root_id, roots_of};
pub use bundle::{
    Bundle, BundleError, JwtKey, KeyParameters, MAX_BUNDLE_BYTES, jwks_of_jwt_keys, keys_of_jwks, sha256,
};
pub use selector::{ProcessSelector, SelectorError};
pub use spiffe_id::{IdError, SYSTEM_NAMESPACE, SpiffeId, server_name};
pub use svid::{SvidError, SvidInfo, inspect_svid};
pub use token::{JoinToken, PkiPin, Secret, TokenError};
pub use trust_domain::{TrustDomain, TrustDomainError};
