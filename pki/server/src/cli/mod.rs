//! The commands of an operator. A file per family.

pub(crate) mod federation;
pub(crate) mod upstream;
