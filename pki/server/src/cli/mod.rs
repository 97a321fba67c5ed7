//! The commands of an operator: arguments to command, reply to text or JSON. A file per family.

pub(crate) mod authority;
pub(crate) mod deny;
pub(crate) mod federation;
pub(crate) mod host;
mod place;
pub(crate) mod recovery;
pub(crate) mod role;
mod show;
mod terms;
pub(crate) mod upstream;

pub(crate) use self::place::Place;
pub(crate) use self::terms::Terms;
