//! The commands of an operator: arguments to command, reply to text or JSON. A file per family.

pub(crate) mod authority;
mod place;
mod show;
