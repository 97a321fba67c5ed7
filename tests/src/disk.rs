//! A disk of its own for a directory of a lab, so small that it can be full.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::{run, try_run};

/// A tmpfs over a directory; what was in it is in it. Processes started before do not see it.
pub struct SmallDisk {
    directory: PathBuf,
}

impl SmallDisk {
    pub fn over(directory: &Path, size: &str) -> Result<Self> {
        let place = directory.to_str().context("the directory's name is not text")?;
        let aside = format!("{place}.aside");
        run("cp", &["--archive", place, &aside])?;
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "small", place])?;
        let disk = Self { directory: directory.to_owned() };
        run("cp", &["--archive", "--no-target-directory", &aside, place])?;
        fs::remove_dir_all(aside)?;
        Ok(disk)
    }

    /// Not a byte is left, until [`SmallDisk::make_room`].
    pub fn fill(&self) -> Result<()> {
        let filler = self.filler();
        // Ends in an error by intention: the disk is full.
        try_run("dd", &["if=/dev/zero", &format!("of={}", filler.display()), "bs=4096", "status=none"]);
        anyhow::ensure!(fs::metadata(&filler)?.len() > 0, "{} was full before", self.directory.display());
        Ok(())
    }

    pub fn make_room(&self) -> Result<()> {
        Ok(fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.directory.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Some(place) = self.directory.to_str() {
            try_run("umount", &["--lazy", place]);
        }
    }
}
