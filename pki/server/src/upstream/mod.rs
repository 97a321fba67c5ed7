//! Authorities from outside: an intermediate that an offline root signed. The root's key never is here.
//!
//! - [`check`]: whether an intermediate can be used; the last proof is a trial certificate.
//! - [`import`]: what becomes of it among the roots. [`commands`]: `meshd-pki csr` and `import`. [`watch`]: the same from files that others replace.
//!
//! A root that is new to the bundle is prepared like one of our own and waits for the same gates. An intermediate under
//! the root that is active travels in every chain and needs no distribution: it is used at once.

pub(crate) mod check;
pub mod commands;
pub mod import;
pub mod watch;
