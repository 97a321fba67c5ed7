//! Who enrolled ports belong to, on disk: also when meshd or the host starts anew, a unit that is quicker than the
//! owner of a port does not become it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use super::PortOwner;
use crate::durable;

const SCHEMA: u32 = 1;
/// One for each port, with a long name each.
const MAX_SIZE: u64 = 16 << 20;

/// `port-owners.json` in the state directory.
#[derive(Clone, Debug)]
pub struct PortMemory {
    path: PathBuf,
    /// That it cannot be read is said once, until it can: it is read twice a second.
    failing: Arc<AtomicBool>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    schema: u32,
    owners: BTreeMap<u16, String>,
}

impl PortMemory {
    pub fn new(state_dir: &Path) -> PortMemory {
        PortMemory { path: state_dir.join("port-owners.json"), failing: Arc::default() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// None when it cannot be read, which is logged.
    pub(super) fn known(&self) -> Option<BTreeMap<u16, PortOwner>> {
        let read = self.read();
        if let (true, Err(error)) = (self.is_new_failure(read.is_err()), &read) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "cannot read whose the enrolled ports are: they are nobody's until it can be");
        }
        read.ok()
    }

    fn is_new_failure(&self, fails: bool) -> bool {
        !self.failing.swap(fails, Ordering::Relaxed) && fails
    }

    /// Nothing when there is no file.
    pub fn read(&self) -> io::Result<BTreeMap<u16, PortOwner>> {
        // Root reads what belongs to the daemon's user: neither a link nor a pipe.
        let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
            opened => opened?,
        };
        let mut text = String::new();
        file.take(MAX_SIZE).read_to_string(&mut text)?;
        let document: Document = serde_json::from_str(&text)?;
        if document.schema > SCHEMA {
            return Err(io::Error::other(format!("schema {} was written by a newer meshd", document.schema)));
        }
        document.owners.into_iter().map(|(port, owner)| Ok((port, parse(owner)?))).collect()
    }

    pub fn write(&self, owners: &BTreeMap<u16, PortOwner>) -> io::Result<()> {
        let owners = owners.iter().map(|(port, owner)| (*port, owner.to_string())).collect();
        durable::replace(&self.path, serde_json::to_vec_pretty(&Document { schema: SCHEMA, owners })?)
    }
}

/// As they are displayed.
fn parse(owner: String) -> io::Result<PortOwner> {
    match owner.strip_prefix("uid:") {
        Some(uid) => uid.parse().map(PortOwner::Uid).map_err(io::Error::other),
        None => Ok(PortOwner::Unit(owner.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_read_as_they_were_written_and_what_is_broken_is_not_taken_for_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let memory = PortMemory::new(directory.path());
        assert_eq!(memory.read().unwrap(), BTreeMap::new());
        let owners = BTreeMap::from([(5432, PortOwner::Unit("pg@15.service".into())), (80, PortOwner::Uid(33))]);
        memory.write(&owners).unwrap();
        assert_eq!(memory.read().unwrap(), owners);
        for broken in ["", "{", r#"{"schema":2,"owners":{}}"#, r#"{"schema":1,"owners":{"80":"uid:x"}}"#] {
            std::fs::write(memory.path(), broken).unwrap();
            assert!(memory.read().is_err(), "{broken}");
        }
    }

    #[test]
    fn a_memory_that_cannot_be_read_is_told_once_until_it_can_be() {
        let memory = PortMemory::new(Path::new("/nowhere"));
        let told = [true, true, false, true].map(|fails| memory.clone().is_new_failure(fails));
        assert_eq!(told, [true, false, false, true]);
    }
}
