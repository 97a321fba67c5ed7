//! What needs no test to be seen.

use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};

use crate::built::{cargo, cargo_command};
use crate::summary::{Outcome, Summary};

/// Of what others leave of the machine: tests mostly wait.
const NICE: [&str; 2] = ["-n", "19"];

pub(crate) fn run() -> Result<bool> {
    Ok(check()?.print())
}

/// A check that runs beside something else.
pub(crate) struct Lint(JoinHandle<Result<Summary>>);

impl Lint {
    pub(crate) fn start() -> Self {
        Self(std::thread::spawn(check))
    }

    pub(crate) fn finish(self) -> Result<Summary> {
        self.0.join().map_err(|_| anyhow!("the check panicked"))?
    }
}

fn check() -> Result<Summary> {
    let mut summary = Summary::default();
    summary.add("format", Outcome::of(cargo(&["fmt", "--all", "--check"])?));
    // A target with `test = false` is not among all targets. Of the whole workspace, for the features it was checked with.
    let clean = clippy(&["--all-targets"])? && clippy(&["--test", "*"])?;
    summary.add("clippy", Outcome::of(clean));
    if deny_is_installed()? {
        summary.add(
            "dependencies (cargo deny)",
            Outcome::of(cargo(&["deny", "--all-features", "check", "bans", "licenses", "sources"])?),
        );
        summary.add("advisories (cargo deny)", advisories()?);
    } else {
        let reason = "cargo-deny is not installed; get it with `cargo install --locked cargo-deny`";
        summary.add("dependencies (cargo deny)", Outcome::Skipped(reason.to_owned()));
    }
    Ok(summary)
}

fn clippy(what: &[&str]) -> Result<bool> {
    let cargo = cargo_command(&[&["clippy", "--quiet", "--workspace"], what, &["--", "-D", "warnings"]].concat());
    let mut command = Command::new("nice");
    command.args(NICE).arg(cargo.get_program()).args(cargo.get_args()).stdin(Stdio::null());
    cargo.get_current_dir().into_iter().for_each(|directory| _ = command.current_dir(directory));
    Ok(command.status().context("cannot run cargo")?.success())
}

fn deny_is_installed() -> Result<bool> {
    let mut ask = cargo_command(&["deny", "--version"]);
    Ok(ask.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success())
}

/// The advisories are fetched; being offline is no defect of the tree.
fn advisories() -> Result<Outcome> {
    let output = cargo_command(&["deny", "--all-features", "check", "advisories"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("failed to fetch advisory database") {
        return Ok(Outcome::Skipped("the advisory database cannot be fetched from here".to_owned()));
    }
    print!("{said}");
    Ok(Outcome::of(output.status.success()))
}
