//! SHA-256 of programs, read once per version of a file.

use std::collections::HashMap;
use std::io::Read;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};

use super::program::{FileId, Program};

/// Programs remembered; a host has fewer that entries ask the content of.
const REMEMBERED: usize = 256;
/// Larger ones are not read: some seconds of a core each.
const LARGEST: u64 = 1 << 30;
const CHUNK: usize = 256 * 1024;

#[derive(Debug, Default)]
pub(super) struct Hashes {
    /// None: could not be read.
    known: Mutex<HashMap<FileId, Option<[u8; 32]>>>,
    /// One at a time: whoever waits finds it done more often than not.
    reading: Mutex<()>,
}

impl Hashes {
    /// The outer None: not measured yet.
    pub(super) fn known(&self, program: &Program) -> Option<Option<[u8; 32]>> {
        lock(&self.known).get(&program.id()).copied()
    }

    pub(super) fn measure(&self, program: &Program) {
        let _one_at_a_time = lock(&self.reading);
        if self.known(program).is_some() {
            return;
        }
        let hash = read(program).map_err(|reason| {
            let path = program.path().unwrap_or_else(|| "(gone)".to_owned());
            tracing::warn!(path, reason, "a program cannot be read for its SHA-256; selectors of that do not hold");
        });
        let mut known = lock(&self.known);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(program.id(), hash.ok());
    }
}

fn read(program: &Program) -> Result<[u8; 32], String> {
    let size = program.id().size();
    if size > LARGEST {
        return Err(format!("it has {size} bytes, {LARGEST} are read at most"));
    }
    let mut file = program.open().map_err(|error| error.to_string())?;
    let mut hash = Context::new(&SHA256);
    let mut chunk = vec![0; CHUNK];
    let mut left = size;
    while left > 0 {
        let length = file.read(&mut chunk).map_err(|error| error.to_string())?;
        if length == 0 {
            break;
        }
        hash.update(&chunk[..length]);
        left = left.saturating_sub(length as u64);
    }
    let now = file.metadata().map_err(|error| error.to_string())?;
    if FileId::of(&now) != program.id() {
        return Err("it was changed meanwhile".to_owned());
    }
    hash.finish().as_ref().try_into().map_err(|_| "a hash of another length".to_owned())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_read_once_and_its_hash_is_that_of_its_content() {
        let hashes = Hashes::default();
        let own = Program::of(std::process::id().cast_signed()).unwrap();
        assert_eq!(hashes.known(&own), None);
        hashes.measure(&own);
        let content = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(hashes.known(&own), Some(Some(meshd_identity::sha256(&content))));
        let again = Program::of(std::process::id().cast_signed()).unwrap();
        assert!(hashes.known(&again).flatten().is_some(), "the file is the same");
    }
}
