//! `meshd intercept`: the kernel rules that hand connections to meshd.

use std::path::Path;
use std::process::ExitCode;

use clap::Subcommand;
use meshd::capture;
use meshd::config::Config;
use meshd::dns;

#[derive(Subcommand)]
pub(crate) enum Intercept {
    /// Remove meshd's rules and routes, and what makes programs ask its DNS; works without the daemon, and touches
    /// nothing else.
    Revert,
}

pub(crate) fn run(path: &Path, action: &Intercept) -> anyhow::Result<ExitCode> {
    match action {
        Intercept::Revert => {
            // The way out must work when everything else is broken, the configuration included.
            let config = Config::load(path).unwrap_or_else(|error| {
                eprintln!("meshd: {error:#}; reverting what the default configuration installs");
                Config::default()
            });
            let captured = capture::revert(&config.state_dir, &config.capture.bare(config.proxy.capture_port));
            // Whichever fails, the other is tried.
            dns::integrate::remove(&config.dns)?;
            captured?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
