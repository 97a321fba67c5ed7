//! The plaintext ledger: who still calls permissive ports in clear. The kernel counts; here it is read, added up and
//! kept on disk, so that a port's owner can make it strict knowing whom that would hurt.

mod book;
mod tally;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;

use super::backend::Backend;
use super::timer::boot_id;
use super::tool::CaptureError;
use super::wanted::Wanted;
use crate::durable;

use book::Unreadable;
pub use book::{Book, PortRecord};
pub use tally::{PlainCaller, Tally};

/// How old what the metrics show may be. Reading is one run of `nft`, about 5 ms.
const HARVEST_EVERY: Duration = Duration::from_secs(10);
/// A crash forgets no connection (the kernel goes on counting), only when within this span it was.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// The book as others may read it at any time.
pub type PublishedBook = Arc<ArcSwap<Book>>;

/// The keeper's side: reads the kernel's counts when they are due, or about to be lost.
pub(super) struct Ledger {
    /// None: what is there is a newer meshd's, and stays as it is.
    path: Option<PathBuf>,
    boot: String,
    book: Book,
    published: PublishedBook,
    harvested: Option<SystemTime>,
    saved: Option<SystemTime>,
    failing: bool,
}

impl Ledger {
    /// Opens `capture/ledger.json` beside the capture state.
    pub(super) fn open(state_path: &Path) -> Result<Ledger, CaptureError> {
        let path = state_path.with_file_name("ledger.json");
        let failed = |source| CaptureError::State { what: format!("cannot read {}", path.display()), source };
        let (book, path) = match std::fs::read(&path) {
            Ok(text) => begin_with(&text, path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Book::default(), Some(path)),
            Err(error) => return Err(failed(error)),
        };
        let published = Arc::new(ArcSwap::from_pointee(book.clone()));
        Ok(Ledger { path, boot: boot_id(), book, published, harvested: None, saved: None, failing: false })
    }

    pub(super) fn published(&self) -> PublishedBook {
        self.published.clone()
    }

    /// Called often; does something every ten seconds, and only where there is something to count.
    pub(super) fn tick(&mut self, backend: &dyn Backend, wanted: &Wanted) {
        let counts = !wanted.permissive.is_empty() || !wanted.strict.is_empty();
        if counts && is_due(self.harvested, HARVEST_EVERY) {
            let failed = self.try_harvest(backend).err();
            // Once: rules that another tool removed are back soon.
            if let (Some(error), false) = (&failed, self.failing) {
                tracing::warn!(%error, "plaintext callers cannot be counted; `meshd ledger` notes the gap");
            }
            self.failing = failed.is_some();
        }
    }

    /// Makes the next tick read what the new rules count; whoever waits for them need not wait for that.
    pub(super) fn expect_new_rules(&mut self) {
        self.harvested = None;
    }

    /// The same at once; for right before rules are replaced, which resets what they counted.
    pub(super) fn harvest(&mut self, backend: &dyn Backend) {
        // Before the first rules there is nothing to read; later, the next tick tells.
        if let Err(error) = self.try_harvest(backend) {
            tracing::debug!(%error, "nothing counted plaintext callers");
        }
    }

    fn try_harvest(&mut self, backend: &dyn Backend) -> Result<(), CaptureError> {
        if !backend.kind().can().ledger {
            // Nothing is known of now, which says nothing of what was known.
            return Ok(());
        }
        let now = SystemTime::now();
        self.harvested = Some(now);
        self.book.enter(&backend.tally()?, &self.boot, now);
        self.published.store(Arc::new(self.book.clone()));
        if is_due(self.saved, SAVE_EVERY) {
            self.save();
        }
        Ok(())
    }

    pub(super) fn save(&mut self) {
        self.saved = Some(SystemTime::now());
        let Some(path) = &self.path else { return };
        if let Err(error) = durable::replace(path, self.book.to_json()) {
            tracing::error!(path = %path.display(), %error, "cannot keep the plaintext ledger; make room, or mend permissions");
        }
    }
}

/// What is on disk, or an empty book; and where it is kept.
fn begin_with(text: &[u8], path: PathBuf) -> (Book, Option<PathBuf>) {
    match Book::from_json(text) {
        Ok(book) => (book, Some(path)),
        Err(reason @ Unreadable::Newer(_)) => {
            tracing::error!(path = %path.display(), %reason,
                "the plaintext ledger is kept in memory only, and that file left alone: run the newer meshd, or remove \
                 the file and restart meshd");
            (Book::default(), None)
        }
        Err(reason @ Unreadable::Damaged(_)) => {
            tracing::warn!(path = %path.display(), %reason, "the plaintext ledger is unreadable; starting a new one");
            (Book::default(), Some(path))
        }
    }
}

/// A clock set back makes it due, too.
fn is_due(last: Option<SystemTime>, every: Duration) -> bool {
    last.and_then(|last| last.elapsed().ok()).is_none_or(|elapsed| elapsed >= every)
}

#[cfg(test)]
mod tests {
    use super::super::backend::BackendKind;
    use super::*;

    fn opened_and_saved(text: &str) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.json");
        std::fs::write(&path, text).unwrap();
        Ledger::open(&directory.path().join("state.json")).unwrap().save();
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_backend_that_cannot_count_erases_nothing_that_another_one_counted() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(&directory.path().join("state.json")).unwrap();
        let counted = Tally { ports: [(25, Default::default())].into(), ..Tally::default() };
        ledger.book.enter(&counted, "boot", SystemTime::now());
        ledger.harvest(BackendKind::Tun.open().as_ref());
        assert!(ledger.book.ports.contains_key(&25));
    }

    #[test]
    fn what_a_newer_meshd_wrote_is_left_alone_and_what_is_damaged_is_replaced() {
        let newer = r#"{"schema":99,"ports":"told otherwise by then"}"#;
        assert_eq!(opened_and_saved(newer), newer);
        let anew = String::from_utf8(Book::default().to_json()).unwrap();
        assert_eq!(opened_and_saved("{ broken"), anew);
    }
}
