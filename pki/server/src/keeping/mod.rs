//! What keeps a PKI's data: backups, the return from damage, and what survives a return to an older state.

pub(crate) mod backups;
pub mod command;
pub(crate) mod heal;
pub(crate) mod keeper;
pub(crate) mod mirror;
pub mod moving;
pub(crate) mod restored;
pub(crate) mod roster;
