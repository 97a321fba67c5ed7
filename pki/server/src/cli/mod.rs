//! The commands of an operator: arguments to command, reply to text or JSON. A file per family. Those about a server's
//! own files (backups, replicas) work on its state directory, all others wherever [`Place`] says.

pub(crate) mod authority;
pub(crate) mod backup;
pub(crate) mod deny;
mod etcd;
pub(crate) mod federation;
pub(crate) mod host;
mod place;
pub(crate) mod recovery;
pub(crate) mod replica;
pub(crate) mod role;
mod show;
mod terms;
pub(crate) mod upstream;

pub(crate) use self::place::Place;
pub(crate) use self::terms::Terms;
