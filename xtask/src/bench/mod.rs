//! `cargo xtask bench`: the same work through nothing, HAProxy, Envoy and meshd, in turn, in one run.

mod bed;
mod certificates;
mod envoy;
mod haproxy;
mod measure;
mod mesh;
mod report;
mod subject;
mod table;

use std::path::PathBuf;

use anyhow::{Context, Result};
use meshd_tests::{binaries, packages, root};

use crate::built::{self, Built};
use bed::Bed;
use measure::Effort;
use report::Report;
use subject::Subject;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How often every proxy is measured; the table shows medians
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where to write the numbers
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
    /// Only these: direct, haproxy, envoy, meshd, meshd-tun (all but the last if nothing is said)
    #[arg(long, value_delimiter = ',')]
    only: Vec<Subject>,
    /// Shorter phases, for trying the benchmark itself
    #[arg(long)]
    quick: bool,
}

pub(crate) fn run(args: &Args) -> Result<bool> {
    let built = match built::before_sudo() {
        Some(built) => built,
        None => prepare(args)?,
    };
    root::become_root("cargo xtask bench", &built.marks())?;
    packages::ensure(&[packages::FOR_LABS, packages::FOR_BENCH])?;
    binaries::use_directory(built.target.join("release"));
    let mut bed = Bed::make()?;
    let subjects = subjects(&mut bed, args, &built);
    let mut report = Report::begin(&built, args.rounds);
    measure_all(&bed, &subjects, args, &mut report)?;
    println!("\n{}", table::render(&report));
    let path = built::root().join(&args.json);
    std::fs::write(&path, report.json()?).with_context(|| format!("cannot write {}", path.display()))?;
    println!("Written to {}", args.json.display());
    Ok(true)
}

/// What the calling user does before sudo: build, and fetch Envoy.
fn prepare(args: &Args) -> Result<Built> {
    let built = built::release()?;
    if args.wants(Subject::Envoy) {
        envoy::fetch(&built.target);
    }
    Ok(built)
}

/// Those that can be had here; each other one leaves a line saying why.
fn subjects(bed: &mut Bed, args: &Args, built: &Built) -> Vec<Subject> {
    let mut found = Vec::new();
    for subject in Subject::ALL.into_iter().filter(|subject| args.wants(*subject)) {
        match bed.prepare(subject, &built.target) {
            Ok(()) => found.push(subject),
            Err(why) => println!("Skipped {subject}: {why:#}"),
        }
    }
    found
}

/// Interleaved, each round beginning with another one, so that a slow minute of the machine hits all alike.
fn measure_all(bed: &Bed, subjects: &[Subject], args: &Args, report: &mut Report) -> Result<()> {
    let effort = if args.quick { Effort::quick() } else { Effort::full() };
    for round in 0..args.rounds {
        for turn in 0..subjects.len() {
            let subject = subjects[(round + turn) % subjects.len()];
            let sample = measure::measure(bed, subject, &effort).with_context(|| format!("measuring {subject}"))?;
            println!("round {}: {subject}: {}", round + 1, table::line(&sample));
            report.add(subject, sample);
        }
    }
    Ok(())
}

impl Args {
    fn wants(&self, subject: Subject) -> bool {
        if self.only.is_empty() { subject != Subject::MeshdTun } else { self.only.contains(&subject) }
    }
}
