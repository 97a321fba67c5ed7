//! The last good state of every source, so that a host that starts while its backends are away knows what it knew.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::held::{Held, Touched};
use crate::resources::{HeldResources, TouchedResources};
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
pub(crate) struct Saved {
    schema: u32,
    /// Of another kind, a source of the same name is another one.
    kind: String,
    epochs: Vec<(Scope, Epoch)>,
    records: Vec<Record>,
    /// Each read by itself, so that one of a kind that is not known here costs no other.
    #[serde(default)]
    resources: Vec<serde_json::Value>,
    #[serde(default)]
    resource_epochs: Vec<(Arc<str>, Epoch)>,
}

/// Puts back what was saved. A text that cannot be read is an error to tell, and nothing else.
pub(crate) fn restore(
    keep: &dyn Keep,
    source: &str,
    kind: &str,
    held: &mut Held,
    resources: &mut HeldResources,
) -> Result<(Touched, TouchedResources), String> {
    let nothing = || Ok((Touched::new(), TouchedResources::default()));
    let unread = |error: &dyn std::fmt::Display| {
        format!(
            "the last good state of source `{source}` cannot be read: {error}; it is replaced when the source answers"
        )
    };
    let Some(text) = keep.load(source).map_err(|error| unread(&error))? else { return nothing() };
    let saved: Saved = serde_json::from_str(&text).map_err(|error| unread(&error))?;
    if saved.schema != SCHEMA {
        return Err(unread(&format!("it has schema {}, and this version reads {SCHEMA}", saved.schema)));
    }
    if saved.kind != kind {
        return nothing();
    }
    let documents = saved.resources.into_iter().filter_map(|document| {
        let read = serde_json::from_value(document);
        read.map_err(|error| tracing::warn!(source, "a saved route or policy cannot be read: {error}")).ok()
    });
    let known = resources.restore(saved.resource_epochs, documents.collect());
    Ok((held.restore(saved.epochs, saved.records, tokio::time::Instant::now()), known))
}

/// What is believed now; places that are doubted to be gone are still believed. Cheap: texts and places are shared.
pub(crate) fn take(kind: &str, held: &Held, resources: &HeldResources) -> Saved {
    let records = held.entries().map(|entry| {
        let mut record = entry.record.clone();
        record.places.extend(entry.stale.iter().map(|(place, _)| place.clone()));
        record
    });
    let epochs = held.settled().map(|(scope, epoch)| (scope.clone(), epoch.clone())).collect();
    let documents = resources.records().filter_map(|record| serde_json::to_value(record).ok());
    Saved {
        schema: SCHEMA,
        kind: kind.to_owned(),
        epochs,
        records: records.collect(),
        resources: documents.collect(),
        resource_epochs: resources.settled().map(|(prefix, epoch)| (prefix.clone(), epoch.clone())).collect(),
    }
}

/// Blocks. Says whether it worked.
pub(crate) fn save(keep: &dyn Keep, source: &str, saved: &Saved) -> bool {
    let text = serde_json::to_string(saved).map_err(io::Error::other);
    let written = text.and_then(|text| keep.save(source, &text));
    if let Err(error) = &written {
        tracing::warn!(
            source,
            "its last good state cannot be saved: {error}; it is tried again, and meshd goes on without"
        );
    }
    written.is_ok()
}
