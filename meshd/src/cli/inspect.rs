//! `meshd status`, `edges` and `check`: what operators look at.

use std::path::Path;
use std::process::ExitCode;

use meshd::admin::{self, EdgeView, StatusView};
use meshd::check::{self, Verdict};
use meshd::config::Config;

use super::{Output, on_runtime};

pub(crate) fn status(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let status: StatusView = on_runtime(async { Ok(admin::fetch(&config.admin_socket(), "/status").await?) })?;
    match output {
        Output::Table => print!("{}", admin::status(&status)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn edges(config: &Config, output: Output) -> anyhow::Result<ExitCode> {
    let edges: Vec<EdgeView> = on_runtime(async { Ok(admin::fetch(&config.admin_socket(), "/edges").await?) })?;
    match output {
        Output::Table => print!("{}", admin::edges(&edges)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&edges)?),
    }
    Ok(ExitCode::SUCCESS)
}

/// Exit code 1 when something failed; warnings alone are 0, as with Linkerd's `check` (2 is a wrong command line).
pub(crate) fn check(path: &Path, pre: bool, output: Output) -> anyhow::Result<ExitCode> {
    let findings =
        on_runtime(async { Ok(if pre { check::before_install(path).await } else { check::check(path).await }) })?;
    match output {
        Output::Table => findings.iter().for_each(|finding| print!("{}", finding.lines())),
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
    }
    Ok(if check::worst(&findings) == Verdict::Failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
