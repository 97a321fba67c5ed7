//! The authorities as they were last, in a file apart from the database: a database that went back in time, by a
//! backup or a log that lost its end, takes from it what it has forgotten. So no sequence goes back, no root that
//! signed is unknown, and no mark of when an intermediate last issued comes earlier than it was.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::keys::replace_private;
use crate::rotation::Trust;
use crate::store::bundles::{self, StoredBundle};
use crate::store::intermediates::{self, Intermediate};
use crate::store::{DbError, Records, View, trust};

/// Older ones are in every backup.
const BUNDLES: usize = 16;

/// Private keys in it are wrapped, as in the database.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Mirror {
    schema: u32,
    trust: Trust,
    intermediates: Vec<Intermediate>,
    bundles: Vec<StoredBundle>,
}

pub(crate) struct MirrorFile(PathBuf);

impl MirrorFile {
    pub(crate) fn new(dir: &Path) -> MirrorFile {
        MirrorFile(dir.join("authorities.json"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Nothing when there is none, or it is damaged itself: then the database alone counts.
    pub(crate) fn read(&self) -> Option<Mirror> {
        serde_json::from_slice(&fs::read(&self.0).ok()?).ok()
    }

    /// Whether it changed.
    pub(crate) fn write(&self, mirror: &Mirror) -> io::Result<bool> {
        let text = serde_json::to_vec(mirror)?;
        if fs::read(&self.0).is_ok_and(|known| known == text) {
            return Ok(false);
        }
        replace_private(&self.0, &text)?;
        Ok(true)
    }
}

impl Mirror {
    pub(crate) fn of(view: &mut dyn View) -> Result<Mirror, DbError> {
        let mut bundles = bundles::all(view)?;
        bundles.drain(..bundles.len().saturating_sub(BUNDLES));
        Ok(Mirror { schema: 1, trust: trust::trust(view)?, intermediates: intermediates::all(view)?, bundles })
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.trust.sequence
    }

    /// Whether the records know all that the mirror does.
    pub(crate) fn is_remembered(&self, view: &mut dyn View, keep_after: i64) -> Result<bool, DbError> {
        let newer = self.trust.sequence > trust::trust(view)?.sequence;
        Ok(!newer && self.forgotten(view, keep_after)?.is_empty())
    }

    /// Gives the records back what they have forgotten.
    pub(crate) fn remind(&self, records: &mut dyn Records, keep_after: i64) -> Result<(), DbError> {
        if self.trust.sequence > trust::trust(records)?.sequence {
            trust::put_trust(records, &self.trust)?;
            for bundle in &self.bundles {
                bundles::put_bundle(records, bundle)?;
            }
        }
        for one in self.forgotten(records, keep_after)? {
            intermediates::put_intermediate(records, one)?;
        }
        Ok(())
    }

    /// Intermediates that are not on record, or of which it is not on record that they were replaced.
    fn forgotten(&self, view: &mut dyn View, keep_after: i64) -> Result<Vec<&Intermediate>, DbError> {
        let stored = intermediates::all(view)?.into_iter().map(|one| (one.id.clone(), one));
        let stored: BTreeMap<String, Intermediate> = stored.collect();
        let is_forgotten = |one: &&Intermediate| match stored.get(&one.id) {
            None => one.not_after >= keep_after,
            Some(known) => known.replaced_at.is_none() && one.replaced_at.is_some(),
        };
        Ok(self.intermediates.iter().filter(is_forgotten).collect())
    }
}
