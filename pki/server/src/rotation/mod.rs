//! The rotation of roots and of JWT keys.
//!
//! - [`trust`]: what there is. A root goes one way: prepared, active, old, removed, retired.
//! - [`decide`]: which step may be taken now, and what the others wait for. Pure.
//! - [`ask`]: what an operator may have sooner. Pure.
//! - [`words`]: what it waits for, in words.
//! - [`step`]: takes it: keys, bundle, signatures and state in one transaction, so that a crash is always between steps.
//! - [`bridge`]: the root before vouches for the one that signs, for verifiers that missed it.
//! - `adopt`: takes over the roots of a PKI that was lost, without their keys.
//! - `provide`: the least that a PKI needs that is not sure of its clock.
//! - [`jwt_keys`]: the same for the keys of JWT-SVIDs, which need less.

mod adopt;
pub(crate) mod ask;
pub(crate) mod bridge;
pub(crate) mod decide;
pub(crate) mod jwt_keys;
#[cfg(test)]
mod model_tests;
mod provide;
pub(crate) mod step;
pub(crate) mod trust;
pub(crate) mod words;

pub(crate) use trust::{JwtKey, Root, RootState, Trust};
