//! Where the built programs are.

use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

/// Programs a lab needs, as cargo names them: (package, binary).
pub const NEEDED: [(&str, &str); 3] = [("meshd", "meshd"), ("meshd-pki", "meshd-pki"), ("meshd-tests", "testkit")];

/// Says where they are, for a caller that just built them (the first call holds).
pub fn use_directory(directory: PathBuf) {
    let _ = DIRECTORY.set(directory);
}

/// `target/<profile>`: as told, or the directory this program was built into.
pub fn directory() -> Result<PathBuf> {
    match DIRECTORY.get() {
        Some(directory) => Ok(directory.clone()),
        None => beside_this_program(),
    }
}

/// An error that says what to build, unless everything is there.
pub fn check() -> Result<()> {
    let directory = directory()?;
    for (package, binary) in NEEDED {
        let path = directory.join(binary);
        ensure!(path.exists(), "{} is not built; run `cargo build -p {package} --bin {binary}` first", path.display());
    }
    Ok(())
}

fn beside_this_program() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let directory = program.parent().context("this program is in no directory")?;
    Ok(if directory.ends_with("deps") { directory.parent().unwrap_or(directory) } else { directory }.to_owned())
}
