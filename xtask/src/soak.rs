//! `cargo xtask soak`: the long form of what `cargo xtask test` shows in a short one. Hours; docs/reliability.md.

use anyhow::{Result, ensure};
use meshd_tests::packages;

use crate::built::{cargo, cargo_command};
use crate::summary::Summary;
use crate::test::{KUBERNETES, RELIABILITY, SOAK, as_root, build, run_tests};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only tests whose name has this in it
    #[arg(long)]
    only: Option<String>,
}

/// Tests of the PKI that need no hosts: what they show, their program, and which of its tests have a long form.
const IN_PROCESS: [(&str, &str, &str); 2] =
    [("rotations of the root in process", "it", "rotations::"), ("a fleet of agents", "fleet", "")];

pub(crate) fn run(args: &Args) -> Result<bool> {
    packages::ensure(&[packages::FOR_TESTS])?;
    let mut summary = Summary::default();
    for (name, program, tests) in IN_PROCESS {
        let only = args.only.as_deref().unwrap_or(tests);
        let mut command = cargo_command(&["test", "-p", "meshd-pki", "--test", program, "--", "--nocapture", only]);
        command.env(SOAK, "1");
        summary.add(name, run_tests(command)?);
    }
    let programs = build(&[&RELIABILITY, &KUBERNETES])?;
    summary.add(RELIABILITY.name, as_root(&RELIABILITY, &programs, args.only.as_deref(), true)?);
    // What is measured there is what is shipped.
    ensure!(cargo(&["build", "--release", "-p", "meshd-scale"])?, "the build failed");
    let followed = args.only.as_deref().unwrap_or("scale::");
    summary.add("many hosts that follow one backend", as_root(&KUBERNETES, &programs, Some(followed), true)?);
    Ok(summary.print())
}
