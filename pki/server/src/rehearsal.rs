//! A PKI that lives in minutes what takes years destroys keys in minutes: never one that is in use.

use std::path::Path;

use anyhow::ensure;

use crate::lifetimes::Lifetimes;
use crate::state_dir::StateDir;
use crate::store::servers::Server;
use crate::store::{DbError, intermediates, servers};
use crate::times::seconds;

/// Refuses a rehearsal on a state directory that was ever served from in earnest.
pub fn refuse_in_earnest(dir: &Path, rehearsal: &Lifetimes) -> anyhow::Result<()> {
    let state = StateDir::open(dir)?;
    let (servers, longest) = state.database.read(|view| -> Result<_, DbError> {
        let longest = intermediates::all(view)?.into_iter().map(|one| one.longest_leaf_s).max();
        Ok((servers::servers(view)?, longest))
    })?;
    // With bridges or without.
    let rehearsed = |server: &Server| {
        let known = server.lifetimes;
        known == Lifetimes { bridge: known.bridge, ..Lifetimes::rehearsal(known.leaf) }
    };
    // Servers that moved are off the record, what they signed with is not.
    let is_earnest = match servers.is_empty() {
        true => longest.is_some_and(|longest| longest > seconds(rehearsal.leaf)),
        false => !servers.iter().all(rehearsed),
    };
    ensure!(
        !is_earnest,
        "{} was served from with lives of days: a rehearsal would replace and destroy its roots within minutes. Rehearse \
         on a directory of its own: `meshd-pki init`",
        dir.display()
    );
    Ok(())
}
