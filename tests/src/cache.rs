//! What takes long to get is kept outside the checkout, for as long as it is used.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// After so long without use it is removed.
const UNUSED: Duration = Duration::from_secs(30 * 86_400);

/// Tests run as root, so the cache is the machine's unless told.
fn directory() -> PathBuf {
    std::env::var_os("XDG_CACHE_HOME").map_or_else(|| PathBuf::from("/var/cache"), PathBuf::from).join("meshd-tests")
}

/// The directory of this name; `build` makes it where it is not there yet, whole or not at all.
pub(crate) fn directory_of(name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let cache = directory();
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let kept = cache.join(name);
    // Several test processes want the same one; the first builds it.
    let lock = File::create(cache.join(format!("{name}.lock")))?;
    lock.lock()?;
    if !kept.exists() {
        let partial = kept.with_extension("partial");
        let _ = fs::remove_dir_all(&partial);
        build(&partial)?;
        fs::rename(&partial, &kept)?;
    }
    File::open(&kept)?.set_modified(SystemTime::now())?;
    remove_unused(&cache)?;
    Ok(kept)
}

/// Of other recipes and releases; using one says so.
fn remove_unused(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        let unused = entry.metadata()?.modified()?.elapsed().unwrap_or_default() > UNUSED;
        if unused && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_used_for_a_month_is_removed() {
        let cache = std::env::temp_dir().join(format!("meshd-cache-{}", std::process::id()));
        let (old, new) = (cache.join("old"), cache.join("new"));
        fs::create_dir_all(&old).unwrap();
        fs::create_dir_all(&new).unwrap();
        File::open(&old).unwrap().set_modified(SystemTime::now() - 2 * UNUSED).unwrap();
        remove_unused(&cache).unwrap();
        assert!(!old.exists() && new.exists());
        fs::remove_dir_all(&cache).unwrap();
    }
}
