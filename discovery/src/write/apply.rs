//! What a verb does with one document, whatever the backend.

use super::{By, Manifest, Over, ResourceName, Store, StoreError, Stored, Write};

/// How documents are applied.
pub struct Applying {
    pub by: By,
    /// Also over what somebody else changed meanwhile.
    pub force: bool,
    pub dry_run: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Created,
    Changed {
        /// Who wrote what was there.
        replaced: Option<String>,
    },
    Unchanged,
}

pub async fn apply(store: &dyn Store, manifest: &Manifest, how: &Applying) -> Result<Outcome, StoreError> {
    let now = store.get(&manifest.resource).await?;
    // Also by ourselves, a moment ago: doing it again is safe.
    if now.as_ref().is_some_and(|now| now.document.as_ref() == Ok(&manifest.document)) {
        return Ok(Outcome::Unchanged);
    }
    check_version(&manifest.resource, now.as_ref(), manifest.based_on.as_deref(), how.force)?;
    let over = match &now {
        _ if how.force => Over::Anything,
        Some(now) => Over::Version(now.version.clone()),
        None => Over::Nothing,
    };
    let is_new = store.write(Write { manifest, by: &how.by, over: &over, dry_run: how.dry_run }).await?;
    Ok(match now {
        None => Outcome::Created,
        Some(_) if !is_new => Outcome::Unchanged,
        Some(now) => Outcome::Changed { replaced: now.by },
    })
}

/// What was there.
pub async fn delete(
    store: &dyn Store,
    resource: &ResourceName,
    based_on: Option<&str>,
    how: &Applying,
) -> Result<Stored, StoreError> {
    let now = store.get(resource).await?.ok_or_else(|| StoreError::absent(resource, store.name()))?;
    check_version(resource, Some(&now), based_on, how.force)?;
    if !how.dry_run {
        let version = if how.force { None } else { Some(now.version.as_str()) };
        store.remove(resource, version).await?;
    }
    Ok(now)
}

/// Whoever made a change made it of what is there now.
fn check_version(
    resource: &ResourceName,
    now: Option<&Stored>,
    based_on: Option<&str>,
    force: bool,
) -> Result<(), StoreError> {
    let Some(version) = based_on.filter(|_| !force) else { return Ok(()) };
    if now.is_some_and(|now| now.version == version) { Ok(()) } else { Err(StoreError::changed(resource, now)) }
}
