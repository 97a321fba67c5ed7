//! Clocks that are wrong for one process.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The library to preload.
pub fn fake_time() -> Result<String> {
    let places = fs::read_dir("/usr/lib")?.filter_map(|entry| Some(entry.ok()?.path()));
    let candidates = places.chain([PathBuf::from("/usr/lib")]).map(|place| place.join("faketime/libfaketimeMT.so.1"));
    let found = candidates.into_iter().find(|path| path.exists()).context("no libfaketime under /usr/lib")?;
    Ok(found.display().to_string())
}
