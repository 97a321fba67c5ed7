//! What needs no test to be seen.

use std::process::Stdio;

use anyhow::Result;

use crate::built::{cargo, cargo_command};
use crate::summary::{Outcome, Summary};

pub(crate) fn run() -> Result<bool> {
    let mut summary = Summary::default();
    check(&mut summary)?;
    Ok(summary.print())
}

pub(crate) fn check(summary: &mut Summary) -> Result<()> {
    summary.add("format", Outcome::of(cargo(&["fmt", "--all", "--check"])?));
    let clippy = |what: &[&str]| cargo(&[&["clippy", "--quiet"], what, &["--", "-D", "warnings"]].concat());
    // A target with `test = false` is not among all targets. Of the whole workspace, for the features it was checked with.
    let clean = clippy(&["--workspace", "--all-targets"])? && clippy(&["--workspace", "--test", "*"])?;
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
    Ok(())
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
