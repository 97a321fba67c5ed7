//! `meshd status`, `edges` and `check`: what operators look at.

use std::path::Path;
use std::process::ExitCode;

use meshd::admin::{self, EdgeView, StatusView, Verdict};
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

pub(crate) fn check(path: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let findings = on_runtime(async { Ok(admin::check(path).await) })?;
    match output {
        Output::Table => findings.iter().for_each(|finding| println!("{}", finding.line())),
        Output::Json => println!("{}", serde_json::to_string_pretty(&findings)?),
    }
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
