//! `meshd ledger`: who still calls in clear; which ports could be strict.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::ensure;
use meshd::admin::{self, LedgerView};
use meshd::config::Config;
use nix::unistd::{Uid, User};

use super::{Output, on_runtime, time};

#[derive(clap::Args)]
pub(crate) struct Ledger {
    /// Only this port of this host; may be repeated.
    #[arg(long)]
    port: Vec<u16>,
    /// Ports that nobody called in clear for so long (like 7d, 12h, 30m): they could be strict. Exit code 1 if one
    /// of those asked for is not.
    #[arg(long, value_name = "TIME", value_parser = time)]
    clean_for: Option<Duration>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

pub(crate) fn run(config: &Config, args: &Ledger) -> anyhow::Result<ExitCode> {
    let mut view: LedgerView = on_runtime(async { Ok(admin::fetch(&config.admin_socket(), "/ledger").await?) })?;
    for port in &args.port {
        let known = view.ports.iter().any(|row| row.port == *port);
        ensure!(known, "no service is delivered to port {port} on this host; `meshd status` lists what it serves");
    }
    view.ports.retain(|row| args.port.is_empty() || args.port.contains(&row.port));
    let asked = view.ports.len();
    if let Some(wanted) = args.clean_for {
        view.ports.retain(|row| row.is_clean_for(wanted));
    }
    match args.output {
        Output::Table => print!("{}", admin::ledger(&view, SystemTime::now(), user_name)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&view)?),
    }
    Ok(if view.ports.len() == asked { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn user_name(uid: u32) -> Option<String> {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name)
}
