//! Where the last good state of discovery lies: `directory/SOURCE.json` under the state directory, and `interests.json`
//! beside it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use meshd_discovery::Keep;

use crate::durable;

pub(super) struct LastKnown {
    dir: PathBuf,
}

impl LastKnown {
    pub(super) fn new(state_dir: &Path) -> LastKnown {
        LastKnown { dir: state_dir.join("directory") }
    }

    /// What lies in the state directory itself.
    pub(super) fn in_dir(state_dir: &Path) -> LastKnown {
        LastKnown { dir: state_dir.to_owned() }
    }

    /// The name of a source is a DNS label, so it cannot lead elsewhere.
    fn path(&self, source: &str) -> PathBuf {
        self.dir.join(format!("{source}.json"))
    }
}

impl Keep for LastKnown {
    fn load(&self, source: &str) -> io::Result<Option<String>> {
        match fs::read_to_string(self.path(source)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn save(&self, source: &str, text: &str) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        durable::replace(&self.path(source), text)
    }
}
