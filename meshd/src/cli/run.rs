//! `meshd run`: the daemon in the foreground.

use std::path::Path;
use std::process::ExitCode;

use meshd::app::App;
use meshd::config::Config;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::on_runtime;

pub(crate) fn run(config: &Config, path: &Path) -> anyhow::Result<ExitCode> {
    log();
    raise_descriptor_limit();
    // One arena per worker and one for everything else.
    meshd_sys::memory::tune(config.proxy.worker_count() + 1);
    on_runtime(async {
        App::start(config.clone(), path).await?.run().await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Each connection takes a descriptor; the usual soft limit of 1024 is for programs that use select(2).
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open descriptors; connections beyond it are refused");
    }
}

/// To standard error, for journald; `RUST_LOG=debug` or `RUST_LOG=meshd::transport=debug,info` says how much.
pub(crate) fn log() {
    let wanted = std::env::var("RUST_LOG").ok().and_then(|filter| filter.parse::<Targets>().ok());
    let filter = wanted.unwrap_or_else(|| Targets::new().with_default(tracing::Level::INFO));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
}
