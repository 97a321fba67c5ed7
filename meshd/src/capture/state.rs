//! What was done to this host's kernel, on disk: a revert must undo what was applied, not what is configured now.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::backend::BackendKind;
use super::tool::CaptureError;
use super::wanted::Wanted;

const SCHEMA: u32 = 1;

/// `capture/state.json` in the state directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaptureState {
    schema: u32,
    /// In the kernel now, unless somebody else removed it.
    pub applied: Option<Applied>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub backend: BackendKind,
    pub wanted: Wanted,
}

impl Default for CaptureState {
    fn default() -> CaptureState {
        CaptureState { schema: SCHEMA, applied: None }
    }
}

impl CaptureState {
    pub fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("capture/state.json")
    }

    /// Absent is empty. What cannot be understood is an error: it is the only record of what to undo.
    pub fn load(path: &Path) -> Result<CaptureState, CaptureError> {
        let failed = |source| CaptureError::State { what: format!("cannot read {}", path.display()), source };
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(CaptureState::default()),
            Err(error) => return Err(failed(error)),
        };
        let state: CaptureState = serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
        if state.schema > SCHEMA {
            let newer =
                format!("schema {} was written by a newer meshd; use that one's `intercept revert`", state.schema);
            return Err(failed(io::Error::other(newer)));
        }
        Ok(state)
    }

    pub fn save(&self, path: &Path) -> Result<(), CaptureError> {
        let failed = |source| CaptureError::State { what: format!("cannot write {}", path.display()), source };
        let directory = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(failed)?;
        // By rename: a crash leaves the old one or the new one, never half.
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?)
            .map_err(failed)?;
        std::fs::rename(&temporary, path).map_err(failed)
    }
}
