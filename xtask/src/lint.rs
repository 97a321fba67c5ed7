//! What needs no test to be seen.

use std::process::Stdio;

use anyhow::Result;

use crate::built::{cargo, cargo_command};
use crate::test::{Outcome, Summary};

pub(crate) fn run() -> Result<bool> {
    let mut summary = Summary::default();
    check(&mut summary)?;
    Ok(summary.print())
}

pub(crate) fn check(summary: &mut Summary) -> Result<()> {
    summary.add("format", Outcome::of(cargo(&["fmt", "--all", "--check"])?));
    let clippy = |what: &[&str]| cargo(&[&["clippy", "--quiet"], what, &["--", "-D", "warnings"]].concat());
    // A target with `test = false` is not among all targets.
    let clean = clippy(&["--workspace", "--all-targets"])? && clippy(&["-p", "meshd-tests", "--test", "scenarios"])?;
    summary.add("clippy", Outcome::of(clean));
    summary.add("cargo deny", deny()?);
    Ok(())
}

fn deny() -> Result<Outcome> {
    let mut ask = cargo_command(&["deny", "--version"]);
    let installed = ask.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success();
    if !installed {
        return Ok(Outcome::Skipped("cargo-deny is not installed; get it with `cargo install cargo-deny`".to_owned()));
    }
    Ok(Outcome::of(cargo(&["deny", "--all-features", "check"])?))
}
