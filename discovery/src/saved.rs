//! The last good state of every source, so that a host that starts while its backends are away knows what it knew.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::held::{Held, Touched};
use crate::{Epoch, Record, Scope};

/// At most this much is forgotten by a host that loses power. Writing everything each time something changes would
/// cost a busy mesh more than it is worth.
pub(crate) const SAVE_EVERY: Duration = Duration::from_secs(10);
/// Readers take this one only; there was none before.
const SCHEMA: u32 = 1;

/// Where last good states are kept, one text per source.
pub trait Keep: Send + Sync {
    /// What was saved last under this name; `None`: nothing.
    fn load(&self, source: &str) -> io::Result<Option<String>>;
    /// Replaces it, whole or not at all.
    fn save(&self, source: &str, text: &str) -> io::Result<()>;
}

#[derive(Serialize, Deserialize)]
struct Saved {
    schema: u32,
    /// Of another kind, a source of the same name is another one.
    kind: String,
    epochs: Vec<(Scope, Epoch)>,
    records: Vec<Record>,
}

/// Puts back what was saved. A text that cannot be read is an error to tell, and nothing else.
pub(crate) fn restore(keep: &dyn Keep, source: &str, kind: &str, held: &mut Held) -> Result<Touched, String> {
    let unread = |error: &dyn std::fmt::Display| {
        format!(
            "the last good state of source `{source}` cannot be read: {error}; it is replaced when the source answers"
        )
    };
    let Some(text) = keep.load(source).map_err(|error| unread(&error))? else { return Ok(Touched::new()) };
    let saved: Saved = serde_json::from_str(&text).map_err(|error| unread(&error))?;
    if saved.schema != SCHEMA {
        return Err(unread(&format!("it has schema {}, and this version reads {SCHEMA}", saved.schema)));
    }
    if saved.kind != kind {
        return Ok(Touched::new());
    }
    Ok(held.restore(saved.epochs, saved.records, tokio::time::Instant::now()))
}

/// What is believed now; places that are doubted to be gone are still believed.
pub(crate) fn text(kind: &str, held: &Held) -> Option<String> {
    let records = held.entries().map(|entry| {
        let mut record = entry.record.clone();
        record.places.extend(entry.stale.iter().map(|(place, _)| place.clone()));
        record
    });
    let epochs = held.epochs().map(|(scope, epoch)| (scope.clone(), epoch)).collect();
    serde_json::to_string(&Saved { schema: SCHEMA, kind: kind.to_owned(), epochs, records: records.collect() }).ok()
}

/// Saves in the background, one text per source, the newest only.
pub(crate) struct Saver {
    keep: Arc<dyn Keep>,
    due: BTreeMap<Arc<str>, String>,
}

impl Saver {
    pub(crate) fn new(keep: Arc<dyn Keep>) -> Saver {
        Saver { keep, due: BTreeMap::new() }
    }

    pub(crate) fn put(&mut self, source: &Arc<str>, text: String) {
        self.due.insert(source.clone(), text);
    }

    /// Off the event loop: a disk may take its time.
    pub(crate) async fn save(&mut self) {
        let (keep, due) = (self.keep.clone(), std::mem::take(&mut self.due));
        let all = tokio::task::spawn_blocking(move || {
            for (source, text) in due {
                if let Err(error) = keep.save(&source, &text) {
                    tracing::warn!(
                        source = &*source,
                        "its last good state cannot be saved: {error}; meshd goes on without"
                    );
                }
            }
        });
        // A panic in there is ours and was logged; nothing else depends on it.
        let _ = all.await;
    }
}
