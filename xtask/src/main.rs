//! The commands of a contributor: everything CI runs, a laptop can run.

mod bench;
mod built;
mod demo;
mod interrupt;
mod lint;
mod schema;
mod soak;
mod summary;
mod test;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about)]
enum Verb {
    /// Builds everything and shows a mesh of four hosts at work, step by step
    Demo(demo::Args),
    /// Everything needed to trust a change: format, clippy, unit, property and scenario tests
    Test(test::Args),
    /// The long form of tests that have one: hours of faults, rotations and fleets, with figures
    Soak(soak::Args),
    /// The same work through nothing, HAProxy, Envoy and meshd
    Bench(bench::Args),
    /// Format, clippy and dependency checks only
    Lint,
    /// Writes deploy/schema and deploy/kubernetes/crds.yaml anew, after a change of what documents may say
    Schema,
}

fn main() -> ExitCode {
    let verb = Verb::parse();
    interrupt::watch();
    let outcome = match verb {
        Verb::Demo(args) => demo::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Soak(args) => soak::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Lint => lint::run(),
        Verb::Schema => schema::run(),
    };
    if let Err(error) = &outcome {
        eprintln!("error: {error:#}");
    }
    if let Some(built) = built::known() {
        meshd_tests::root::give_back(&built.target);
    }
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) | Err(_) => ExitCode::FAILURE,
    }
}
