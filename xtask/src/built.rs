//! Building, always as the calling user: what runs as root afterwards is told what was built.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use meshd_tests::binaries;

const TARGET: &str = "MESHD_XTASK_TARGET";
const COMMIT: &str = "MESHD_XTASK_COMMIT";

static BUILT: OnceLock<Built> = OnceLock::new();

#[derive(Debug, Clone)]
pub(crate) struct Built {
    /// cargo's target directory.
    pub(crate) target: PathBuf,
    /// What was built, for the benchmark's record.
    pub(crate) commit: String,
}

impl Built {
    /// For the environment of the run under sudo.
    pub(crate) fn marks(&self) -> [(&str, &str); 2] {
        [(TARGET, self.target.to_str().unwrap_or_default()), (COMMIT, &self.commit)]
    }
}

pub(crate) fn known() -> Option<&'static Built> {
    BUILT.get()
}

/// What the run before sudo built, if this is the run after it.
pub(crate) fn before_sudo() -> Option<Built> {
    let target = PathBuf::from(std::env::var_os(TARGET)?);
    Some(remember(Built { target, commit: std::env::var(COMMIT).unwrap_or_default() }))
}

pub(crate) fn describe() -> Result<Built> {
    Ok(remember(Built { target: target_directory()?, commit: commit() }))
}

/// The programs of a lab, optimised; returns once they are there.
pub(crate) fn release() -> Result<Built> {
    let mut args = vec!["build", "--release"];
    for (package, binary) in binaries::NEEDED {
        args.extend(["-p", package, "--bin", binary]);
    }
    println!("Building: cargo {}", args.join(" "));
    ensure!(cargo(&args)?, "the build failed");
    describe()
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Runs cargo in the workspace with our terminal; whether it succeeded.
pub(crate) fn cargo(args: &[&str]) -> Result<bool> {
    Ok(cargo_command(args).status().context("cannot run cargo")?.success())
}

pub(crate) fn cargo_command(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root()).stdin(Stdio::null());
    command
}

fn remember(built: Built) -> Built {
    BUILT.get_or_init(|| built).clone()
}

fn target_directory() -> Result<PathBuf> {
    let output = cargo_command(&["metadata", "--format-version=1", "--no-deps", "--offline"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata gave no JSON")?;
    let directory = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(directory.into())
}

/// The commit, with a mark when the tree differs from it.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).current_dir(root()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "HEAD"]) else { return "unknown".to_owned() };
    let changed = git(&["status", "--porcelain"]).is_none_or(|changes| !changes.is_empty());
    if changed { format!("{commit}-dirty") } else { commit }
}
