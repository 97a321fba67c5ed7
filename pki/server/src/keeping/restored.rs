//! That a backup is in use: in a file of its own, for the operator to see until they say so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::keys::replace_private;
use crate::times::rfc3339;

/// After so long hosts have told all they know.
const LISTENS_S: i64 = 30 * 86_400;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Restored {
    pub(crate) at: i64,
    pub(crate) backup: PathBuf,
    pub(crate) reason: String,
    /// Where the database is that was replaced.
    pub(crate) put_aside: PathBuf,
    /// A bundle with a new sequence was published since: hosts may have newer ones than the backup.
    pub(crate) published: bool,
    /// The operator knows.
    pub(crate) seen: bool,
}

impl Restored {
    pub(crate) fn read(dir: &Path) -> Option<Restored> {
        serde_json::from_slice(&fs::read(file(dir)).ok()?).ok()
    }

    pub(crate) fn write(&self, dir: &Path) -> io::Result<()> {
        replace_private(&file(dir), &serde_json::to_vec(self)?)
    }

    /// Whether hosts may still know more than the PKI.
    pub(crate) fn is_recent(&self, now: i64) -> bool {
        now < self.at + LISTENS_S
    }

    pub(crate) fn problem(&self) -> String {
        format!(
            "restored at {0} from {1} ({reason}); what was made since that backup is gone, and what was removed is \
             back: look into audit.jsonl, also for host_ban, host_evict and entry_remove; bring hosts and entries back \
             by `meshd-pki recovery adopt {2}/hosts.json`, then run `meshd-pki restore --seen`; the database before is in {2}",
            rfc3339(self.at),
            self.backup.display(),
            self.put_aside.display(),
            reason = self.reason,
        )
    }
}

fn file(dir: &Path) -> PathBuf {
    dir.join("restored.json")
}
