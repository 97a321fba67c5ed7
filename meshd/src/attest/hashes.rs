//! SHA-256 of programs, read once per version of a file.

use std::collections::HashMap;
use std::io::{ErrorKind, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{Context, SHA256};

use super::program::{FileId, Program};

/// Programs remembered; a host has fewer that entries ask the content of.
const REMEMBERED: usize = 256;
/// Larger ones are not read: some seconds of a core each.
const LARGEST: u64 = 1 << 30;
const CHUNK: usize = 256 * 1024;
/// A file that was changed more lately may change again without its times telling: they move in ticks, of up to two
/// seconds on some file systems.
const TICK: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub(super) struct Hashes {
    known: Mutex<HashMap<FileId, Known>>,
    /// Those being read, each once at a time: whoever waits finds it done more often than not. A file that does not answer
    /// keeps no other waiting.
    reading: Mutex<HashMap<FileId, Arc<Mutex<()>>>>,
}

#[derive(Clone, Copy, Debug)]
enum Known {
    Hash([u8; 32]),
    /// Nothing but another file will do.
    Unreadable,
    /// It could not be read, which was said, and is tried again.
    Failed,
}

/// Why there is no hash.
struct Failure {
    reason: String,
    is_lasting: bool,
}

impl Hashes {
    /// The outer None: not measured, or to be measured again.
    pub(super) fn known(&self, program: &Program) -> Option<Option<[u8; 32]>> {
        match lock(&self.known).get(&program.id())? {
            Known::Hash(hash) => Some(Some(*hash)),
            Known::Unreadable => Some(None),
            Known::Failed => None,
        }
    }

    pub(super) fn measure(&self, program: &Program) -> Option<[u8; 32]> {
        let turn = self.turn(program.id());
        let _one_at_a_time = lock(&turn);
        if let Some(known) = self.known(program) {
            return known;
        }
        let read = read(program);
        self.note(program, &read, SystemTime::now());
        read.ok()
    }

    fn turn(&self, file: FileId) -> Arc<Mutex<()>> {
        let mut reading = lock(&self.reading);
        reading.retain(|_, turn| Arc::strong_count(turn) > 1);
        reading.entry(file).or_default().clone()
    }

    fn note(&self, program: &Program, read: &Result<[u8; 32], Failure>, now: SystemTime) {
        let mut known = lock(&self.known);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        let said = match read {
            Ok(hash) => {
                if program.id().is_settled(now, TICK) {
                    known.insert(program.id(), Known::Hash(*hash));
                }
                return;
            }
            Err(failure) if failure.is_lasting => known.insert(program.id(), Known::Unreadable),
            Err(_) => known.insert(program.id(), Known::Failed),
        };
        drop(known);
        if let (None, Err(Failure { reason, .. })) = (said, read) {
            let path = program.path().unwrap_or_else(|| "(gone)".to_owned());
            tracing::warn!(path, reason, "a program cannot be read for its SHA-256; selectors of that do not hold");
        }
    }
}

impl From<std::io::Error> for Failure {
    /// Descriptors that are lacking, a signal, a file system that is away: all of that passes.
    fn from(error: std::io::Error) -> Failure {
        Failure { reason: error.to_string(), is_lasting: error.kind() == ErrorKind::PermissionDenied }
    }
}

fn read(program: &Program) -> Result<[u8; 32], Failure> {
    let passing = |reason: &str| Failure { reason: reason.to_owned(), is_lasting: false };
    let size = program.id().size();
    if size > LARGEST {
        let reason = format!("it has {size} bytes, {LARGEST} are read at most");
        return Err(Failure { reason, is_lasting: true });
    }
    let mut file = program.open()?;
    let mut hash = Context::new(&SHA256);
    let mut chunk = vec![0; CHUNK];
    let mut left = size;
    while left > 0 {
        let length = file.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        hash.update(&chunk[..length]);
        left = left.saturating_sub(length as u64);
    }
    if FileId::of(&file.metadata()?) != program.id() {
        return Err(passing("it was changed meanwhile"));
    }
    hash.finish().as_ref().try_into().map_err(|_| passing("a hash of another length"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Program {
        Program::of(std::process::id().cast_signed()).unwrap()
    }

    fn later() -> SystemTime {
        SystemTime::now() + TICK
    }

    #[test]
    fn a_program_is_read_once_and_its_hash_is_that_of_its_content() {
        let hashes = Hashes::default();
        let own = own();
        assert_eq!(hashes.known(&own), None);
        let content = std::fs::read("/proc/self/exe").unwrap();
        let hash = meshd_identity::sha256(&content);
        assert_eq!(hashes.measure(&own), Some(hash));
        hashes.note(&own, &Ok(hash), later());
        let again = Program::of(std::process::id().cast_signed()).unwrap();
        assert_eq!(hashes.known(&again), Some(Some(hash)), "the file is the same");
    }

    #[test]
    fn the_hash_of_a_file_that_was_changed_just_now_is_not_remembered() {
        let (hashes, own) = (Hashes::default(), own());
        hashes.note(&own, &Ok([7; 32]), own.id().changed());
        assert_eq!(hashes.known(&own), None);
        hashes.note(&own, &Ok([7; 32]), own.id().changed() + TICK);
        assert_eq!(hashes.known(&own), Some(Some([7; 32])));
    }

    #[test]
    fn the_hash_of_a_file_that_was_changed_in_the_future_is_remembered() {
        let (hashes, own) = (Hashes::default(), own());
        hashes.note(&own, &Ok([7; 32]), own.id().changed() - TICK / 2);
        assert_eq!(hashes.known(&own), None, "that time is about to come");
        hashes.note(&own, &Ok([7; 32]), own.id().changed() - TICK);
        assert_eq!(hashes.known(&own), Some(Some([7; 32])));
    }

    #[test]
    fn a_file_that_does_not_answer_keeps_no_other_waiting() {
        let (hashes, own) = (Hashes::default(), own());
        let turn = hashes.turn(FileId::of(&std::fs::metadata("/").unwrap()));
        let reading = lock(&turn);
        hashes.note(&own, &Ok([7; 32]), later());
        assert_eq!(hashes.measure(&own), Some([7; 32]));
        assert!(hashes.turn(own.id()).try_lock().is_ok(), "once it was read");
        drop(reading);
        drop(turn);
        drop(hashes.turn(own.id()));
        assert_eq!(lock(&hashes.reading).len(), 1, "those that nobody reads are forgotten");
    }

    #[test]
    fn what_could_not_be_read_is_tried_again_unless_nothing_but_another_file_will_do() {
        let (hashes, own) = (Hashes::default(), own());
        for (error, known) in [(ErrorKind::Interrupted, None), (ErrorKind::PermissionDenied, Some(None))] {
            hashes.note(&own, &Err(std::io::Error::from(error).into()), later());
            assert_eq!(hashes.known(&own), known, "{error}");
        }
        hashes.note(&own, &Ok([7; 32]), later());
        assert_eq!(hashes.known(&own), Some(Some([7; 32])));
    }
}
